// E4M3 (fn), the element of MXFP8 and FP8 and the block scale of NVFP4: bias 7, 3 mantissa bits, largest 448, subnormals
// down to 2^-9. The definition is src/numerics/e4m3.rs; the tests also hold these functions against NVIDIA's cuda_fp8.h.
#pragma once

#include "grid.cuh"

constexpr uint32_t kE4m3Nan = 0x7f;

// The low seven bits of a value of the grid.
TEMPER_DEVICE uint32_t e4m3_index(float value) {
  // Below 2^-6 a multiple of 2^-9, which is what lies in the last places of 2^14 + value.
  return value < 0.015625f ? bits_of(value + 16384.0f) & 7 : (bits_of(value) >> 20) - (120 << 3);
}

// The byte of x, clamped to +-448 first, then rounded to nearest even.
TEMPER_DEVICE uint32_t e4m3_encode(float x) {
  if (!(x == x)) return kE4m3Nan;
  return (bits_of(x) >> 31) << 7 | e4m3_index(round_nearest_even<E4m3Grid>(fminf(magnitude(x), E4m3Grid::kMax)));
}

// Exponent and mantissa lie in an f32's as they are; what is left is the difference of the biases.
TEMPER_DEVICE float e4m3_decode(uint32_t byte) {
  if ((byte & 0x7f) == kE4m3Nan) return not_a_number();
  return float_of((byte & 0x80) << 24 | (byte & 0x7f) << 20) * power_of_two(120);
}
