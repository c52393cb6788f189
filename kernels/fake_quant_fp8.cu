// E4M3 elements: MXFP8 (blocks of 32) and FP8 with a scale per row or per tensor. include/fake_quant.cuh has the body.

#include "fake_quant.cuh"

TEMPER_FAKE_QUANT_ROWS(fake_quant_mxfp8_f32, Mxfp8, float)
TEMPER_FAKE_QUANT_ROWS(fake_quant_mxfp8_bf16, Mxfp8, Bf16)
TEMPER_FAKE_QUANT_ROWS(fake_quant_mxfp8_f16, Mxfp8, F16)

TEMPER_FAKE_QUANT_ROWS(fake_quant_fp8_f32, Fp8, float)
TEMPER_FAKE_QUANT_ROWS(fake_quant_fp8_bf16, Fp8, Bf16)
TEMPER_FAKE_QUANT_ROWS(fake_quant_fp8_f16, Fp8, F16)
