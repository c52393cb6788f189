// Root mean square norm of the rows of a residual stream, with the addition before it, and its gradients.
//
//   s = round(x + delta); s = x without delta      r = 1 / sqrt(sum(s^2) / hidden + eps)      y = round((s r) w)
//   backward, with n = s r and g = dy w:   dx = round(ds + r (g - n sum(g n) / hidden))   dw = sum over rows of dy n
//
// All in f32; ds is the gradient that arrives at s itself, and dx is delta's too. rms_norm: a block a row. rms_norm_backward: a
// block some rows, one after the other, and a row of partial dw; rms_norm_dweight adds these up. Every sum has one order,
// which only the shape decides. A thread holds 8 consecutive columns, or four times 8 in the kernels for wide rows.

#include "dtype.cuh"
#include "reduce.cuh"

// The layout of these structs is the wire between src/ops/cuda/rms_norm.rs and the kernels.
struct RmsNormArgs {
  const void* x;                // [rows, hidden]
  const void* delta;            // [rows, hidden], or null
  const float* weight;          // [hidden]
  const float* clean;           // [hidden], or null
  void* residual;               // s [rows, hidden]; not written without delta
  void* y;                      // [rows, hidden]
  unsigned long long* changed;  // += elements of y that differ from those with the clean weight
  uint32_t rows, hidden;
  float eps;
  uint32_t is_whole;  // hidden is a multiple of 8 and everything aligned to 16 bytes
};

struct RmsNormBackwardArgs {
  const void* s;        // [rows, hidden]
  const void* dy;       // [rows, hidden]
  const void* ds;       // [rows, hidden], or null
  const float* weight;  // [hidden]
  void* dx;             // [rows, hidden]
  float* partial;       // [blocks, hidden], or null
  uint32_t rows, hidden;
  float eps;
  uint32_t is_whole;
  uint32_t rows_of_block, unused;
};

struct DweightArgs {
  const float* partial;  // [parts, hidden]
  float* dweight;        // [hidden]
  uint32_t parts, hidden;
};

