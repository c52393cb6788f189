// Rotary position embedding of the queries and keys of a pass, and its gradient, in one launch. In a decode step the same launch
// puts the rotated keys and the values at their places in the cache.
//
//   the two halves (a, b) of a head:   a' = round(a cos - b sin)   b' = round(b cos + a sin)
//   backward, the rotation back:       a' = round(a cos + b sin)   b' = round(b cos - a sin)
//
// cos and sin f32 [tokens, dim], each half with its own; products and sum round in f32 as torch's chain does, so the values are
// its own to the bit. A unit is 8 columns of a half with the same columns of the other; a thread has one.

#include "dtype.cuh"

// The layout of this struct is the wire between src/ops/cuda/rotary.rs and the kernels.
struct RotaryArgs {
  const void* q;             // [tokens, q_heads, 2 half]
  const void* k;             // [tokens, k_heads, 2 half]
  const void* v;             // as k; read where there are positions
  void* q_out;               // as q
  void* k_out;               // as k; [tokens, k_heads, capacity, 2 half] where there are positions
  void* v_out;               // [tokens, k_heads, capacity, 2 half]
  const float* cos;          // [tokens, 2 half]
  const float* sin;          // [tokens, 2 half]
  const int64_t* positions;  // [tokens], in the cache: what exceeds the capacity is not written; null without a cache
  uint32_t capacity;
  uint32_t units;  // tokens (q_heads + k_heads (1, with a cache 2)) ceil(half / 8)
  uint32_t q_heads, k_heads, half;
  Divider by_token;  // divides by the units of a token
  Divider by_head;   // divides by the units of a head
  uint32_t is_back, is_whole;  // is_whole: half is a multiple of 8 and everything aligned to 16 bytes
  uint32_t unused;
};

namespace {

template <bool kIsWhole, typename T>
TEMPER_DEVICE void rotate(const RotaryArgs& a, uint32_t unit) {
  const uint32_t of_head = (a.half + 7) / 8, heads = a.q_heads + (a.positions ? 2 : 1) * a.k_heads;
  const uint32_t token = a.by_token.divide(unit), in_token = unit - token * heads * of_head;
  const uint32_t head = a.by_head.divide(in_token), column = (in_token - head * of_head) * 8;
  const bool is_query = head < a.q_heads, is_value = head >= a.q_heads + a.k_heads;
  uint64_t row = uint64_t(token) * a.q_heads + head, row_out = row;
  if (!is_query) {
    row = row_out = uint64_t(token) * a.k_heads + (head - a.q_heads - (is_value ? a.k_heads : 0));
    if (a.positions) {
      const uint64_t position = uint64_t(a.positions[token]);
      if (position >= a.capacity) return;
      row_out = row * a.capacity + position;
    }
  }
  const T* const x = static_cast<const T*>(is_query ? a.q : is_value ? a.v : a.k) + row * 2 * a.half;
  T* const y = static_cast<T*>(is_query ? a.q_out : is_value ? a.v_out : a.k_out) + row_out * 2 * a.half;
  const float *const cos = a.cos + uint64_t(token) * 2 * a.half, *const sin = a.sin + uint64_t(token) * 2 * a.half;

  const auto load = [&](const auto* from) { return load_part<kIsWhole>(from, column, a.half); };
  const Octet<T> low = load(x), high = load(x + a.half);
  if (is_value) {
    store_part<kIsWhole>(y, column, a.half, low);
    store_part<kIsWhole>(y + a.half, column, a.half, high);
    return;
  }
  const Octet<float> low_cos = load(cos), high_cos = load(cos + a.half), low_sin = load(sin), high_sin = load(sin + a.half);
  float low_out[8], high_out[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float l = element(low, j), h = element(high, j);
    // On the way back, what reached a' and b' through each other's sine.
    const float of_high = a.is_back ? h * element(high_sin, j) : -h * element(low_sin, j);
    const float of_low = a.is_back ? -(l * element(low_sin, j)) : l * element(high_sin, j);
    low_out[j] = l * element(low_cos, j) + of_high;
    high_out[j] = h * element(high_cos, j) + of_low;
  }
  store_part<kIsWhole>(y, column, a.half, narrowed_octet(y, low_out));
  store_part<kIsWhole>(y + a.half, column, a.half, narrowed_octet(y, high_out));
}

}  // namespace

#define TEMPER_ROTARY(dtype, T)                                        \
  TEMPER_KERNEL(rotary_##dtype, RotaryArgs, 4) {                       \
    const uint32_t unit = blockIdx.x * kBlockThreads + threadIdx.x;    \
    if (unit >= args.units) return;                                    \
    if (args.is_whole) {                                               \
      rotate<true, T>(args, unit);                                     \
    } else {                                                           \
      rotate<false, T>(args, unit);                                    \
    }                                                                  \
  }

TEMPER_ROTARY(f32, float)
TEMPER_ROTARY(bf16, Bf16)
TEMPER_ROTARY(f16, F16)
