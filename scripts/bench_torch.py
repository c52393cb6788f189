#!/usr/bin/env python3
"""What a PyTorch user would run instead: fake quantization, noise and noisy linears as torch operations, eager and
torch.compile; and a decoding step's clean linears in a CUDA graph.

    temper bench kernels --device cuda --json > temper.json
    scripts/bench_torch.py --beside temper.json          # a table side by side; run both on the same machine

  --device D     cuda (default) or cpu
  --shapes S     rows x cols, comma-separated (default: those that temper times in bf16)
  --linears L    tokens x out x in of noisy linears, comma-separated
  --json         one object a row, instead of the table
  --beside FILE  temper's own result, joined by operation and shape

Times are medians over rounds on rotating buffers that together exceed the L2 cache, by CUDA events (cpu: the clock).
Needs torch 2.11 with triton; .venv/bin/python has it.
"""

import argparse
import json
import statistics
import sys
import time

import torch

SHAPES = "8960x1536,1536x8960,18944x3584,65536x8192"
PRODUCTS = "4096x8960,16384x8960"
LINEARS = "4096x1536x1536,4096x8960x1536,4096x1536x8960,4096x18944x3584,4096x3584x18944"
# A layer's linears [out, in] as decoding runs them: qkv, o, gate and up, down.
LAYERS = {"Qwen2.5-1.5B": [(2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960)],
          "Qwen2.5-7B": [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)]}
DECODE_TOKENS = [1, 8, 64]
ROTATED_BYTES = 256 << 20
WINDOW_US = 1000


def to_e2m1(a, stochastic=False):
    """A magnitude, at most 6, to the E2M1 grid: ties to even, or up with the probability of the fraction."""
    step = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0))
    steps = a / step
    steps = torch.floor(steps + torch.rand_like(steps)) if stochastic else torch.round(steps)
    return (steps * step).clamp(max=6.0)


def mx_scale(amax, largest_exponent):
    """2^k, k = exponent(amax) - largest_exponent, from the bits."""
    biased = (amax.view(torch.int32) >> 23) - largest_exponent
    return (biased.clamp(min=1) << 23).view(torch.float32)


def mxfp4(x, stochastic=False):
    blocks = x.float().view(-1, 32)
    amax = blocks.abs().amax(-1, keepdim=True)
    scale = mx_scale(amax, 2)
    if stochastic:  # rceil: nothing may clip
        scale = torch.where(amax > 6 * scale, 2 * scale, scale)
    a = (blocks / scale).abs().clamp(max=6.0)
    return (torch.copysign(to_e2m1(a, stochastic), blocks) * scale).view_as(x).to(x.dtype)


def mxfp4_sr(x):
    return mxfp4(x, stochastic=True)


def mxfp8(x):
    blocks = x.float().view(-1, 32)
    scale = mx_scale(blocks.abs().amax(-1, keepdim=True), 8)
    q = (blocks / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return (q * scale).view_as(x).to(x.dtype)


def nvfp4(x):
    blocks = x.float().view(-1, 16)
    amax = blocks.abs().amax(-1, keepdim=True)
    g = 2688.0 / amax.amax()
    scale = (amax * (g / 6)).clamp(max=448.0).to(torch.float8_e4m3fn).float()
    decode = scale / g
    a = (blocks / decode).abs().clamp(max=6.0).nan_to_num()
    return (torch.copysign(to_e2m1(a), blocks) * decode).view_as(x).to(x.dtype)


def noise(y):
    """The replaced system's: four roundings in bf16."""
    return y + torch.randn_like(y) * y.abs() * 0.05


def noisy_linear(operands):
    x, w = operands
    return noise(x @ w.t())


QUANTIZERS = {"fake_quant mxfp4": mxfp4, "fake_quant mxfp4:sr": mxfp4_sr, "fake_quant mxfp8": mxfp8,
              "fake_quant nvfp4": nvfp4}


def time_us(run, inputs, device, rounds=30):
    """Median microseconds of run(x) over inputs in turns; on cuda several calls to a pair of events, so that what stands
    between them is the device's time and not that of the first launch after a wait."""

    def window(first, calls):
        if device != "cuda":
            begin = time.perf_counter()
            for i in range(calls):
                run(inputs[(first + i) % len(inputs)])
            return 1e6 * (time.perf_counter() - begin) / calls
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for i in range(calls):
            run(inputs[(first + i) % len(inputs)])
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end) / calls

    window(0, 3)
    calls = min(100, max(1, round(WINDOW_US / window(0, 1)))) if device == "cuda" else 1
    return statistics.median(window(i * calls, calls) for i in range(rounds))


