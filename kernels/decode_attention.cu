// Attention of one new token a sequence to the keys and values that are cached, grouped queries with their one key head.
//
//   out[r, h] = sum over i < lengths[r] of softmax_i(scale q[r, h] . k[r, h / group, i]) v[r, h / group, i]
//
// In f32 with an online softmax, one rounding to the dtype. Nothing of a launch depends on lengths, which are read on the device:
// a block of a sequence, a key head, up to 8 of its queries and a split of the keys takes an equal share of the first lengths[r],
// so it can stand in a CUDA graph. Where the keys are split, decode_attention_join adds the splits' parts. A length of 0 gives 0.
//
// dim / 8 lanes have a key, 8 columns each; a block's teams take keys in turns and keep a softmax of their own, which the block
// joins in the teams' order.

#include "dtype.cuh"
#include "reduce.cuh"

// The layout of these structs is the wire between src/ops/cuda/decode_attention.rs and the kernels.
struct DecodeArgs {
  const void* q;           // [rows, heads, dim]
  const void* keys;        // [rows, kv_heads, capacity, dim], a row and a head that many elements after the one before
  const void* values;      // as keys
  const int64_t* lengths;  // [rows]
  void* out;               // [rows, heads, dim]; where splits > 1, f32 parts [rows, heads, splits, dim + 2]
  uint64_t row_stride, head_stride;
  uint32_t heads, kv_heads, capacity, splits;
  float scale;
  uint32_t unused;
};

struct JoinArgs {
  const float* parts;  // [rows heads, splits, dim + 2]: sum of e^(s - m) v, then m and the sum of e^(s - m)
  void* out;           // [rows heads, dim]
  uint32_t splits, dim;
};

namespace {

constexpr uint32_t kDecodeThreads = 128;
constexpr uint32_t kQueries = 8;  // of a block, at most

// e^(from - to) for maxima; 0 for that of nothing.
TEMPER_DEVICE float decay(float from, float to) { return from == minus_infinity() ? 0.0f : expf(from - to); }

template <uint32_t kDim>
struct alignas(16) DecodeShared {
  static constexpr uint32_t kLanes = kDim / 8, kTeams = kDecodeThreads / kLanes;
  float q[kQueries][kDim];
  float sum[kTeams][kQueries][kDim];  // of e^(s - m) v
  float largest[kTeams][kQueries];    // m
  float weight[kTeams][kQueries];     // of e^(s - m)
};

// One column of the sum of `count` parts, the largest score and the sum of weights.
struct Joined {
  float sum, largest, weight;
};

template <typename Part>
TEMPER_DEVICE Joined join(uint32_t count, const Part& part) {
  Joined all{0.0f, minus_infinity(), 0.0f};
  for (uint32_t i = 0; i < count; ++i) all.largest = fmaxf(all.largest, part(i).largest);
  for (uint32_t i = 0; i < count; ++i) {
    const Joined one = part(i);
    const float factor = decay(one.largest, all.largest);
    all.sum = fmaf(one.sum, factor, all.sum);
    all.weight = fmaf(one.weight, factor, all.weight);
  }
  return all;
}

// The keys [begin, end) of a head for the queries in shared memory, into the teams' parts there.
template <typename T, uint32_t kDim>
TEMPER_DEVICE void attend(const T* keys, const T* values, uint32_t begin, uint32_t end, uint32_t queries,
                          DecodeShared<kDim>& shared) {
  constexpr uint32_t kLanes = DecodeShared<kDim>::kLanes, kTeams = DecodeShared<kDim>::kTeams;
  constexpr uint32_t kStep = sizeof(T) == 4 ? 2 : 4;  // keys of a team that are under way at once
  const uint32_t team = threadIdx.x / kLanes, column = threadIdx.x % kLanes * 8;
  float sum[kQueries][8] = {}, largest[kQueries], weight[kQueries];
#pragma unroll
  for (uint32_t g = 0; g < kQueries; ++g) largest[g] = minus_infinity(), weight[g] = 0.0f;
#pragma unroll 1
  for (uint32_t first = begin; first < end; first += kTeams * kStep) {
    Octet<T> k[kStep], v[kStep];
    bool inside[kStep];
#pragma unroll
    for (uint32_t i = 0; i < kStep; ++i) {
      const uint32_t place = first + i * kTeams + team;
      inside[i] = place < end;
      k[i] = inside[i] ? load_octet(keys + uint64_t(place) * kDim + column) : zero_octet<T>();
      v[i] = inside[i] ? load_octet(values + uint64_t(place) * kDim + column) : zero_octet<T>();
    }
#pragma unroll
    for (uint32_t g = 0; g < kQueries; ++g) {
      if (g >= queries) break;
      const Octet<float> q = load_octet(&shared.q[g][column]);
      float score[kStep], most = largest[g];
#pragma unroll
      for (uint32_t i = 0; i < kStep; ++i) {
        score[i] = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; ++j) score[i] = fmaf(element(q, j), element(k[i], j), score[i]);
#pragma unroll
        for (uint32_t mask = kLanes / 2; mask > 0; mask /= 2) score[i] += __shfl_xor_sync(kFullWarp, score[i], int(mask));
        if (!inside[i]) score[i] = minus_infinity();
        most = fmaxf(most, score[i]);
      }
      const float factor = decay(largest[g], most);
      largest[g] = most;
      weight[g] *= factor;
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[g][j] *= factor;
#pragma unroll
      for (uint32_t i = 0; i < kStep; ++i) {
        const float p = inside[i] ? expf(score[i] - most) : 0.0f;
        weight[g] += p;
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[g][j] = fmaf(p, element(v[i], j), sum[g][j]);
      }
    }
  }
#pragma unroll
  for (uint32_t g = 0; g < kQueries; ++g) {
    if (g >= queries) break;
    store_octet(&shared.sum[team][g][column], narrowed_octet(shared.sum[team][g], sum[g]));
    if (column == 0) shared.largest[team][g] = largest[g], shared.weight[team][g] = weight[g];
  }
}

