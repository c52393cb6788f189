// Everything that a piece of work launches, torch's operators and our kernels alike, as one CUDA graph.

#include <cstdint>
#include <cstring>
#include <exception>

#ifdef TEMPER_TORCH_CUDA
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/core/StreamGuard.h>
#endif

typedef int (*temper_work_fn)(void* payload);  // not 0: it failed

#ifdef TEMPER_TORCH_CUDA
// What torch leaves undone where CUDA has broken a capture off: capture_end throws before it tells the allocators, which then
// would take the memory of everything that follows for the graph's, and free none when memory runs out.
static void forget_capture(c10::DeviceIndex device, at::cuda::MempoolId_t pool) {
  const auto try_to = [](auto&& step) {
    try {
      step();
    } catch (...) {  // it was not that far
    }
  };
  try_to([&] { c10::cuda::CUDACachingAllocator::endAllocateToPool(device, pool); });
  try_to([&] { c10::cuda::CUDACachingAllocator::releasePool(device, pool); });
  try_to([&] { at::getHostAllocator(at::kCUDA)->end_allocate_to_pool(pool); });
  try_to([&] { at::getHostAllocator(at::kCUDA)->release_pool(pool); });
}
#endif

extern "C" {

// Null with *error null: `work` failed, and keeps why. Null with *error set: a text that the caller frees with free().
void* temper_graph_capture(int device, temper_work_fn work, void* payload, char** error) {
  *error = nullptr;
#ifdef TEMPER_TORCH_CUDA
  try {
    // Never freed where the capture fails: torch keeps its address then.
    auto* graph = new at::cuda::CUDAGraph();
    const auto pool = at::cuda::graph_pool_handle();
    int failed = 0;
    try {
      // The default stream cannot be captured. What was queued there must be done before.
      c10::StreamGuard guard(c10::cuda::getStreamFromPool(false, static_cast<c10::DeviceIndex>(device)));
      c10::cuda::device_synchronize();
      // Other threads may go on working: NVML's readings, for one.
      graph->capture_begin(pool, cudaStreamCaptureModeThreadLocal);
      failed = work(payload);
      graph->capture_end();
    } catch (...) {
      forget_capture(static_cast<c10::DeviceIndex>(device), pool);
      if (failed) return nullptr;
      throw;
    }
    if (failed) {
      delete graph;
      return nullptr;
    }
    return graph;
  } catch (const std::exception& e) {
    *error = strdup(e.what());
    return nullptr;
  }
#else
  (void)device, (void)work, (void)payload;
  *error = strdup("built against a torch without CUDA");
  return nullptr;
#endif
}

// Runs the graph on torch's current stream; null, or a text that the caller frees with free().
char* temper_graph_replay(void* graph) {
#ifdef TEMPER_TORCH_CUDA
  try {
    static_cast<at::cuda::CUDAGraph*>(graph)->replay();
  } catch (const std::exception& e) {
    return strdup(e.what());
  }
#else
  (void)graph;
#endif
  return nullptr;
}

void temper_graph_free(void* graph) {
#ifdef TEMPER_TORCH_CUDA
  try {
    delete static_cast<at::cuda::CUDAGraph*>(graph);
  } catch (...) {  // a failure leaks a graph
  }
#else
  (void)graph;
#endif
}

}  // extern "C"
