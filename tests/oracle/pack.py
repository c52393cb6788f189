#!/usr/bin/env python3
"""Checkpoints that compressed-tensors packs, and what it reads from packed checkpoints (tests/oracle/packed.rs compares).

    python pack.py make OUT                   (needs: torch, transformers >= 5, safetensors, compressed-tensors)
    python pack.py read DIR OUT.safetensors [DIR OUT.safetensors]...

`make` writes OUT/<dtype> (random weights, with zero blocks and an outlier) and, packed by the library's own compressor
with its own scales, OUT/<dtype>.<scheme>; q/k/v and gate/up share the smallest weight_global_scale, as llm-compressor
sets them. `read` writes every weight as the library's decompressor gives it, and under `f32.` as its dequantize gives it
in f32; then the directory is loaded by transformers and run, in bfloat16 since that is what the decompressor makes of every weight: `logprobs` of IDS, and under
`transformers.` the weights that the model holds after its forward pass.
"""
import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.compressors.nvfp4 import unpack_fp4_from_uint8
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

IDS = [1, 5, 9, 23, 77]
SCHEMES = {"nvfp4": "NVFP4A16", "mxfp4": "MXFP4A16"}
FUSED = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]


def make(out):
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        model = random_model(dtype)
        model.save_pretrained(out / name)
        for scheme, preset in SCHEMES.items():
            packed = Qwen2ForCausalLM.from_pretrained(out / name, dtype=dtype)
            pack(packed, preset, out / f"{name}.{scheme}")


def random_model(dtype):
    generator = torch.Generator().manual_seed(7)
    config = Qwen2Config(
        vocab_size=131, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.02 if p.ndim == 2 else 0.3))
            if name.endswith("norm.weight"):
                p.add_(1)
            if name.endswith("o_proj.weight"):
                p[3] = 0  # zero blocks
                p[5, :32] *= 1e-6  # blocks whose scale is lost under the outlier
                p[7, 9] = 30.0
    return model.to(dtype)


def pack(model, preset, directory):
    scheme = preset_name_to_scheme(preset, ["Linear"])
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    args = scheme.weights
    linears = {n: m for n, m in model.named_modules() if isinstance(getattr(m, "quantization_scheme", None), QuantizationScheme)}
    if hasattr(next(iter(linears.values())), "weight_global_scale"):
        own = {n: generate_gparam(m.weight.min(), m.weight.max()) for n, m in linears.items()}
        for name, module in linears.items():
            parent, _, projection = name.rpartition(".")
            group = next((g for g in FUSED if projection in g), (projection,))
            module.weight_global_scale.data.copy_(torch.stack([own[f"{parent}.{p}"] for p in group]).min(0).values)
    for module in linears.values():
        blocks = module.weight.unflatten(-1, (-1, args.group_size))
        g = getattr(module, "weight_global_scale", None)
        scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=g)
        module.weight_scale.data = scale.to(module.weight_scale.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(directory)


def read(directory, target):
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    stored = {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}
    out = {}
    for name in [n.removesuffix("_packed") for n in stored if n.endswith(".weight_packed")]:
        parts = {p: stored[f"{name}_{p}"] for p in ("packed", "scale", "global_scale") if f"{name}_{p}" in stored}
        state = compressor.decompress({f"weight_{p}": tensor for p, tensor in parts.items()}, scheme)
        out[name] = state["weight"].contiguous()
        values = unpack_fp4_from_uint8(parts["packed"], *state["weight"].shape, dtype=torch.float32)
        scale = compressor._decompress_scale(parts["scale"], torch.float32)
        exact = dequantize(values, scale, args=scheme.weights, global_scale=parts.get("global_scale"), dtype=torch.float32)
        out[f"f32.{name}"] = exact.contiguous()
    # In float32 the library itself fails in its first product: its decompressed weights are bfloat16.
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    ids = torch.tensor([IDS])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].float()
    held = dict(model.named_parameters())
    out |= {f"transformers.{name}": held[name].detach().contiguous() for name in list(out) if name in held}
    out["logprobs"] = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].contiguous()
    save_file(out, target)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        for directory, target in zip(sys.argv[2::2], sys.argv[3::2]):
            read(Path(directory), target)