template <typename T, uint32_t kDim>
TEMPER_DEVICE void decode(const DecodeArgs& a, DecodeShared<kDim>& shared) {
  const uint32_t group = a.heads / a.kv_heads, chunks = (group + kQueries - 1) / kQueries;
  const uint32_t split = blockIdx.x % a.splits, chunk = blockIdx.x / a.splits % chunks;
  const uint32_t of_kv = blockIdx.x / a.splits / chunks, row = of_kv / a.kv_heads, kv_head = of_kv % a.kv_heads;
  const uint32_t first_head = kv_head * group + chunk * kQueries;
  const uint32_t left = group - chunk * kQueries, queries = left < kQueries ? left : kQueries;
  const uint64_t head = uint64_t(row) * a.heads + first_head;

  const T* const q = static_cast<const T*>(a.q) + head * kDim;
  for (uint32_t i = threadIdx.x; i < queries * kDim; i += kDecodeThreads) {
    shared.q[i / kDim][i % kDim] = widened(q[i]) * a.scale;
  }
  __syncthreads();
  const int64_t asked = a.lengths[row];
  const uint32_t length = asked < 0 ? 0 : asked < int64_t(a.capacity) ? uint32_t(asked) : a.capacity;
  const uint32_t share = (length + a.splits - 1) / a.splits;
  const uint32_t begin = split * share < length ? split * share : length;
  const uint32_t end = begin + share < length ? begin + share : length;
  const uint64_t place = uint64_t(row) * a.row_stride + uint64_t(kv_head) * a.head_stride;
  attend<T>(static_cast<const T*>(a.keys) + place, static_cast<const T*>(a.values) + place, begin, end, queries, shared);
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < queries * kDim; i += kDecodeThreads) {
    const uint32_t g = i / kDim, column = i % kDim;
    const Joined all = join(DecodeShared<kDim>::kTeams, [&](uint32_t team) {
      return Joined{shared.sum[team][g][column], shared.largest[team][g], shared.weight[team][g]};
    });
    if (a.splits == 1) {
      store(static_cast<T*>(a.out) + (head + g) * kDim, column, all.weight == 0.0f ? 0.0f : all.sum / all.weight);
    } else {
      float* const part = static_cast<float*>(a.out) + ((head + g) * a.splits + split) * (kDim + 2);
      part[column] = all.sum;
      if (column == 0) part[kDim] = all.largest, part[kDim + 1] = all.weight;
    }
  }
}

// A block a row and head, a thread a column.
template <typename T>
TEMPER_DEVICE void join_splits(const JoinArgs& a) {
  const uint32_t column = threadIdx.x;
  if (column >= a.dim) return;
  const float* const parts = a.parts + uint64_t(blockIdx.x) * a.splits * (a.dim + 2);
  const Joined all = join(a.splits, [&](uint32_t split) {
    const float* const part = parts + split * (a.dim + 2);
    return Joined{part[column], part[a.dim], part[a.dim + 1]};
  });
  store(static_cast<T*>(a.out) + uint64_t(blockIdx.x) * a.dim, column, all.weight == 0.0f ? 0.0f : all.sum / all.weight);
}

}  // namespace

#define TEMPER_DECODE(name, T, dim)                                                   \
  TEMPER_KERNEL_OF(decode_attention_##name##_##dim, DecodeArgs, kDecodeThreads, 2) {  \
    __shared__ DecodeShared<dim> shared;                                              \
    decode<T>(args, shared);                                                          \
  }
#define TEMPER_DECODES(name, T)                                                       \
  TEMPER_DECODE(name, T, 64)                                                          \
  TEMPER_DECODE(name, T, 128)                                                         \
  TEMPER_KERNEL_OF(decode_attention_join_##name, JoinArgs, kDecodeThreads, 8) { join_splits<T>(args); }

TEMPER_DECODES(f32, float)
TEMPER_DECODES(bf16, Bf16)
TEMPER_DECODES(f16, F16)
