#!/usr/bin/env python3
"""Loads model directories that temper wrote in transformers and prints the log-probs of ids.

    python check_loads.py DIR 1,2,3 [DIR 4,5,6]...      prints [{"dtype", "logprobs"}, ...], computed in f32

Fails where a tensor is missing, unexpected or of another shape, or where the tensors' dtype is not the one
that config.json names.
"""
import json
import sys
from pathlib import Path

from safetensors import safe_open

from make_models import load, logprobs


def main():
    pairs = zip(sys.argv[1::2], sys.argv[2::2])
    print(json.dumps([check(Path(directory), [int(i) for i in ids.split(",")]) for directory, ids in pairs]))


def check(directory, ids):
    config = json.loads((directory / "config.json").read_text())
    declared = config.get("dtype") or config["torch_dtype"]
    stored = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            stored |= {str(tensors.get_tensor(name).dtype).removeprefix("torch.") for name in tensors.keys()}
    assert stored == {declared}, f"{directory}: config.json says {declared}, the tensors are {sorted(stored)}"
    return {"dtype": declared, "logprobs": logprobs(load(directory), ids).tolist()}


if __name__ == "__main__":
    main()
