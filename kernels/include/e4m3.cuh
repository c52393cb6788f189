// E4M3 (fn), the block scale of NVFP4: bias 7, 3 mantissa bits, largest 448, subnormals down to 2^-9.
// The definition is src/numerics/e4m3.rs; the tests also hold these functions against NVIDIA's cuda_fp8.h.
#pragma once

#include "portable.cuh"

constexpr float kE4m3Max = 448.0f;

// The byte of x >= 0 (a block scale has no sign): clamped to 448 first, then rounded to nearest even.
TEMPER_DEVICE uint32_t e4m3_encode(float x) {
  if (!(x == x)) return 0x7f;
  const float a = x < kE4m3Max ? x : kE4m3Max;
  // Below 2^-6 a multiple of 2^-9; 8 of them are the smallest normal, whose byte is 8 as well.
  if (a < 0.015625f) return uint32_t(rintf(a * 512.0f));
  const int exponent = int(bits_of(a) >> 23) - 127;
  // 8..16 eighths; a carry to 16 moves into the exponent field by plain addition.
  return uint32_t((exponent + 7) * 8 + int(rintf(a * power_of_two(3 - exponent))) - 8);
}

TEMPER_DEVICE float e4m3_decode(uint32_t byte) {
  if ((byte & 0x7f) == 0x7f) return not_a_number();
  const int exponent = (byte >> 3) & 15;
  return exponent == 0 ? float(byte & 7) * 0.001953125f : float(8 + (byte & 7)) * power_of_two(exponent - 10);
}
