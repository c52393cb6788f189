#!/usr/bin/env python3
"""Adapters in PEFT.

    python adapters.py make (BASE DIR q_proj,v_proj)...   random adapters (rank 3, alpha 5), B not zero, saved as PEFT saves them
    python adapters.py score (BASE DIR 1,2,3)...          prints [{"base", "adapted", "merged", "automatic"}]: log-probs, in f32
"""
import json
import sys
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model

from make_models import load, logprobs


def main():
    mode, *rest = sys.argv[1:]
    triples = zip(rest[0::3], rest[1::3], rest[2::3])
    if mode == "make":
        torch.manual_seed(3)
        for base, directory, targets in triples:
            make(base, directory, targets.split(","))
    else:
        print(json.dumps([score(base, directory, [int(i) for i in ids.split(",")]) for base, directory, ids in triples]))


def make(base, directory, targets):
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(load(Path(base)), config).save_pretrained(directory)


def score(base, directory, ids):
    model = load(Path(base))
    result = {"base": logprobs(model, ids).tolist()}
    adapted = PeftModel.from_pretrained(model, directory)
    result["adapted"] = logprobs(adapted, ids).tolist()
    result["merged"] = logprobs(adapted.merge_and_unload(), ids).tolist()
    # Finds the base by the name in adapter_config.json.
    automatic = AutoPeftModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    result["automatic"] = logprobs(automatic.eval(), ids).tolist()
    return result


if __name__ == "__main__":
    main()
