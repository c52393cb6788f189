// The stream on which torch is working now: temper_current_cuda_stream(device) -> cudaStream_t.
//
// Kernels must be launched there and nowhere else: a stream of our own would race with torch's, and the null stream
// cannot be captured into a CUDA graph. On a CPU-only torch the answer is null, and nothing calls it.

#ifdef TEMPER_TORCH_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

extern "C" void* temper_current_cuda_stream(int device) {
#ifdef TEMPER_TORCH_CUDA
  try {
    return c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device)).stream();
  } catch (...) {
    return nullptr;  // no such device: the launch that follows reports it
  }
#else
  (void)device;
  return nullptr;
#endif
}
