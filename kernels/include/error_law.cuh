// How an error of scale s enters a clean product y, z ~ N(0, 1). The definition is src/numerics/error_law.rs.
#pragma once

#include "portable.cuh"

// The values are the wire between src/ops/cuda/matmul_error.rs and the kernels.
enum ErrorLaw : uint32_t { kRelativeGaussian = 0, kAbsoluteGaussian = 1, kSystematicBias = 2 };

TEMPER_DEVICE float apply_error_law(uint32_t law, float y, float s, float z) {
  if (law == kSystematicBias) {
    const float sign = y == 0.0f ? y : float_of((bits_of(y) & 0x80000000u) | 0x3f800000u);
    return y + s * sign;
  }
  const float noise = s * z;
  return law == kRelativeGaussian ? fmaf(magnitude(y), noise, y) : y + noise;
}
