// MXFP4, every rule and rounding: blocks of 32 along a row, or square tiles. include/fake_quant.cuh has the body.

#include "fake_quant.cuh"

TEMPER_FAKE_QUANT_ROWS(fake_quant_mxfp4_f32, Mxfp4, float)
TEMPER_FAKE_QUANT_ROWS(fake_quant_mxfp4_bf16, Mxfp4, Bf16)
TEMPER_FAKE_QUANT_ROWS(fake_quant_mxfp4_f16, Mxfp4, F16)

TEMPER_FAKE_QUANT_TILES(fake_quant_mxfp4_2d_f32, Mxfp4, float)
TEMPER_FAKE_QUANT_TILES(fake_quant_mxfp4_2d_bf16, Mxfp4, Bf16)
TEMPER_FAKE_QUANT_TILES(fake_quant_mxfp4_2d_f16, Mxfp4, F16)
