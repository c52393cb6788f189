// What torch gives out as memory: how much of a device's, and what lies in it.

#include <ATen/Context.h>

#include <cstdint>

#ifdef TEMPER_TORCH_CUDA
#include <c10/cuda/CUDACachingAllocator.h>
#endif

// The most since the last reset, in bytes. -1 where torch has no CUDA or has not used the device.
extern "C" int64_t temper_peak_cuda_bytes(int device) {
#ifdef TEMPER_TORCH_CUDA
  try {
    const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(static_cast<c10::DeviceIndex>(device));
    return stats.allocated_bytes[0].peak;  // of all pools together
  } catch (...) {
    return -1;
  }
#else
  (void)device;
  return -1;
#endif
}

extern "C" void temper_reset_peak_cuda_bytes(int device) {
#ifdef TEMPER_TORCH_CUDA
  try {
    c10::cuda::CUDACachingAllocator::resetPeakStats(static_cast<c10::DeviceIndex>(device));
  } catch (...) {
    // Nothing was allocated there yet: there is no peak to forget.
  }
#else
  (void)device;
#endif
}

// On: every new tensor begins as NaN, or the largest integer. torch has this as a part of its deterministic mode, whose
// complaints about operations of another kind are warnings here.
extern "C" void temper_fill_new_tensors(bool on) {
  at::globalContext().setDeterministicFillUninitializedMemory(true);
  at::globalContext().setDeterministicAlgorithms(on, /*warn_only=*/true);
}
