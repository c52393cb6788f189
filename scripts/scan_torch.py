#!/usr/bin/env python3
"""The weight scan of `temper scan MODEL --json` as torch operations: the same metrics of every linear weight, and the time.

    temper scan MODEL --format mxfp4,nvfp4 --json > temper.json
    scripts/scan_torch.py MODEL --beside temper.json       # means side by side, and the time of both on this machine

  --format F     mxfp4, nvfp4 (default both)
  --beside FILE  temper's own result
  --temper T     the binary, to be timed in the same run

Needs torch and safetensors; .venv/bin/python has them.
"""

import argparse
import json
import pathlib
import subprocess
import time

import torch
from safetensors import safe_open

from bench_torch import mxfp4, nvfp4

QUANTIZERS = {"mxfp4": mxfp4, "nvfp4": nvfp4}


def metrics(x, q):
    x, q = x.double(), q.double()
    e = q - x
    return {
        "sqnr_db": (10 * torch.log10((x * x).sum() / (e * e).sum())).item(),
        "mse": (e * e).mean().item(),
        "relative_error": (e.abs() / (x.abs() + 1e-10)).mean().item(),
        "cosine": ((x * q).sum() / (x.norm() * q.norm())).item(),
        "max_abs_error": e.abs().max().item(),
        "deadzone_ratio": (((x != 0) & (q == 0)).sum() / (x != 0).sum()).item(),
    }


def scan(directory, formats):
    found = {name: [] for name in formats}
    for path in sorted(pathlib.Path(directory).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if not name.endswith("proj.weight"):
                    continue
                x = file.get_tensor(name)
                for format in formats:
                    found[format].append(metrics(x, QUANTIZERS[format](x)))
    return {f: {m: sum(t[m] for t in found[f]) / len(found[f]) for m in found[f][0]} for f in formats}


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("model")
    parser.add_argument("--format", default="mxfp4,nvfp4")
    parser.add_argument("--beside")
    parser.add_argument("--temper")
    args = parser.parse_args()
    formats = args.format.split(",")
    begin = time.perf_counter()
    means = scan(args.model, formats)
    seconds = time.perf_counter() - begin
    ours = None
    if args.temper:
        begin = time.perf_counter()
        text = subprocess.run([args.temper, "scan", args.model, "--format", args.format, "--json", "-q"],
                              check=True, capture_output=True).stdout
        print(f"torch {seconds:.2f} s, temper {time.perf_counter() - begin:.2f} s, {torch.get_num_threads()} threads")
        ours = json.loads(text)
    else:
        print(f"torch {seconds:.2f} s, {torch.get_num_threads()} threads")
    if args.beside:
        ours = json.loads(pathlib.Path(args.beside).read_text())
    for format in formats:
        summary = next((f["mean"] for f in ours["formats"] if f["format"] == format), {}) if ours else {}
        for metric, value in means[format].items():
            print(f"{format:8} {metric:16} torch {value:<12.6g} temper {summary.get(metric, float('nan')):<12.6g}")


if __name__ == "__main__":
    main()