namespace {

TEMPER_DEVICE uint32_t column_of(uint32_t octet) { return (threadIdx.x + octet * kBlockThreads) * 8; }

TEMPER_DEVICE float inverse_root(float sum_of_squares, uint32_t hidden, float eps) {
  return 1.0f / sqrtf(sum_of_squares / float(hidden) + eps);
}

template <bool kIsWhole, typename T, uint32_t kOctets>
TEMPER_DEVICE void norm_row(const RmsNormArgs& a, float (*scratch)[kWarps]) {
  const uint64_t row = uint64_t(blockIdx.x) * a.hidden;
  T* const y = static_cast<T*>(a.y) + row;
  Octet<T> s[kOctets];
  float sum[1] = {0.0f};
#pragma unroll
  for (uint32_t i = 0; i < kOctets; ++i) {
    const uint32_t column = column_of(i);
    s[i] = zero_octet<T>();
    if (column >= a.hidden) continue;
    s[i] = load_part<kIsWhole>(static_cast<const T*>(a.x) + row, column, a.hidden);
    if (a.delta != nullptr) {
      const Octet<T> delta = load_part<kIsWhole>(static_cast<const T*>(a.delta) + row, column, a.hidden);
      float both[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) both[j] = element(s[i], j) + element(delta, j);
      s[i] = narrowed_octet(y, both);
      store_part<kIsWhole>(static_cast<T*>(a.residual) + row, column, a.hidden, s[i]);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[0] = fmaf(element(s[i], j), element(s[i], j), sum[0]);
  }
  block_totals(sum, scratch);
  const float r = inverse_root(sum[0], a.hidden, a.eps);
  uint32_t changed = 0;
#pragma unroll
  for (uint32_t i = 0; i < kOctets; ++i) {
    const uint32_t column = column_of(i);
    if (column >= a.hidden) continue;
    const Octet<float> w = load_part<kIsWhole>(a.weight, column, a.hidden);
    float out[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = element(s[i], j) * r * element(w, j);
    const Octet<T> narrowed = narrowed_octet(y, out);
    store_part<kIsWhole>(y, column, a.hidden, narrowed);
    if (a.clean == nullptr) continue;
    const Octet<float> clean = load_part<kIsWhole>(a.clean, column, a.hidden);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const bool inside = kIsWhole || column + j < a.hidden;
      changed += inside && element(narrowed, j) != rounded(y, element(s[i], j) * r * element(clean, j));
    }
  }
  if (a.clean == nullptr) return;
  changed = warp_total(changed);
  if (threadIdx.x % kWarpSize == 0 && changed > 0) atomicAdd(a.changed, static_cast<unsigned long long>(changed));
}

template <bool kIsWhole, typename T, uint32_t kOctets>
TEMPER_DEVICE void norm_rows_backward(const RmsNormBackwardArgs& a, float (*scratch)[kWarps]) {
  const uint32_t begin = blockIdx.x * a.rows_of_block;
  const uint32_t end = begin + a.rows_of_block < a.rows ? begin + a.rows_of_block : a.rows;
  float dw[kOctets][8] = {};
#pragma unroll 1
  for (uint32_t number = begin; number < end; ++number) {
    const uint64_t row = uint64_t(number) * a.hidden;
    T* const dx = static_cast<T*>(a.dx) + row;
    Octet<T> s[kOctets], dy[kOctets];
    float sums[2] = {0.0f, 0.0f};  // of s^2 and g s
#pragma unroll
    for (uint32_t i = 0; i < kOctets; ++i) {
      const uint32_t column = column_of(i);
      s[i] = dy[i] = zero_octet<T>();
      if (column >= a.hidden) continue;
      s[i] = load_part<kIsWhole>(static_cast<const T*>(a.s) + row, column, a.hidden);
      dy[i] = load_part<kIsWhole>(static_cast<const T*>(a.dy) + row, column, a.hidden);
      const Octet<float> w = load_part<kIsWhole>(a.weight, column, a.hidden);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float value = element(s[i], j);
        sums[0] = fmaf(value, value, sums[0]);
        sums[1] = fmaf(element(dy[i], j) * element(w, j), value, sums[1]);
      }
    }
    block_totals(sums, scratch);
    const float r = inverse_root(sums[0], a.hidden, a.eps), mean = sums[1] * r / float(a.hidden);
#pragma unroll
    for (uint32_t i = 0; i < kOctets; ++i) {
      const uint32_t column = column_of(i);
      if (column >= a.hidden) continue;
      const Octet<float> w = load_part<kIsWhole>(a.weight, column, a.hidden);
      float out[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float n = element(s[i], j) * r, dy_j = element(dy[i], j);
        dw[i][j] = fmaf(dy_j, n, dw[i][j]);
        out[j] = r * fmaf(-n, mean, dy_j * element(w, j));
      }
      if (a.ds != nullptr) {
        const Octet<T> ds = load_part<kIsWhole>(static_cast<const T*>(a.ds) + row, column, a.hidden);
#pragma unroll
        for (int j = 0; j < 8; ++j) out[j] = element(ds, j) + out[j];
      }
      store_part<kIsWhole>(dx, column, a.hidden, narrowed_octet(dx, out));
    }
  }
  if (a.partial == nullptr) return;
  float* const partial = a.partial + uint64_t(blockIdx.x) * a.hidden;
#pragma unroll
  for (uint32_t i = 0; i < kOctets; ++i) {
    if (column_of(i) < a.hidden) store_part<kIsWhole>(partial, column_of(i), a.hidden, narrowed_octet(partial, dw[i]));
  }
}

}  // namespace

// `resident` of the forward kernel, `back` of the backward.
#define TEMPER_RMS_NORM(name, T, octets, resident, back)  \
  TEMPER_KERNEL(rms_norm_##name, RmsNormArgs, resident) { \
    __shared__ float scratch[1][kWarps];                  \
    if (args.is_whole) {                                  \
      norm_row<true, T, octets>(args, scratch);           \
    } else {                                              \
      norm_row<false, T, octets>(args, scratch);          \
    }                                                     \
  }                                                       \
  TEMPER_KERNEL(rms_norm_backward_##name, RmsNormBackwardArgs, back) { \
    __shared__ float scratch[2][kWarps];                  \
    if (args.is_whole) {                                  \
      norm_rows_backward<true, T, octets>(args, scratch); \
    } else {                                              \
      norm_rows_backward<false, T, octets>(args, scratch); \
    }                                                     \
  }

TEMPER_RMS_NORM(f32, float, 1, 4, 4)
TEMPER_RMS_NORM(bf16, Bf16, 1, 4, 4)
TEMPER_RMS_NORM(f16, F16, 1, 4, 4)
TEMPER_RMS_NORM(f32_wide, float, 4, 2, 1)
TEMPER_RMS_NORM(bf16_wide, Bf16, 4, 2, 1)
TEMPER_RMS_NORM(f16_wide, F16, 4, 2, 1)

// A block 32 columns; each warp every eighth part.
TEMPER_KERNEL(rms_norm_dweight, DweightArgs, 4) {
  __shared__ float sums[kWarps][kWarpSize];
  const uint32_t lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const uint32_t column = blockIdx.x * kWarpSize + lane;
  float sum = 0.0f;
  if (column < args.hidden) {
    for (uint32_t part = warp; part < args.parts; part += kWarps) sum += args.partial[uint64_t(part) * args.hidden + column];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= args.hidden) return;
#pragma unroll
  for (uint32_t other = 1; other < kWarps; ++other) sum += sums[other][lane];
  args.dweight[column] = sum;
}
