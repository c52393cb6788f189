// The gate of an MLP and its gradients, elementwise.
//
//   h = round(g / (1 + e^-g))      y = round(h u)
//   backward, with sigma = 1 / (1 + e^-g):   du = round(dy h)   dh = round(dy u)   dg = round(dh sigma (1 + g (1 - sigma)))
//
// In f32 and rounded to the dtype where torch's silu and product round. A thread has 8 consecutive elements.

#include "dtype.cuh"

// The layout of this struct is the wire between src/ops/cuda/swiglu.rs and the kernels.
struct SwigluArgs {
  const void* gate;  // [elements]
  const void* up;    // [elements]
  const void* dy;    // [elements]; backward alone
  void* y;           // [elements]; backward: dg
  void* du;          // [elements]; backward alone
  uint32_t elements;
  uint32_t is_aligned;  // everything to 16 bytes
};

namespace {

TEMPER_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <bool kIsWhole, typename T>
TEMPER_DEVICE void gated(const SwigluArgs& a, uint32_t first) {
  T* const y = static_cast<T*>(a.y);
  const Octet<T> gate = load_part<kIsWhole>(static_cast<const T*>(a.gate), first, a.elements);
  const Octet<T> up = load_part<kIsWhole>(static_cast<const T*>(a.up), first, a.elements);
  float out[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float g = element(gate, j);
    out[j] = rounded(y, g / (1.0f + expf(-g))) * element(up, j);
  }
  store_part<kIsWhole>(y, first, a.elements, narrowed_octet(y, out));
}

template <bool kIsWhole, typename T>
TEMPER_DEVICE void gated_backward(const SwigluArgs& a, uint32_t first) {
  T* const dg = static_cast<T*>(a.y);
  const Octet<T> gate = load_part<kIsWhole>(static_cast<const T*>(a.gate), first, a.elements);
  const Octet<T> up = load_part<kIsWhole>(static_cast<const T*>(a.up), first, a.elements);
  const Octet<T> dy = load_part<kIsWhole>(static_cast<const T*>(a.dy), first, a.elements);
  float of_gate[8], of_up[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float g = element(gate, j), sigma = sigmoid(g);
    of_up[j] = element(dy, j) * rounded(dg, g / (1.0f + expf(-g)));
    const float dh = rounded(dg, element(dy, j) * element(up, j));
    of_gate[j] = dh * sigma * (1.0f + g * (1.0f - sigma));
  }
  store_part<kIsWhole>(dg, first, a.elements, narrowed_octet(dg, of_gate));
  store_part<kIsWhole>(static_cast<T*>(a.du), first, a.elements, narrowed_octet(dg, of_up));
}

TEMPER_DEVICE uint32_t first_element() { return (blockIdx.x * kBlockThreads + threadIdx.x) * 8; }
TEMPER_DEVICE bool is_whole(const SwigluArgs& a, uint32_t first) { return a.is_aligned && first + 8 <= a.elements; }

}  // namespace

#define TEMPER_SWIGLU(dtype, T)                       \
  TEMPER_KERNEL(swiglu_##dtype, SwigluArgs, 4) {      \
    const uint32_t first = first_element();           \
    if (first >= args.elements) return;               \
    if (is_whole(args, first)) {                      \
      gated<true, T>(args, first);                    \
    } else {                                          \
      gated<false, T>(args, first);                   \
    }                                                 \
  }                                                   \
  TEMPER_KERNEL(swiglu_backward_##dtype, SwigluArgs, 4) { \
    const uint32_t first = first_element();           \
    if (first >= args.elements) return;               \
    if (is_whole(args, first)) {                      \
      gated_backward<true, T>(args, first);           \
    } else {                                          \
      gated_backward<false, T>(args, first);          \
    }                                                 \
  }

TEMPER_SWIGLU(f32, float)
TEMPER_SWIGLU(bf16, Bf16)
TEMPER_SWIGLU(f16, F16)
