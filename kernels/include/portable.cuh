// What lets one text be a CUDA kernel (nvcc) and a host function under kernels/host/shim.h (g++).
//
// Kernels use fixed-width integers, IEEE single precision and the functions below; NVIDIA's number headers are not
// used, so that the tests can hold them against these codecs as an oracle. Where the hardware has an instruction of
// its own, it stands behind one function here, with the same meaning in plain C++ for the host.
#pragma once

#include <math.h>
#include <stdint.h>

#ifndef TEMPER_CUDA
#include "shim.h"
#endif

#define TEMPER_DEVICE static __device__ __forceinline__

// A kernel: one argument struct, passed by value, `threads` a block; `resident` blocks shall fit a multiprocessor's 65536
// registers. On the host the definition also enters the kernel, under its name, in the shim's list.
#ifdef TEMPER_CUDA
#define TEMPER_KERNEL_OF(name, Args, threads, resident) \
  extern "C" __global__ void __launch_bounds__(threads, resident) name(const __grid_constant__ Args args)
#define TEMPER_CLUSTER_KERNEL(name, Args, threads, blocks)                                          \
  extern "C" __global__ void __cluster_dims__(blocks, 1, 1) __launch_bounds__(threads, 1) name(const __grid_constant__ Args args)
#else
#define TEMPER_HOST_KERNEL(name, Args, blocks)                                                            \
  extern "C" void name(const Args& args);                                                                 \
  static const host::Entry name##_entry(#name, sizeof(Args), blocks, [](const void* args) { name(*(const Args*)args); }); \
  extern "C" void name(const Args& args)
#define TEMPER_KERNEL_OF(name, Args, threads, resident) TEMPER_HOST_KERNEL(name, Args, 1)
// In clusters of so many blocks.
#define TEMPER_CLUSTER_KERNEL(name, Args, threads, blocks) TEMPER_HOST_KERNEL(name, Args, blocks)
#endif
// With kBlockThreads threads.
#define TEMPER_KERNEL(name, Args, resident) TEMPER_KERNEL_OF(name, Args, kBlockThreads, resident)

// Shared memory whose size the launch gives.
#ifdef TEMPER_CUDA
#define TEMPER_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) uint8_t name[]
#else
#define TEMPER_DYNAMIC_SHARED(name) uint8_t* const name = host::dynamic_shared()
#endif

constexpr uint32_t kBlockThreads = 256;
constexpr uint32_t kWarpSize = 32;

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
constexpr uint32_t kSignBit = 0x80000000u;
constexpr float kFloatMax = 3.40282346638528859811704183484516925440e+38f;

TEMPER_DEVICE float magnitude(float x) { return fabsf(x); }
TEMPER_DEVICE float with_sign_of(float magnitude, float x) {
  return float_of(bits_of(magnitude) | (bits_of(x) & kSignBit));
}
TEMPER_DEVICE float not_a_number() { return float_of(0x7fc00000u); }
TEMPER_DEVICE float minus_infinity() { return float_of(kInfinityBits | kSignBit); }

// 2^k for k in [-149, 127], subnormals included.
TEMPER_DEVICE float power_of_two(int k) {
  return k >= -126 ? float_of(uint32_t(k + 127) << 23) : float_of(1u << (k + 149));
}

// The sum of a >= 0 and b > a, cut instead of rounded.
TEMPER_DEVICE float add_toward_zero(float a, float b) {
#ifdef TEMPER_CUDA
  return __fadd_rz(a, b);
#else
  // What a double does not hold of the sum lies more than 2^-52 below b's leading bit: the cut is the same.
  const double sum = double(a) + double(b);
  const float nearest = float(sum);
  return double(nearest) > sum ? float_of(bits_of(nearest) - 1) : nearest;
#endif
}

// Bytes chosen by the four low nibbles of `selector` from the eight bytes of (b, a): bits 0-2 choose, bit 3 asks for the
// chosen byte's sign bit in all eight places. PTX prmt.
TEMPER_DEVICE uint32_t choose_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef TEMPER_CUDA
  uint32_t chosen;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(chosen) : "r"(a), "r"(b), "r"(selector));
  return chosen;
#else
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t chosen = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i) & 15;
    const uint32_t byte = uint32_t(bytes >> (8 * (nibble & 7))) & 255;
    chosen |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
  }
  return chosen;
#endif
}

// sum + the products of four signed bytes of a with those of b. PTX dp4a.
TEMPER_DEVICE int dot_bytes(uint32_t a, uint32_t b, int sum) {
#ifdef TEMPER_CUDA
  return __dp4a(int(a), int(b), sum);
#else
  for (int i = 0; i < 4; ++i) sum += int(int8_t(a >> (8 * i))) * int(int8_t(b >> (8 * i)));
  return sum;
#endif
}

// The upper half of a product; the lower is a * b, and together they are one instruction.
TEMPER_DEVICE uint32_t high_product(uint32_t a, uint32_t b) {
#ifdef TEMPER_CUDA
  return __umulhi(a, b);
#else
  return uint32_t((uint64_t(a) * b) >> 32);
#endif
}

// Division by a number that the host prepared (src/ops/cuda/batch.rs): n / d for n < 2^31.
struct Divider {
  uint32_t multiplier, shift;  // multiplier 0 stands for d = 1

  __device__ uint32_t divide(uint32_t n) const { return multiplier == 0 ? n : high_product(n, multiplier) >> shift; }
};

// The index of the last of `count` tensors of a batch whose first tile is not after `tile`.
template <typename Tensor>
TEMPER_DEVICE uint32_t tensor_of_tile(const Tensor* tensors, uint32_t count, uint32_t tile) {
  uint32_t low = 0, high = count;  // the answer is in [low, high)
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    if (tensors[middle].first_tile <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}
