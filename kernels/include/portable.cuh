// What lets one text be a CUDA kernel (nvcc) and a host function under kernels/host/shim.h (g++).
//
// Kernels use fixed-width integers, IEEE single precision and the functions below; NVIDIA's number headers are not
// used, so that the tests can hold them against these codecs as an oracle.
#pragma once

#include <stdint.h>

#ifndef TEMPER_CUDA
#include "shim.h"
#endif

#define TEMPER_DEVICE static __device__ __forceinline__

// The bits of a float as an integer, and back.
TEMPER_DEVICE uint32_t bits_of(float x) {
#ifdef TEMPER_CUDA
  return __float_as_uint(x);
#else
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
#endif
}

TEMPER_DEVICE float float_of(uint32_t u) {
#ifdef TEMPER_CUDA
  return __uint_as_float(u);
#else
  float x;
  memcpy(&x, &u, 4);
  return x;
#endif
}

constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr float kFloatMax = 3.40282346638528859811704183484516925440e+38f;

TEMPER_DEVICE bool is_finite(float x) { return (bits_of(x) & kInfinityBits) != kInfinityBits; }
TEMPER_DEVICE float magnitude(float x) { return float_of(bits_of(x) & 0x7fffffffu); }
TEMPER_DEVICE float not_a_number() { return float_of(0x7fc00000u); }

// 2^k for k in [-149, 127], subnormals included.
TEMPER_DEVICE float power_of_two(int k) {
  return k >= -126 ? float_of(uint32_t(k + 127) << 23) : float_of(1u << (k + 149));
}
