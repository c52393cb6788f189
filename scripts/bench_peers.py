#!/usr/bin/env python3
"""What a user would run instead of temper on the same device: transformers' generate, and a training micro-step of plain
transformers + torch with noise as the replaced system added it (every nn.Linear patched: matmul, randn, abs, mul, add),
with the noise and without. And by how much transformers' own bf16 log-probs differ between batch 1 and the whole batch.

    scripts/bench_peers.py --write-lengths lengths.txt
    temper bench train configs/e5c.yaml --lengths lengths.txt --json > ours.json
    scripts/bench_peers.py --lengths lengths.txt --beside ours.json

  --device D           cuda (default) or cpu
  --tiny               a model of 2 layers and 8 sequences: does the script run here?
  --lengths FILE       a line a prompt: its tokens, then those of its responses (default: the law of temper's gsm8k)
  --write-lengths FILE draw such lengths, write them and stop
  --prompts N, --group-size N, --minibatch-prompts N, --microbatch-sequences N   (128, 5, 32, 16)
  --steps N            measured repetitions (2), after one that is not
  --beside FILE        temper's own result (bench train or rollout): ratios of tokens a second, ours over theirs

Prints one JSON object with the fields of temper's: variants, phases, seconds {median, min, max, all}, tokens, tokens_per_s,
flops. Random weights from the preset's shapes, nothing is downloaded. Needs torch and transformers.
"""

import argparse
import json
import math
import statistics
import sys
import time
from datetime import datetime, timezone

import torch
import torch.nn.functional as F
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM, StoppingCriteria, StoppingCriteriaList

NOISE = 0.05
SHAPES = {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
          "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32768,
          "tie_word_embeddings": True, "rope_theta": 1e6}
TINY = {**SHAPES, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4}
LOGITS_ROWS = 512  # logits are made of so many rows at a time where no gradient is wanted


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------------- lengths, prompts

def draw_lengths(prompts, group, seed):
    """(prompt tokens, [response tokens]) by the law of src/bench/lengths.rs; other draws."""
    generator = torch.Generator().manual_seed(seed)

    def lognormal(median, sigma, least, most):
        z = torch.randn((), generator=generator).item()
        return min(max(round(median * math.exp(sigma * z)), least), most)

    return [(lognormal(100, 0.2, 56, 256), [lognormal(135, 0.45, 16, 1024) for _ in range(group)]) for _ in range(prompts)]


def read_lengths(path, prompts, group):
    try:
        with open(path) as file:
            lines = [[int(n) for n in line.split()] for line in file if line.strip()]
    except (OSError, ValueError) as error:
        fail(f"--lengths: {path}: {error}")
    if not lines or any(len(line) < 2 or min(line) < 1 for line in lines):
        fail(f"--lengths: {path}: expected a prompt's tokens and those of its responses a line, at least 1 each")
    lines = [lines[p % len(lines)] for p in range(prompts)]
    return [(line[0], [line[1 + m % (len(line) - 1)] for m in range(group)]) for line in lines]


class Batch:
    """Sequences of random tokens, group members after each other with one prompt."""

    def __init__(self, lengths, vocab, device, seed):
        generator = torch.Generator().manual_seed(seed)
        self.device = device
        self.prompts, self.limits, self.ids = [], [], []
        for prompt, responses in lengths:
            ids = torch.randint(3, vocab, (prompt,), generator=generator)
            for response in responses:
                self.prompts.append(ids)
                self.limits.append(response)
                self.ids.append(torch.cat([ids, torch.randint(3, vocab, (response,), generator=generator)]))

    def left_padded(self):
        longest = max(len(ids) for ids in self.prompts)
        ids = torch.stack([F.pad(ids, (longest - len(ids), 0)) for ids in self.prompts])
        mask = torch.stack([F.pad(torch.ones_like(ids), (longest - len(ids), 0)) for ids in self.prompts])
        return ids.to(self.device), mask.to(self.device)

    def right_padded(self, which):
        longest = max(len(self.ids[s]) for s in which)
        pad = lambda x: F.pad(x, (0, longest - len(x)))
        ids = torch.stack([pad(self.ids[s]) for s in which]).to(self.device)
        mask = torch.stack([pad(torch.ones_like(self.ids[s])) for s in which]).to(self.device)
        response = torch.zeros_like(ids, dtype=torch.bool)
        for row, s in enumerate(which):
            response[row, len(self.prompts[s]):len(self.ids[s])] = True
        return ids, mask, response


# -------------------------------------------------------------------------------------------------------------- noise

def noised(y):
    return y + torch.randn_like(y) * y.abs() * NOISE


