// f32 and bf16 in memory: every read is exact into f32, every write rounds to nearest even.
#pragma once

#include "portable.cuh"

struct Bf16 {
  uint16_t bits;
};

TEMPER_DEVICE float load(const float* x, uint64_t at) { return x[at]; }
TEMPER_DEVICE float load(const Bf16* x, uint64_t at) { return float_of(uint32_t(x[at].bits) << 16); }

TEMPER_DEVICE Bf16 to_bf16(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > kInfinityBits) return Bf16{uint16_t((u >> 16) | 0x40)};  // NaN stays NaN
  return Bf16{uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}

// Rounds to the dtype and stores; returns the value a reader of the output will see.
TEMPER_DEVICE float store(float* out, uint64_t at, float x) { return out[at] = x; }
TEMPER_DEVICE float store(Bf16* out, uint64_t at, float x) {
  out[at] = to_bf16(x);
  return load(out, at);
}

// The value after rounding to the dtype of `out`, without storing.
TEMPER_DEVICE float rounded_as(const float*, float x) { return x; }
TEMPER_DEVICE float rounded_as(const Bf16*, float x) { return float_of(uint32_t(to_bf16(x).bits) << 16); }
