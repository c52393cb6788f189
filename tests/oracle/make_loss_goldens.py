#!/usr/bin/env python3
"""Expected values of the policy loss (TRL), of AdamW (torch.optim) and of lr schedules (transformers), for tests/losses.

    python make_loss_goldens.py OUT_DIR        (needs: torch, trl)

Writes policy_loss.json, adamw.json and lr_schedules.json. The loss is computed by TRL's own GRPOTrainer._compute_loss, unmodified,
in f64: the trainer object is made without its constructor (which wants a model, a tokenizer and data), gets the
settings of a real GRPOConfig, and its per-token log-probs come from a tensor instead of a model. The inputs are
rounded to f32 first, so that both sides see the same numbers.
"""
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
import transformers
import trl
from accelerate import Accelerator
from trl import GRPOConfig, GRPOTrainer

# Sequences of uneven lengths, one of a single token, padded on the right as TRL has them.
LENGTHS = [5, 1, 9, 3]
MAX_COMPLETION = 12  # Lmax of dr_grpo: more than the longest sequence


class LogprobsOnly(GRPOTrainer):
    """TRL's trainer with the model replaced by the tensor in `self.logprobs`."""

    def __init__(self, config):  # deliberately without super().__init__
        self.args = config
        self.accelerator = Accelerator(cpu=True)
        self.model = torch.nn.Module()  # asked for .training only
        self.loss_type = config.loss_type
        self.importance_sampling_level = config.importance_sampling_level
        self.beta = config.beta
        self.epsilon_low = config.epsilon
        self.epsilon_high = config.epsilon_high if config.epsilon_high is not None else config.epsilon
        self.top_entropy_quantile = config.top_entropy_quantile
        self.off_policy_mask_threshold = None
        self.use_vllm = config.vllm_importance_sampling_correction
        self.vllm_importance_sampling_correction = config.vllm_importance_sampling_correction
        self.max_completion_length = config.max_completion_length
        self.current_gradient_accumulation_steps = 1
        self.aux_loss_enabled = False
        self._entropy_bonus_enabled = config.entropy_coef != 0.0
        self.use_adaptive_entropy = False
        self.entropy_coef = config.entropy_coef
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return self.logprobs, self.entropies, None


def trl_loss(case, batch, directory):
    config = GRPOConfig(
        output_dir=directory,
        use_cpu=True,
        bf16=False,
        report_to=[],
        loss_type=case["loss_type"],
        beta=case["beta"],
        epsilon=case["epsilon"],
        epsilon_high=case["epsilon_high"],
        delta=case["delta"],
        use_bias_correction_kl=False,  # TRL's default multiplies k3 by the ratio; numerics here do not
        importance_sampling_level=case["ratio"],
        entropy_coef=case["entropy_coef"],
        vllm_importance_sampling_correction=case["truncated_importance"] is not None,
        max_completion_length=MAX_COMPLETION,
        per_device_train_batch_size=len(LENGTHS),
        num_generations=len(LENGTHS),
        gradient_accumulation_steps=1,
        steps_per_generation=1,
    )
    trainer = LogprobsOnly(config)
    new = batch["new"].double().requires_grad_()
    trainer.logprobs = new
    # Some function of the log-probs, so that the bonus has a gradient with respect to them: H = new^2.
    trainer.entropies = new**2
    mask = batch["mask"]
    inputs = {
        "prompt_ids": torch.zeros(len(LENGTHS), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(LENGTHS), 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask, dtype=torch.long),
        "completion_mask": mask,
        "advantages": batch["advantages"].double(),
        "old_per_token_logps": batch["old"].double(),
        "ref_per_token_logps": batch["reference"].double(),
        "num_items_in_batch": mask.sum(),
    }
    if case["truncated_importance"] is not None:
        # TRL's own line for vllm_importance_sampling_mode="token_truncate" stands in the middle of its generation.
        gap = inputs["old_per_token_logps"] - batch["rollout"].double()
        inputs["importance_sampling_ratio"] = torch.exp(gap).clamp(max=case["truncated_importance"])
    loss = trainer._compute_loss(None, inputs)
    loss.backward()
    metrics = trainer._metrics["train"]
    flat = mask.bool()
    return {
        "loss": loss.item(),
        "gradient": new.grad[flat].tolist(),
        "kl": metrics["kl"][0] if "kl" in metrics else None,
        "clipped_low": metrics["clip_ratio/low_mean"][0],
        "clipped_high": metrics["clip_ratio/high_mean"][0],
    }


