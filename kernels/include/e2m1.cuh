// E2M1, the 4-bit float of MXFP4 and NVFP4: code = sign << 3 | index into {0, .5, 1, 1.5, 2, 3, 4, 6}.
// The definition is src/numerics/e2m1.rs; the tests also hold these functions against NVIDIA's cuda_fp4.h.
#pragma once

#include "grid.cuh"

// The index of a value of the grid, by its bits: from 1 on they count halves of binades.
TEMPER_DEVICE uint32_t e2m1_index(float value) {
  return value >= 1.0f ? (bits_of(value) >> 22) - 0xfc : value != 0.0f;
}

// Round to nearest; ties to the even index. Above 6 gives 6, NaN gives +6.
TEMPER_DEVICE uint32_t e2m1_encode(float x) {
  if (!(x == x)) return 7;
  return (bits_of(x) >> 31) << 3 | e2m1_index(round_nearest_even<E2m1Grid>(fminf(magnitude(x), E2m1Grid::kMax)));
}

TEMPER_DEVICE float e2m1_decode(uint32_t code) {
  // Twice the magnitudes, a nibble each: 0 1 2 3 4 6 8 12.
  const float value = float((0xc8643210u >> (4 * (code & 7))) & 15) * 0.5f;
  return code & 8 ? -value : value;
}