class NoisyLinear(torch.autograd.Function):
    """Five operations a product, each rounded to bf16, in all three products."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        y = noised(x @ weight.t())
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1])
        dx = noised(dy @ weight)
        dw = noised(flat.t() @ x.reshape(-1, x.shape[-1]))
        return dx, dw, flat.sum(0) if ctx.has_bias else None


def patch(model, noisy):
    """All linears but the head, as the recipe excludes it."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            module.__dict__.pop("forward", None)
            if noisy:
                module.forward = lambda x, m=module: NoisyLinear.apply(x, m.weight, m.bias)


# ------------------------------------------------------------------------------------------------------- what is timed

class ByLength(StoppingCriteria):
    """A sequence ends when it has its tokens."""

    def __init__(self, start, limits):
        self.ends = start + limits

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.ends


def generate(model, batch):
    ids, mask = batch.left_padded()
    limits = torch.tensor(batch.limits, device=batch.device)
    with torch.no_grad():
        model.generate(ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
                       eos_token_id=None, max_new_tokens=max(batch.limits),
                       stopping_criteria=StoppingCriteriaList([ByLength(ids.shape[1], limits)]))


class Trainer:
    """bf16 weights with f32 masters in AdamW, a policy-gradient loss on response tokens."""

    def __init__(self, model, lr=5e-7):
        self.model = model
        self.parameters = list(model.parameters())
        self.masters = [p.detach().float().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=lr, weight_decay=0.01)

    def minibatch(self, batch, sequences, microbatch):
        """Forward and backward of every micro-batch, then one update."""
        tokens = sum(batch.limits[s] for s in sequences)
        for first in range(0, len(sequences), microbatch):
            which = sequences[first:first + microbatch]
            ids, mask, response = batch.right_padded(which)
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            nll = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            signs = torch.tensor([1.0 if s % 2 else -1.0 for s in which], device=ids.device)
            (nll.view(len(which), -1) * response[:, 1:] * signs[:, None]).sum().div(tokens).backward()
        for parameter, master in zip(self.parameters, self.masters):
            master.grad = parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters):
                parameter.copy_(master)
                master.grad = None


def response_logprobs(model, batch, which):
    """f32, of the response tokens of each sequence."""
    ids, mask, response = batch.right_padded(which)
    with torch.no_grad():
        hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        rows, targets = hidden[:, :-1][response[:, 1:]], ids[:, 1:][response[:, 1:]]
        parts = []
        for first in range(0, len(rows), LOGITS_ROWS):
            logits = model.lm_head(rows[first:first + LOGITS_ROWS]).float().log_softmax(-1)
            parts.append(logits.gather(1, targets[first:first + LOGITS_ROWS, None]).squeeze(1))
    return torch.cat(parts).split([batch.limits[s] for s in which])


def logprob_gap(model, batch, singles):
    """|batch of all - batch of one| of the response tokens of the first sequences: mean and largest."""
    together = response_logprobs(model, batch, range(len(batch.ids)))
    alone = [response_logprobs(model, batch, [s])[0] for s in range(singles)]
    gaps = torch.cat([(a - b).abs() for a, b in zip(together, alone)])
    return gaps.mean().item(), gaps.max().item()


# -------------------------------------------------------------------------------------------------------------- report

