// How an error of scale s enters a clean product y, z ~ N(0, 1). The definition is src/numerics/error_law.rs.
#pragma once

#include "portable.cuh"

// The values are the wire between src/ops/cuda/noise.rs, matmul.rs and the kernels.
enum ErrorLaw : uint32_t { kRelativeGaussian = 0, kAbsoluteGaussian = 1, kSystematicBias = 2, kNoError = 3 };

// z becomes y' of 16 elements.
TEMPER_DEVICE void apply_error_law(uint32_t law, float s, const float y[16], float z[16]) {
  if (law == kRelativeGaussian) {
#pragma unroll
    for (int j = 0; j < 16; ++j) z[j] = fmaf(magnitude(y[j]), s * z[j], y[j]);
  } else if (law == kAbsoluteGaussian) {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float noise = s * z[j];
      z[j] = y[j] + noise;
    }
  } else {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float sign = y[j] == 0.0f ? y[j] : with_sign_of(1.0f, y[j]);
      z[j] = y[j] + s * sign;
    }
  }
}