def loss_goldens(directory):
    generator = torch.Generator().manual_seed(20)
    width = max(LENGTHS)
    mask = (torch.arange(width)[None, :] < torch.tensor(LENGTHS)[:, None]).double()
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    # Log-probs of tokens that were sampled, and ratios of which many leave the clip range, but none reaches
    # our clamps (|new - old| 20, |k3| 10), which TRL does not have.
    new = -randn(len(LENGTHS), width).abs() - 0.05
    batch = {
        "new": new,
        "old": new + 0.4 * randn(len(LENGTHS), width),
        "reference": new + 0.3 * randn(len(LENGTHS), width),
        "advantages": torch.tensor([1.3, -0.7, -1.6, 0.4]),
        "mask": mask,
    }
    batch["rollout"] = batch["old"] + 0.3 * randn(len(LENGTHS), width)
    flat = mask.bool()
    cases = []
    for loss_type in ["grpo", "bnpo", "dapo", "dr_grpo"]:
        for beta, epsilon, epsilon_high, delta in [
            (0.0, 0.2, None, None),
            (0.0, 0.2, 0.28, None),
            (0.04, 0.2, 0.2, None),
            (0.5, 0.1, 0.3, 1.5),
        ]:
            case = {"loss_type": loss_type, "beta": beta, "epsilon": epsilon, "epsilon_high": epsilon_high, "delta": delta}
            case |= {"ratio": "token", "truncated_importance": None, "entropy_coef": 0.0}
            cases.append(case | trl_loss(case, batch, directory))
        # clip widths near what sequence ratios reach, so that some are cut and some are not
        for ratio, beta, epsilon, epsilon_high, delta, cap, entropy_coef in [
            ("sequence", 0.0, 0.05, 0.08, None, None, 0.0),
            ("sequence", 0.04, 0.01, 0.02, 1.1, None, 0.0),
            ("sequence", 0.0, 0.05, 0.08, None, 1.2, 0.0),
            ("token", 0.0, 0.2, 0.28, None, 1.1, 0.0),
            ("token", 0.04, 0.2, 0.2, 1.5, 2.0, 0.0),
            ("token", 0.0, 0.2, 0.28, None, None, 0.01),
            ("token", 0.04, 0.2, 0.28, 3.0, 1.2, -0.02),
        ]:
            case = {"loss_type": loss_type, "beta": beta, "epsilon": epsilon, "epsilon_high": epsilon_high, "delta": delta}
            case |= {"ratio": ratio, "truncated_importance": cap, "entropy_coef": entropy_coef}
            cases.append(case | trl_loss(case, batch, directory))
    return {
        "made_by": f"tests/oracle/make_loss_goldens.py, trl {trl.__version__}, torch {torch.__version__}",
        "lengths": LENGTHS,
        "max_completion_length": MAX_COMPLETION,
        "new": new[flat].tolist(),
        "old": batch["old"][flat].tolist(),
        "reference": batch["reference"][flat].tolist(),
        "rollout": batch["rollout"][flat].tolist(),
        "advantages": batch["advantages"].tolist(),
        "cases": cases,
    }


def adamw_goldens():
    """Ten updates of two parameters (a matrix and a bias), clipped by clip_grad_norm_, in f32 on one thread."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(21)
    start = [torch.randn(3, 4, generator=generator), torch.randn(4, generator=generator)]
    # Gradients over several magnitudes; the last steps are below the clip limit.
    gradients = [
        [torch.randn(p.shape, generator=generator) * 10.0 ** (1 - step // 3) for p in start] for step in range(10)
    ]
    runs = []
    for weight_decay, grad_clip, lr, eps in [(0.01, 1.0, 1e-2, 1e-8), (0.0, None, 1e-3, 1e-8), (0.1, 0.5, 5e-7, 1e-6)]:
        params = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.999), eps=eps, weight_decay=weight_decay, foreach=False)
        steps = []
        for gradient in gradients:
            for p, g in zip(params, gradient):
                p.grad = g.clone()
            norm = torch.nn.utils.clip_grad_norm_(params, grad_clip if grad_clip else float("inf"), foreach=False)
            optimizer.step()
            steps.append({"norm": norm.item(), "params": [p.detach().flatten().tolist() for p in params]})
        state = [optimizer.state[p] for p in params]
        runs.append({
            "weight_decay": weight_decay, "grad_clip": grad_clip, "lr": lr, "eps": eps, "steps": [steps[0], steps[4], steps[9]],
            "exp_avg": [s["exp_avg"].flatten().tolist() for s in state],
            "exp_avg_sq": [s["exp_avg_sq"].flatten().tolist() for s in state],
        })
    return {
        "made_by": f"tests/oracle/make_loss_goldens.py, torch {torch.__version__}",
        "shapes": [list(p.shape) for p in start],
        "start": [p.flatten().tolist() for p in start],
        "gradients": [[g.flatten().tolist() for g in step] for step in gradients],
        "recorded_steps": [1, 5, 10],
        "runs": runs,
    }


def schedule_goldens():
    """transformers' factors at every optimizer step of short runs: entry t - 1 is the factor of step t."""
    from transformers import optimization

    runs = []
    for schedule, warmup, total, ratio in [
        ("constant", 0, 5, 0.0),
        ("constant", 3, 6, 0.0),
        ("linear", 0, 7, 0.0),
        ("linear", 3, 10, 0.0),
        ("cosine", 0, 9, 0.0),
        ("cosine", 4, 12, 0.0),
        ("cosine", 2, 11, 0.1),
    ]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        if schedule == "constant":
            scheduler = optimization.get_constant_schedule_with_warmup(optimizer, warmup)
        elif schedule == "linear":
            scheduler = optimization.get_linear_schedule_with_warmup(optimizer, warmup, total)
        elif ratio:
            scheduler = optimization.get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, total, min_lr_rate=ratio)
        else:
            scheduler = optimization.get_cosine_schedule_with_warmup(optimizer, warmup, total)
        factors = []
        for _ in range(total + 1):
            factors.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        runs.append({"schedule": schedule, "warmup": warmup, "total": total, "min_lr_ratio": ratio, "factors": factors})
    return {"made_by": f"tests/oracle/make_loss_goldens.py, transformers {transformers.__version__}", "runs": runs}


def rounded(value, digits):
    """Floats to so many significant digits: 9 for f32 values (exact), 10 for f64 results."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, list):
        return [rounded(v, digits) for v in value]
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    return value


def main():
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        loss = loss_goldens(directory)
    for name, goldens in [("policy_loss", loss), ("adamw", adamw_goldens()), ("lr_schedules", schedule_goldens())]:
        text = json.dumps(rounded(goldens, 10), separators=(",", ":"))
        (out / f"{name}.json").write_text(text.replace('{"loss_type"', '\n{"loss_type"').replace('{"weight_decay"', '\n{"weight_decay"').replace('{"schedule"', '\n{"schedule"') + "\n")


if __name__ == "__main__":
    main()
