// Reductions over a warp and over a block.
#pragma once

#include "portable.cuh"

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr uint32_t kWarpSize = 32;

// The maximum over groups of `width` neighbouring lanes (a power of two), in every lane.
TEMPER_DEVICE uint32_t group_max(uint32_t value, uint32_t width) {
  for (uint32_t mask = width / 2; mask > 0; mask /= 2) {
    const uint32_t other = __shfl_xor_sync(kFullWarp, value, int(mask));
    value = other > value ? other : value;
  }
  return value;
}

template <typename T>
TEMPER_DEVICE T warp_sum(T value) {
  for (uint32_t delta = kWarpSize / 2; delta > 0; delta /= 2) value += __shfl_down_sync(kFullWarp, value, delta);
  return value;  // complete in lane 0
}

// The sum over a block, complete in thread 0. scratch [32] is shared memory; every thread must call.
TEMPER_DEVICE double block_sum(double value, double* scratch) {
  const uint32_t lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  value = warp_sum(value);
  __syncthreads();  // an earlier sum's readers are done with scratch
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  value = warp == 0 && lane < blockDim.x / kWarpSize ? scratch[lane] : 0.0;
  return warp == 0 ? warp_sum(value) : 0.0;
}
