// Reductions over a warp and over a block of kBlockThreads.
#pragma once

#include "portable.cuh"

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr uint32_t kWarps = kBlockThreads / kWarpSize;

// The maximum over the lanes whose numbers differ in the bits first, 2 first, ... below `end` alone, in every lane.
TEMPER_DEVICE uint32_t group_max(uint32_t value, uint32_t first, uint32_t end) {
#pragma unroll
  for (uint32_t mask = first; mask < end; mask *= 2) {
    const uint32_t other = __shfl_xor_sync(kFullWarp, value, int(mask));
    value = other > value ? other : value;
  }
  return value;
}

TEMPER_DEVICE uint32_t warp_max(uint32_t value) { return __reduce_max_sync(kFullWarp, value); }

template <typename T>
TEMPER_DEVICE T warp_sum(T value) {
#pragma unroll
  for (uint32_t delta = kWarpSize / 2; delta > 0; delta /= 2) value += __shfl_down_sync(kFullWarp, value, delta);
  return value;  // complete in lane 0
}

// Adds the sums of several values over a block of kWarps_ warps to to[kCount], in one instruction: additions to one place come one
// after the other, however many blocks ask. scratch [kWarps_ kCount] is shared memory of nobody else's; every thread must call.
template <uint32_t kWarps_, uint32_t kCount>
TEMPER_DEVICE void add_block_sums(const double (&values)[kCount], double* scratch, double* to) {
  const uint32_t lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (uint32_t s = 0; s < kCount; ++s) {
    const double of_warp = warp_sum(values[s]);
    if (lane == 0) scratch[warp * kCount + s] = of_warp;
  }
  __syncthreads();
  if (threadIdx.x >= kCount) return;
  double total = scratch[threadIdx.x];
#pragma unroll
  for (uint32_t w = 1; w < kWarps_; ++w) total += scratch[w * kCount + threadIdx.x];
  atomicAdd(&to[threadIdx.x], total);
}

// The sums over the warp, in every lane; a butterfly, so that all lanes have the same bits.
template <typename T>
TEMPER_DEVICE T warp_total(T value) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(kFullWarp, value, mask);
  return value;
}

// The sums over a block of several values at once, in every thread, in an order that depends on nothing. scratch is shared
// memory; every thread must call.
template <int kCount>
TEMPER_DEVICE void block_totals(float (&values)[kCount], float (*scratch)[kWarps]) {
#pragma unroll
  for (int v = 0; v < kCount; ++v) values[v] = warp_total(values[v]);
  __syncthreads();  // an earlier sum's readers are done with scratch
  if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
    for (int v = 0; v < kCount; ++v) scratch[v][threadIdx.x / kWarpSize] = values[v];
  }
  __syncthreads();
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    values[v] = scratch[v][0];
#pragma unroll
    for (uint32_t warp = 1; warp < kWarps; ++warp) values[v] += scratch[v][warp];
  }
}