def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def measure(run, steps, device):
    """Seconds of each of `steps` calls after one that is not counted, and the peak of device memory."""
    run()
    synchronize(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return seconds, torch.cuda.max_memory_allocated() if device == "cuda" else None


def flops(shapes, sequences, phase):
    """As src/rl/flops.rs counts them; here generate computes a prompt for every member."""
    h, i, layers = shapes["hidden_size"], shapes["intermediate_size"], shapes["num_hidden_layers"]
    kv = shapes["num_key_value_heads"] * h // shapes["num_attention_heads"]
    per_token = 2 * layers * (2 * h * h + 2 * kv * h + 3 * h * i)
    triangle = lambda n: n * (n + 1) / 2
    total = 0.0
    for prompt, response in sequences:
        read = prompt + response - 1
        total += per_token * read + 4 * h * layers * triangle(read) + 2 * shapes["vocab_size"] * h * response
    return total * (3 if phase == "update" else 1)


def variant(name, phase, seconds, peak, tokens, operations):
    median = statistics.median(seconds)
    row = {"phase": phase, "seconds": {"median": median, "min": min(seconds), "max": max(seconds), "all": seconds},
           "tokens": tokens, "tokens_per_s": tokens / median, "flops": operations, "flop_per_s": operations / median,
           "mfu_ratio": None}
    return {"name": name, "phases": [row], "peak_device_bytes": peak}


def read_ours(path, work):
    """tokens/s by variant and phase of temper's result, which must be of the same work."""
    try:
        with open(path) as file:
            ours = json.load(file)
        own = {(v["name"], p["phase"]): p["tokens_per_s"] for v in ours["variants"] for p in v["phases"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"--beside: {path}: expected the JSON of temper bench train or rollout: {error}")
    for key, expected in work.items():
        if ours.get(key) != expected:
            fail(f"--beside: {path}: {key}: found {ours.get(key)}, expected {expected}: that is other work than the peer's")
    return own


def ratios(own, report):
    """tokens/s of temper's recipe, and of it without error, over the peer's."""
    theirs = {v["name"]: v["phases"][0]["tokens_per_s"] for v in report["variants"]}
    pairs = {"rollout over transformers generate": ("recipe", "rollout", "transformers_generate"),
             "update over patched torch": ("recipe", "update", "torch_update_noisy"),
             "update without error over torch": ("without_matmul_error", "update", "torch_update_clean")}
    return {what: own[arm, phase] / theirs[peer] for what, (arm, phase, peer) in pairs.items()
            if (arm, phase) in own and peer in theirs}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--lengths")
    parser.add_argument("--write-lengths")
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--minibatch-prompts", type=int)
    parser.add_argument("--microbatch-sequences", type=int)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beside")
    args = parser.parse_args()
    for name in ["prompts", "group_size", "minibatch_prompts", "microbatch_sequences", "steps"]:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")
    defaults = (4, 2, 2, 4) if args.tiny else (128, 5, 32, 16)
    prompts, group = args.prompts or defaults[0], args.group_size or defaults[1]
    minibatch, microbatch = args.minibatch_prompts or defaults[2], args.microbatch_sequences or defaults[3]
    lengths = read_lengths(args.lengths, prompts, group) if args.lengths else draw_lengths(prompts, group, args.seed)
    if args.tiny:
        lengths = [(min(p, 16), [min(r, 8 + m) for m, r in enumerate(responses)]) for p, responses in lengths]
    if args.write_lengths:
        with open(args.write_lengths, "w") as file:
            file.writelines(" ".join(map(str, [prompt, *responses])) + "\n" for prompt, responses in lengths)
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch sees no GPU; expected --device cpu")

    torch.manual_seed(args.seed)
    shapes = TINY if args.tiny else SHAPES
    with torch.device(args.device):
        model = Qwen2ForCausalLM(Qwen2Config(**shapes)).to(torch.bfloat16)
    batch = Batch(lengths, shapes["vocab_size"], args.device, args.seed)
    both = [(len(prompt), limit) for prompt, limit in zip(batch.prompts, batch.limits)]
    mean = lambda x: sum(x) / len(x)
    work = {"parameters": sum(p.numel() for p in model.parameters()), "sequences": len(both),
            "prompt_tokens_mean": mean([p for p, _ in both]), "response_tokens_mean": mean(batch.limits)}
    own = read_ours(args.beside, work) if args.beside else None
    model.eval()
    seconds, peak = measure(lambda: generate(model, batch), args.steps, args.device)
    variants = [variant("transformers_generate", "rollout", seconds, peak, sum(batch.limits),
                        flops(shapes, both, "rollout"))]
    gap_mean, gap_max = logprob_gap(model, batch, min(16, len(both)))
    model.train()
    trainer = Trainer(model)
    sequences = list(range(min(minibatch * group, len(both))))
    tokens = sum(sum(both[s]) for s in sequences)
    operations = flops(shapes, [both[s] for s in sequences], "update")
    for name, noisy in [("torch_update_noisy", True), ("torch_update_clean", False)]:
        patch(model, noisy)
        seconds, peak = measure(lambda: trainer.minibatch(batch, sequences, microbatch), args.steps, args.device)
        variants.append(variant(name, "update", seconds, peak, tokens, operations))
    medians = [v["phases"][0]["seconds"]["median"] for v in variants]
    report = {
        "bench": "peers",
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **work,
        "group_size": group,
        "minibatch_sequences": len(sequences),
        "microbatch_sequences": microbatch,
        "response_tokens_max": max(batch.limits),
        "steps": args.steps,
        "variants": variants,
        "noise_time_ratio": {"update": medians[1] / medians[2]},
        "logprob_gap": {"batch": len(both), "mean_abs": gap_mean, "max_abs": gap_max},
    }
    if own:
        report["temper_over_peer_tokens_per_s"] = ratios(own, report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
