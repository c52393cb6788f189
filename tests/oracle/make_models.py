#!/usr/bin/env python3
"""Small random Qwen2 models, and what transformers computes with them.

    python make_models.py OUT            (needs: torch, transformers >= 5, safetensors)

Writes OUT/<model>/ (config.json, safetensors) for every entry of MODELS and OUT/expected.json:

    {"models": [{"name", "dtype", "scores": [{"ids", "logprobs"}],          logprobs[i] is of ids[i+1] given ids[0..=i]
                 "generations": [{"ids", "max_new_tokens", "new_ids"}],                              greedy
                 "gradient": {"ids", "loss", "file"}}]}             d(mean NLL)/d(parameter), f32, by name

The expected values are computed from the files as written, the weights widened to f32. The weights are large enough
that attention, rotary embedding and every bias matter, and a greedy choice that hangs on less than MARGIN is not
used, so that a correct implementation has no ties to break.
"""
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

MARGIN = 2e-3  # logit distance of the first two choices

# Each differs from the others in what tends to go wrong.
MODELS = {
    # Grouped queries, tied head, today's config.json (rope_parameters, dtype).
    "gqa_tied": dict(hidden=64, heads=4, kv_heads=2, layers=3, vocab=131, tied=True, theta=1e4, long=True),
    # Untied head, no grouping, yesterday's config.json (rope_theta, torch_dtype), several shards.
    "untied_sharded": dict(
        hidden=48, heads=3, kv_heads=3, layers=2, vocab=97, tied=False, theta=1e6, old_form=True, shards=True
    ),
    # heads * head_dim != hidden_size, one key-value head for all, two EOS ids of which one is reached.
    "head_dim_mqa": dict(
        hidden=40, heads=4, kv_heads=1, layers=2, vocab=211, tied=False, theta=5e5, head_dim=16, stops=True, long=True
    ),
    # bf16 with a tied head in one file, yesterday's config.json.
    "tied_bf16": dict(hidden=64, heads=8, kv_heads=2, layers=2, vocab=160, tied=True, theta=1e6, bf16=True, old_form=True),
}


def main():
    out = Path(sys.argv[1])
    torch.set_num_threads(2)
    models = [make(out, i, name, **shape) for i, (name, shape) in enumerate(MODELS.items())]
    (out / "expected.json").write_text(json.dumps({"models": models}))


def make(out, seed, name, hidden, heads, kv_heads, layers, vocab, tied, theta, head_dim=None, bf16=False,
         old_form=False, shards=False, stops=False, long=False):
    generator = torch.Generator().manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=hidden * 2 + 8, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=1024, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": theta}, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
        **({"head_dim": head_dim} if head_dim else {}),
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if parameter_name.endswith("norm.weight"):
                p.copy_(1 + 0.3 * noise)
            elif parameter_name.endswith("bias"):
                p.copy_(0.5 * noise)
            else:
                p.copy_(noise * (1.5 / p.shape[-1] ** 0.5))
    directory = out / name
    model.to(torch.bfloat16 if bf16 else torch.float32)
    model.save_pretrained(directory, max_shard_size="40KB" if shards else "5GB")
    assert shards == (directory / "model.safetensors.index.json").exists()
    (directory / "generation_config.json").unlink(missing_ok=True)
    write_config(directory, old_form, theta, bf16)
    model = load(directory)

    ids = lambda n: torch.randint(vocab, (n,), generator=generator).tolist()
    sequences = [ids(2), ids(17), ids(64)] + ([ids(700)] if long else [])
    generations = [generation for n, new in [(1, 24), (9, 40), (70, 16)] for generation in [greedy(model, ids, n, new)]]
    eos = sorted(set(range(vocab)) - {i for g in generations for i in g["new_ids"]})[:2]
    if stops:
        # The first generation ends at its first token that did not occur before, from the tenth on.
        new_ids = generations[0]["new_ids"]
        others = {i for g in generations[1:] for i in g["new_ids"]}
        stop = next(k for k in range(9, len(new_ids)) if new_ids[k] not in new_ids[:k] and new_ids[k] not in others)
        eos = [eos[0], new_ids[stop]]
        generations[0]["new_ids"] = new_ids[: stop + 1]
    set_keys(directory, eos_token_id=eos)
    check_stop(model, generations[0], eos)

    return {
        "name": name,
        "dtype": "bfloat16" if bf16 else "float32",
        "scores": [{"ids": s, "logprobs": logprobs(model, s).tolist()} for s in sequences],
        "generations": generations,
        "gradient": gradient(model, sequences[1], out / f"{name}.gradient.safetensors"),
    }


def load(directory):
    """Eager attention in f32: the plainest path transformers has. Every tensor must be there, and no other."""
    model, info = Qwen2ForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    problems = {k: v for k, v in info.items() if v}
    assert not problems, problems
    return model.eval()


def logprobs(model, ids):
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def greedy(model, ids, prompt_tokens, max_new_tokens):
    """A prompt whose greedy continuation is clear at every token, and that continuation by generate()."""
    for _ in range(200):
        prompt = ids(prompt_tokens)
        result = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, prompt_tokens, dtype=torch.long),
            max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True, output_logits=True,
        )
        top = torch.stack(result.logits)[:, 0].topk(2).values
        if (top[:, 0] - top[:, 1]).min() > MARGIN:
            new_ids = result.sequences[0, prompt_tokens:].tolist()
            return {"ids": prompt, "max_new_tokens": max_new_tokens, "new_ids": new_ids}
    raise SystemExit(f"no prompt of {prompt_tokens} tokens with a clear greedy continuation")


def check_stop(model, generation, eos):
    """generate() itself, told the EOS ids, must end where expected.json says (the EOS id included)."""
    prompt = torch.tensor([generation["ids"]])
    result = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=generation["max_new_tokens"], do_sample=False,
        eos_token_id=eos, pad_token_id=eos[0],
    )
    assert result[0, prompt.shape[1]:].tolist() == generation["new_ids"]


def gradient(model, ids, file):
    model.zero_grad()
    x = torch.tensor([ids])
    logits = model(x).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, x[0, 1:])
    loss.backward()
    save_file({n: p.grad.contiguous() for n, p in model.named_parameters()}, file)
    return {"ids": ids, "loss": loss.item(), "file": file.name}


def write_config(directory, old_form, theta, bf16):
    """config.json as transformers 4 (old form) or 5 (new form) writes it, whichever version runs here."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    dtype = "bfloat16" if bf16 else "float32"
    for key in ["rope_theta", "rope_parameters", "rope_scaling", "dtype", "torch_dtype"]:
        config.pop(key, None)
    if old_form:
        config.pop("layer_types", None)
        config |= {"rope_theta": theta, "torch_dtype": dtype}
    else:
        config |= {"rope_parameters": {"rope_type": "default", "rope_theta": theta}, "dtype": dtype}
    path.write_text(json.dumps(config, indent=2))


def set_keys(directory, **keys):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys, indent=2))


if __name__ == "__main__":
    main()
