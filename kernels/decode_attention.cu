// Attention of one new token a sequence to the keys and values that are cached, grouped queries with their one key head.
//
//   out[r, h] = sum over i < lengths[r] of softmax_i(scale q[r, h] . k[r, h / group, i]) v[r, h / group, i]
//
// In f32 with an online softmax, one rounding to the dtype. Nothing of a launch depends on lengths, which are read on the device:
// a block of a sequence, a key head, up to 8 of its queries and a split of the keys takes an equal share of the first lengths[r],
// so it can stand in a CUDA graph. Where the keys are split, decode_attention_join adds the splits' parts. A length of 0 gives 0.
//
// A block's teams take keys in turns and keep a softmax of their own, which the block joins in the teams' order. In f32 a team
// are dim / 8 lanes, which have a key, 8 columns each. In 16 bits it is a warp, which takes 16 keys to the tensor cores: scores K Q^T
// [16 keys, 8 queries], then V^T P^T [dim, 8 queries], with P as the sum of two 16-bit numbers: to 16 bits, not 8.
// (So an infinite value gives NaN, where it would give infinity in f32.)

#include "mma.cuh"
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

template <typename T, uint32_t kDim>
struct alignas(16) DecodeShared {
  static constexpr uint32_t kTeams = kDecodeThreads / (sizeof(T) == 4 ? kDim / 8 : kWarpSize);
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

// The keys [begin, end) of a head for `queries` of its queries, q [queries, kDim], into the teams' parts in shared memory.
template <uint32_t kDim>
TEMPER_DEVICE void attend(const float* q, const float* keys, const float* values, uint32_t begin, uint32_t end,
                          uint32_t queries, float scale, DecodeShared<float, kDim>& shared) {
  constexpr uint32_t kLanes = kDim / 8, kTeams = DecodeShared<float, kDim>::kTeams;
  constexpr uint32_t kStep = 2;  // keys of a team that are under way at once
  const uint32_t team = threadIdx.x / kLanes, column = threadIdx.x % kLanes * 8;
  float sum[kQueries][8] = {}, largest[kQueries], weight[kQueries];
#pragma unroll
  for (uint32_t g = 0; g < kQueries; ++g) largest[g] = minus_infinity(), weight[g] = 0.0f;
#pragma unroll 1
  for (uint32_t first = begin; first < end; first += kTeams * kStep) {
    Octet<float> k[kStep], v[kStep];
    bool inside[kStep];
#pragma unroll
    for (uint32_t i = 0; i < kStep; ++i) {
      const uint32_t place = first + i * kTeams + team;
      inside[i] = place < end;
      k[i] = inside[i] ? load_octet(keys + uint64_t(place) * kDim + column) : zero_octet<float>();
      v[i] = inside[i] ? load_octet(values + uint64_t(place) * kDim + column) : zero_octet<float>();
    }
#pragma unroll
    for (uint32_t g = 0; g < kQueries; ++g) {
      if (g >= queries) break;
      const Octet<float> of_query = load_octet(q + g * kDim + column);
      float score[kStep], most = largest[g];
#pragma unroll
      for (uint32_t i = 0; i < kStep; ++i) {
        score[i] = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; ++j) score[i] = fmaf(element(of_query, j) * scale, element(k[i], j), score[i]);
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

// ... of 16 bits.
template <typename T, uint32_t kDim>
TEMPER_DEVICE void attend(const T* q, const T* keys, const T* values, uint32_t begin, uint32_t end, uint32_t queries,
                          float scale, DecodeShared<T, kDim>& shared) {
  constexpr uint32_t kParts = kDim / 32, kStep = 16, kTeams = DecodeShared<T, kDim>::kTeams;
  const T* dtype = nullptr;
  // A lane has the keys `row` and row + 8 of 16, columns `column` + {0 .. 7} of each 32; its scores are those of queries
  // `query` and query + 1. Both operands of a product take the columns in one order, which may be any.
  const uint32_t team = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const uint32_t row = lane / 4, column = lane % 4 * 8, query = lane % 4 * 2;
  Octet<T> of_query[kParts];
#pragma unroll
  for (uint32_t part = 0; part < kParts; ++part) {
    of_query[part] = row < queries ? load_octet(q + row * kDim + part * 32 + column) : zero_octet<T>();
  }
  float sum[2 * kParts][4] = {}, largest[2] = {minus_infinity(), minus_infinity()}, weight[2] = {};
#pragma unroll 1
  for (uint32_t first = begin + team * kStep; first < end; first += kTeams * kStep) {
    Octet<T> k[2][kParts], v[2][kParts];
    bool inside[2];
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t place = first + half * 8 + row;
      inside[half] = place < end;
#pragma unroll
      for (uint32_t part = 0; part < kParts; ++part) {
        const uint64_t at = uint64_t(place) * kDim + part * 32 + column;
        k[half][part] = inside[half] ? load_octet(keys + at) : zero_octet<T>();
        v[half][part] = inside[half] ? load_octet(values + at) : zero_octet<T>();
      }
    }
    float score[4] = {};  // of key row, then of row + 8
#pragma unroll
    for (uint32_t part = 0; part < kParts; ++part) {
      const uint32_t *low = k[0][part].vector[0].w, *high = k[1][part].vector[0].w, *of = of_query[part].vector[0].w;
#pragma unroll
      for (uint32_t w = 0; w < 4; w += 2) {
        const uint32_t a[4] = {low[w], high[w], low[w + 1], high[w + 1]};
        mma_16x8x16(dtype, score, a, of + w);
      }
    }
    float p[4], factor[2];
#pragma unroll
    for (uint32_t g = 0; g < 2; ++g) {
      float most = largest[g];
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        float& s = score[2 * half + g];
        s = inside[half] ? s * scale : minus_infinity();
        most = fmaxf(most, s);
      }
#pragma unroll
      for (uint32_t mask = 4; mask < kWarpSize; mask *= 2) most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, int(mask)));
      factor[g] = decay(largest[g], most);
      largest[g] = most;
      weight[g] *= factor[g];
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        p[2 * half + g] = inside[half] ? expf(score[2 * half + g] - most) : 0.0f;
        weight[g] += p[2 * half + g];
      }
    }
    uint32_t large[2], small[2];  // P^T: its columns are queries now
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const float* of = &p[2 * half];
      const uint32_t pair = narrowed_pair(dtype, of[0], of[1]);
      const float kept[2] = {widened(T{uint16_t(pair)}), widened(T{uint16_t(pair >> 16)})};
      large[half] = transposed_matrix(pair);
      small[half] = transposed_matrix(narrowed_pair(dtype, of[0] - kept[0], of[1] - kept[1]));
    }
