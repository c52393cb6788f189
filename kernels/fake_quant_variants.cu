// Variants of NVFP4: nvfp4:4over6, which weighs two scales a block, and nvfp4_single_level, which reproduces the replaced
// system. include/fake_quant.cuh has the body.

#include "fake_quant.cuh"

TEMPER_FAKE_QUANT_ROWS(fake_quant_nvfp4_4over6_f32, Nvfp4FourOverSix, float)
TEMPER_FAKE_QUANT_ROWS(fake_quant_nvfp4_4over6_bf16, Nvfp4FourOverSix, Bf16)
TEMPER_FAKE_QUANT_ROWS(fake_quant_nvfp4_4over6_f16, Nvfp4FourOverSix, F16)

TEMPER_FAKE_QUANT_ROWS(fake_quant_nvfp4_single_level_f32, Nvfp4SingleLevel, float)
TEMPER_FAKE_QUANT_ROWS(fake_quant_nvfp4_single_level_bf16, Nvfp4SingleLevel, Bf16)
TEMPER_FAKE_QUANT_ROWS(fake_quant_nvfp4_single_level_f16, Nvfp4SingleLevel, F16)
