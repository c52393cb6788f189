#!/usr/bin/env python3
"""What public libraries make of the matrices in a file (tests/oracle/quantizers.rs compares).

    python quantize.py IN.safetensors OUT.safetensors     (needs: torch, ml_dtypes, compressed-tensors, torchao)

IN holds matrices [rows, cols], f32 or bf16, cols a multiple of 32, and `codec`, the f32 values to encode one by one.
OUT holds for matrix M and rule R of a library: `M/R.elements` (the values of the codes), `M/R.scales` (the values of the
block scales) and `M/R.dq` (dequantized), all f32; `codec/R` for the element codecs. MX rules run in the matrix's own
dtype; fp8 and nvfp4 in f32, since the libraries compute their scales in the dtype they are given.
"""
import sys

import ml_dtypes
import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, unpack_uint4
from torchao.prototype.mx_formats.mx_tensor import get_fp_scale, to_dtype, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale
from torchao.quantization.quant_primitives import (
    _choose_scale_float8,
    _dequantize_affine_float8,
    _quantize_affine_float8,
)

E4M3, FP4 = torch.float8_e4m3fn, torch.float4_e2m1fn_x2
MODES = {"floor": ScaleCalculationMode.FLOOR, "even": ScaleCalculationMode.EVEN, "rceil": ScaleCalculationMode.RCEIL}


def fp4_values(packed):
    return f4_unpacked_to_f32(unpack_uint4(packed))


def torchao_mx(x, element, mode):
    scale, data = to_mx(x, element, 32, MODES[mode])
    dq = to_dtype(data, scale, element, 32, x.dtype)
    elements = fp4_values(data) if element == FP4 else data.float()
    return elements.reshape(x.shape), get_fp_scale(scale), dq


def torchao_nvfp4(x):
    tensor_scale = per_tensor_amax_to_scale(x.abs().max())
    scale, data = nvfp4_quantize(x, 16, tensor_scale)
    elements = fp4_values(data).reshape(x.shape)
    blocks = scale.float()
    return elements, blocks, elements * (blocks * tensor_scale).repeat_interleave(16, -1)


def torchao_fp8(x, block):
    scale = _choose_scale_float8(x, block)
    q = _quantize_affine_float8(x, scale, E4M3)
    return q.float(), scale, _dequantize_affine_float8(q, scale)


def compressed_tensors(x, group, tensor_scale=None, **args):
    args = QuantizationArgs(type="float", symmetric=True, **args)
    blocks = x.unflatten(-1, (-1, group)) if group else x.unsqueeze(-2)
    low, high = blocks.amin(-1), blocks.amax(-1)
    if args.strategy == "tensor":
        low, high = low.amin(), high.amax()
    scale, zero = calculate_qparams(low, high, args, global_scale=tensor_scale)
    q = quantize(x, scale, zero, args, global_scale=tensor_scale)
    return q, scale, dequantize(q, scale, zero, args, global_scale=tensor_scale)


def matrix_rules(x):
    for mode in MODES:
        yield f"torchao.mxfp4_{mode}", torchao_mx(x, FP4, mode)
        yield f"torchao.mxfp8_{mode}", torchao_mx(x, E4M3, mode)
    for bits in (4, 8):
        args = {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
        yield f"compressed_tensors.mxfp{bits}", compressed_tensors(x, 32, num_bits=bits, **args)
    x = x.float()
    yield "torchao.fp8_row", torchao_fp8(x, [1, x.shape[1]])
    yield "torchao.fp8_tensor", torchao_fp8(x, list(x.shape))
    yield "torchao.nvfp4", torchao_nvfp4(x)
    yield "compressed_tensors.fp8_row", compressed_tensors(x, None, num_bits=8, strategy="channel")
    yield "compressed_tensors.fp8_tensor", compressed_tensors(x, None, num_bits=8, strategy="tensor")
    g = generate_gparam(x.min(), x.max())
    args = {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": E4M3}
    yield "compressed_tensors.nvfp4", compressed_tensors(x, 16, tensor_scale=g, **args)


def codec_rules(x):
    finite = x.clamp(-448, 448)
    yield "ml_dtypes.e2m1", torch.from_numpy(x.numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32))
    yield "ml_dtypes.e4m3", torch.from_numpy(finite.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
    yield "torch.e4m3", finite.to(E4M3).float()
    bytes_ = np.arange(256, dtype=np.uint8)
    yield "ml_dtypes.e8m0_values", torch.from_numpy(bytes_.view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    yield "torch.e8m0_values", torch.from_numpy(bytes_).view(torch.float8_e8m0fnu).float()


def main(source, target):
    out = {}
    for name, x in load_file(source).items():
        if name == "codec":
            for rule, values in codec_rules(x):
                out[f"codec/{rule}"] = values.contiguous()
            continue
        for rule, (elements, scales, dq) in matrix_rules(x):
            for part, values in (("elements", elements), ("scales", scales), ("dq", dq)):
                out[f"{name}/{rule}.{part}"] = values.float().reshape(values.shape or (1,)).clone().contiguous()
    save_file(out, target)


if __name__ == "__main__":
    with torch.no_grad():
        main(*sys.argv[1:])