#pragma unroll
    for (uint32_t tile = 0; tile < 2 * kParts; ++tile) {
      float* d = sum[tile];
      d[0] *= factor[0], d[1] *= factor[1], d[2] *= factor[0], d[3] *= factor[1];
      const uint32_t *low = &v[0][tile / 2].vector[0].w[tile % 2 * 2], *high = &v[1][tile / 2].vector[0].w[tile % 2 * 2];
      const uint32_t a[4] = {transposed_matrix(low[0]), transposed_matrix(low[1]), transposed_matrix(high[0]),
                             transposed_matrix(high[1])};
      mma_16x8x16(dtype, d, a, large);
      mma_16x8x16(dtype, d, a, small);
    }
  }
#pragma unroll
  for (uint32_t g = 0; g < 2; ++g) {
#pragma unroll
    for (uint32_t mask = 4; mask < kWarpSize; mask *= 2) weight[g] += __shfl_xor_sync(kFullWarp, weight[g], int(mask));
    if (query + g >= queries) continue;
    if (row == 0) shared.largest[team][query + g] = largest[g], shared.weight[team][query + g] = weight[g];
    // Row i of a transposed matrix is element i % 2 of a word of lane column i / 2; rows 8 on are of the next word.
#pragma unroll
    for (uint32_t tile = 0; tile < 2 * kParts; ++tile) {
      float* const to = &shared.sum[team][query + g][tile / 2 * 32 + row / 2 * 8 + tile % 2 * 4 + row % 2];
      to[0] = sum[tile][g], to[2] = sum[tile][2 + g];
    }
  }
}

template <typename T, uint32_t kDim>
TEMPER_DEVICE void decode(const DecodeArgs& a, DecodeShared<T, kDim>& shared) {
  const uint32_t group = a.heads / a.kv_heads, chunks = (group + kQueries - 1) / kQueries;
  const uint32_t split = blockIdx.x % a.splits, chunk = blockIdx.x / a.splits % chunks;
  const uint32_t of_kv = blockIdx.x / a.splits / chunks, row = of_kv / a.kv_heads, kv_head = of_kv % a.kv_heads;
  const uint32_t first_head = kv_head * group + chunk * kQueries;
  const uint32_t left = group - chunk * kQueries, queries = left < kQueries ? left : kQueries;
  const uint64_t head = uint64_t(row) * a.heads + first_head;

  const int64_t asked = a.lengths[row];
  const uint32_t length = asked < 0 ? 0 : asked < int64_t(a.capacity) ? uint32_t(asked) : a.capacity;
  const uint32_t share = (length + a.splits - 1) / a.splits;
  const uint32_t begin = split * share < length ? split * share : length;
  const uint32_t end = begin + share < length ? begin + share : length;
  const uint64_t place = uint64_t(row) * a.row_stride + uint64_t(kv_head) * a.head_stride;
  attend(static_cast<const T*>(a.q) + head * kDim, static_cast<const T*>(a.keys) + place,
         static_cast<const T*>(a.values) + place, begin, end, queries, a.scale, shared);
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < queries * kDim; i += kDecodeThreads) {
    const uint32_t g = i / kDim, column = i % kDim;
    const Joined all = join(DecodeShared<T, kDim>::kTeams, [&](uint32_t team) {
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
  TEMPER_KERNEL_OF(decode_attention_##name##_##dim, DecodeArgs, kDecodeThreads, 3) {  \
    __shared__ DecodeShared<T, dim> shared;                                           \
    decode<T>(args, shared);                                                          \
  }
#define TEMPER_DECODES(name, T)                                                       \
  TEMPER_DECODE(name, T, 64)                                                          \
  TEMPER_DECODE(name, T, 128)                                                         \
  TEMPER_KERNEL_OF(decode_attention_join_##name, JoinArgs, kDecodeThreads, 8) { join_splits<T>(args); }

TEMPER_DECODES(f32, float)
TEMPER_DECODES(bf16, Bf16)
TEMPER_DECODES(f16, F16)
