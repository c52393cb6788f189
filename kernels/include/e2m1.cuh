// E2M1, the 4-bit float of MXFP4 and NVFP4: code = sign << 3 | index into {0, .5, 1, 1.5, 2, 3, 4, 6}.
// The definition is src/numerics/e2m1.rs; the tests also hold these functions against NVIDIA's cuda_fp4.h.
#pragma once

#include "portable.cuh"

constexpr float kE2m1Max = 6.0f;

// Round to nearest; ties to the even index. Above 6 gives 6, NaN gives +6.
TEMPER_DEVICE uint32_t e2m1_encode(float x) {
  const float a = magnitude(x);
  if (!(a == a)) return 7;
  // Midpoints of neighbours: inclusive exactly where the lower index is odd.
  const uint32_t index = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5.0f);
  return (bits_of(x) >> 31) << 3 | index;
}

// Every tie toward zero: the rounding of nvfp4_single_level only (src/numerics/original.rs).
TEMPER_DEVICE uint32_t e2m1_encode_ties_toward_zero(float x) {
  const float a = magnitude(x);
  const uint32_t index = (a > 0.25f) + (a > 0.75f) + (a > 1.25f) + (a > 1.75f) + (a > 2.5f) + (a > 3.5f) + (a > 5.0f);
  return (bits_of(x) >> 31) << 3 | index;
}

TEMPER_DEVICE float e2m1_decode(uint32_t code) {
  // Twice the magnitudes, a nibble each: 0 1 2 3 4 6 8 12.
  const float value = float((0xc8643210u >> (4 * (code & 7))) & 15) * 0.5f;
  return code & 8 ? -value : value;
}
