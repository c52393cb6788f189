// Device memory that torch's caching allocator has given out: the most since the last reset, in bytes. -1 where torch has
// no CUDA or has not used the device.

#include <cstdint>

#ifdef TEMPER_TORCH_CUDA
#include <c10/cuda/CUDACachingAllocator.h>
#endif

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