def turns(elements, device):
    """How many buffers of bf16 exceed the caches."""
    return max(2, -(-ROTATED_BYTES // (2 * elements))) if device == "cuda" else 2


def matrix(shape, device):
    return (torch.randn(shape, device=device) * 0.02).bfloat16()


def measure(name, function, shape, device):
    if name.startswith("linear"):
        tokens, out, inner = shape
        count = turns(tokens * inner + out * inner + tokens * out, device)
        inputs = [(matrix((tokens, inner), device), matrix((out, inner), device)) for _ in range(count)]
    else:
        inputs = [matrix(shape, device) for _ in range(turns(shape[0] * shape[1], device))]
    torch._dynamo.reset()  # else the second shape would compile for any
    compiled = torch.compile(function, dynamic=False)
    if "sr" not in name and "nois" not in name:
        same = torch.equal(function(inputs[0]), compiled(inputs[0]))
        if not same:
            print(f"note: {name}: torch.compile gives other values than eager", file=sys.stderr)
    return {"name": name, "shape": list(shape), "eager_us": time_us(function, inputs, device),
            "compile_us": time_us(compiled, inputs, device)}


def measure_decoded_layer(model, shapes, tokens, device):
    """cuBLAS in a graph: what packed weights have to beat. Layers take turns, so that no weight is in the cache."""
    count = turns(sum(out * inner for out, inner in shapes), device)
    layers = [[(matrix((tokens, inner), device), matrix((out, inner), device)) for out, inner in shapes]
              for _ in range(count)]
    run = lambda layer: [x @ w.t() for x, w in layer]
    eager_us, graphs = time_us(run, layers, device), []
    if device == "cuda":
        for layer in layers:
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1]):
                run(layer)
    graph_us = time_us(lambda graph: graph.replay(), graphs, device) if graphs else None
    return {"name": f"layer of {model}, decoding, clean", "shape": [tokens], "eager_us": eager_us, "graph_us": graph_us}


def shapes_of(text):
    return [tuple(int(n) for n in shape.split("x")) for shape in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shapes", type=shapes_of, default=shapes_of(SHAPES))
    parser.add_argument("--products", type=shapes_of, default=shapes_of(PRODUCTS))
    parser.add_argument("--linears", type=shapes_of, default=shapes_of(LINEARS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--beside", type=argparse.FileType())
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda: torch sees no GPU; expected --device cpu")
    torch.manual_seed(0)
    rows = []
    with torch.no_grad():
        for shape in args.shapes:
            rows += [measure(name, f, shape, args.device) for name, f in QUANTIZERS.items()]
        rows += [measure("noise", noise, shape, args.device) for shape in args.products]
        rows += [measure("linear forward, noisy", noisy_linear, shape, args.device) for shape in args.linears]
        layers = [(model, shapes, n) for model, shapes in LAYERS.items() for n in DECODE_TOKENS]
        if args.device == "cuda":
            rows += [measure_decoded_layer(model, shapes, n, args.device) for model, shapes, n in layers]
    ours = {}
    if args.beside:
        for row in json.load(args.beside)["rows"]:
            if row["dtype"].endswith("bf16"):
                ours[row["name"], tuple(row["shape"])] = row["median_us"]
    for row in rows:
        row["temper_us"] = ours.get((row["name"], tuple(row["shape"])))
    if args.json:
        name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        print(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}))
        return
    print("| operation, bf16 | shape | temper, us | eager, us | torch.compile, us | graph, us | eager / temper "
          "| compile / temper |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        own = row["temper_us"]
        us = lambda time: f"{time:.1f}" if time else ""
        ratio = lambda time: f"{time / own:.1f}" if time and own else ""
        shape = " x ".join(map(str, row["shape"]))
        compiled, graph = row.get("compile_us"), row.get("graph_us")
        print(f"| {row['name']} | {shape} | {us(own)} | {us(row['eager_us'])} | {us(compiled)} | {us(graph)} "
              f"| {ratio(row['eager_us'])} | {ratio(compiled)} |")


if __name__ == "__main__":
    main()
