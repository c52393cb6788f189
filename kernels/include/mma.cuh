// A warp's matrix instructions of sm_80, and copies from global to shared memory that do not wait, each behind one function
// with the same meaning on the host.
#pragma once

#include "dtype.cuh"

// An address in shared memory: 32 bits on the device.
#ifdef TEMPER_CUDA
using Shared = uint32_t;
TEMPER_DEVICE Shared shared_address(void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }
#else
using Shared = uint8_t*;
TEMPER_DEVICE Shared shared_address(void* pointer) { return static_cast<uint8_t*>(pointer); }
#endif

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8, which is 16 bytes. Each lane
// gets of matrix j the elements (l / 4, 2 (l % 4) + {0, 1}).
TEMPER_DEVICE void load_matrices(uint32_t r[4], Shared row) {
#ifdef TEMPER_CUDA
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
#else
  const int lane = threadIdx.x % kWarpSize;
  host::show(&row, sizeof row);
  for (int j = 0; j < 4; ++j) {
    const Shared from = *static_cast<const Shared*>(host::shown(8 * j + lane / 4));
    memcpy(&r[j], from + 4 * (lane % 4), 4);
  }
  host::seen();
#endif
}

// ... the elements (2 (l % 4) + {0, 1}, l / 4).
TEMPER_DEVICE void load_matrices_transposed(uint32_t r[4], Shared row) {
#ifdef TEMPER_CUDA
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
#else
  const int lane = threadIdx.x % kWarpSize;
  host::show(&row, sizeof row);
  for (int j = 0; j < 4; ++j) {
    uint16_t element[2];
    for (int i = 0; i < 2; ++i) {
      const Shared from = *static_cast<const Shared*>(host::shown(8 * j + 2 * (lane % 4) + i));
      memcpy(&element[i], from + 2 * (lane / 4), 2);
    }
    r[j] = uint32_t(element[1]) << 16 | element[0];
  }
  host::seen();
#endif
}

// An 8x8 matrix of 16-bit elements, transposed: lane l gives and gets the elements (l / 4, 2 (l % 4) + {0, 1}).
TEMPER_DEVICE uint32_t transposed_matrix(uint32_t pair) {
#ifdef TEMPER_CUDA
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
#else
  const int lane = threadIdx.x % kWarpSize;
  host::show(&pair, sizeof pair);
  uint32_t transposed = 0;
  for (int i = 0; i < 2; ++i) {
    const uint32_t of_row = *static_cast<const uint32_t*>(host::shown((lane % 4 * 2 + i) * 4 + lane / 8));
    transposed |= (of_row >> (16 * (lane / 4 % 2)) & 0xffff) << (16 * i);
  }
  host::seen();
  return transposed;
#endif
}

// d [16, 8] += a [16, 16] b [16, 8] with f32 sums. Lane l has d of rows l / 4 + {0, 8} and columns 2 (l % 4) + {0, 1}; a of
// those rows and of k = 2 (l % 4) + {0, 1} (+ 8 in a[2], a[3]); b of those k and of column l / 4.
#ifdef TEMPER_CUDA
#define TEMPER_MMA(T, name)                                                                                          \
  TEMPER_DEVICE void mma_16x8x16(const T*, float d[4], const uint32_t a[4], const uint32_t b[2]) {                   \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                              \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                              \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                \
  }
TEMPER_MMA(Bf16, "bf16")
TEMPER_MMA(F16, "f16")
#else
template <typename T>
void mma_16x8x16(const T*, float d[4], const uint32_t a[4], const uint32_t b[2]) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const int lane = threadIdx.x % kWarpSize;
  host::show(mine, sizeof mine);
  const auto half = [](int from_lane, int word, int k) {
    const uint32_t pair = static_cast<const uint32_t*>(host::shown(from_lane))[word];
    return widened(T{uint16_t(pair >> (16 * (k % 2)))});
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      d[i] += half(4 * row + k % 8 / 2, k / 8 * 2 + i / 2, k) * half(4 * column + k % 8 / 2, 4 + k / 8, k);
    }
  }
  host::seen();
}
#endif

// kBytes from global to shared memory (4, 8 or 16), or zeros where not `inside`; both addresses are aligned to as much.
template <int kBytes = 16>
TEMPER_DEVICE void copy_async(Shared to, const void* from, bool inside) {
#ifdef TEMPER_CUDA
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes),
                 "r"(inside ? kBytes : 0)
                 : "memory");
  }
#else
  host::copy_later(to, inside ? from : nullptr, kBytes);
#endif
}

// Closes a group of this thread's copies.
TEMPER_DEVICE void commit_copies() {
#ifdef TEMPER_CUDA
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  host::commit_copies();
#endif
}

// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
TEMPER_DEVICE void wait_copies() {
#ifdef TEMPER_CUDA
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  host::wait_copies(kPending);
#endif
}

TEMPER_DEVICE void store_shared(Shared to, const Vector4& value) {
#ifdef TEMPER_CUDA
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(value.w[0]), "r"(value.w[1]), "r"(value.w[2]),
               "r"(value.w[3])
               : "memory");
#else
  memcpy(to, &value, sizeof value);
#endif
}

TEMPER_DEVICE Vector4 load_shared(Shared from) {
  Vector4 value;
#ifdef TEMPER_CUDA
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.w[0]), "=r"(value.w[1]), "=r"(value.w[2]), "=r"(value.w[3])
               : "r"(from)
               : "memory");
#else
  memcpy(&value, from, sizeof value);
#endif
  return value;
}

// 16 bits.
TEMPER_DEVICE uint32_t load_shared_half(Shared from) {
  uint16_t value;
#ifdef TEMPER_CUDA
  asm volatile("ld.shared.b16 %0, [%1];" : "=h"(value) : "r"(from) : "memory");
#else
  memcpy(&value, from, sizeof value);
#endif
  return value;
}

// The products of two pairs of bf16, each rounded once.
TEMPER_DEVICE uint32_t multiply_pairs(uint32_t a, uint32_t b) {
#ifdef TEMPER_CUDA
  uint32_t product;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
  return product;
#else
  const auto half = [](uint32_t pair, int i) { return widened(Bf16{uint16_t(pair >> (16 * i))}); };
  return narrowed_pair(static_cast<const Bf16*>(nullptr), half(a, 0) * half(b, 0), half(a, 1) * half(b, 1));
#endif
}
