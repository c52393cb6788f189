// NVFP4, nearest and stochastic: blocks of 16 along a row, or square tiles. include/fake_quant.cuh has the body.

#include "fake_quant.cuh"

TEMPER_FAKE_QUANT_ROWS(fake_quant_nvfp4_f32, Nvfp4, float)
TEMPER_FAKE_QUANT_ROWS(fake_quant_nvfp4_bf16, Nvfp4, Bf16)
TEMPER_FAKE_QUANT_ROWS(fake_quant_nvfp4_f16, Nvfp4, F16)

TEMPER_FAKE_QUANT_TILES(fake_quant_nvfp4_2d_f32, Nvfp4, float)
TEMPER_FAKE_QUANT_TILES(fake_quant_nvfp4_2d_bf16, Nvfp4, Bf16)
TEMPER_FAKE_QUANT_TILES(fake_quant_nvfp4_2d_f16, Nvfp4, F16)
