// The next token of each row of logits and its log-probability, without the host.
//
//   l = logits / temperature      logprob_i = (l_i - max l) - log(sum of e^(l - max l))      p_i = e^logprob_i
//   greedy: the first i with the largest l_i; else the first i with p_0 + ... + p_i > u (sum of p), u of the row's key: U32 of
//   numerics.md 4a, 24 bits of it. Where rounding leaves none, the last i with any probability.
//
// A block a row: maximum and sum in one pass, the sums of tiles of 1024 tokens in a second; then one warp finds the tile, and in
// it the token. Sums are f32 sums of f32 sums in an order that only the shape decides, the CPU's is one token after the other:
// they choose differently only where u (sum of p) lies within rounding of the boundary between two tokens. A logit that is NaN or
// +infinity, or none above -infinity, gives the log-probability NaN.

#include "dtype.cuh"
#include "philox.cuh"
#include "reduce.cuh"

// The layout of these structs is the wire between src/ops/cuda/sampling.rs and the kernels.
struct SampleArgs {
  const float* logits;   // [rows, vocab]
  const uint64_t* keys;  // [rows]
  int64_t* ids;          // [rows]
  float* logprobs;       // [rows]
  uint64_t seed;
  uint32_t stream, vocab;
  float temperature;
  uint32_t is_greedy;
  uint32_t is_whole;  // vocab is a multiple of 8 and logits are aligned to 16 bytes
  uint32_t unused;
};

struct UniformArgs {
  const uint64_t* keys;  // [rows]
  float* uniforms;       // [rows], in [0, 1)
  uint64_t seed;
  uint32_t stream, rows;
};

namespace {

constexpr uint32_t kSampleThreads = 1024;
constexpr uint32_t kSampleWarps = kSampleThreads / kWarpSize;
constexpr uint32_t kTile = 1024;            // tokens
constexpr uint32_t kPart = kTile / kWarpSize;  // of a tile, a lane's

TEMPER_DEVICE float uniform_of(uint64_t seed, uint32_t stream, uint64_t key) {
  const Words4 counter{{3u << 29, stream, uint32_t(key), uint32_t(key >> 32)}};
  return float(philox4x32_7(uint32_t(seed), uint32_t(seed >> 32), counter).x[0] >> 8) / 16777216.0f;
}

// The sum over the lanes up to this one.
TEMPER_DEVICE float warp_scan(float value) {
  const uint32_t lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (uint32_t distance = 1; distance < kWarpSize; distance *= 2) {
    const float before = __shfl_sync(kFullWarp, value, int(lane >= distance ? lane - distance : lane));
    if (lane >= distance) value += before;
  }
  return value;
}

// The first lane that `reaches`; else the last that has a part; else kWarpSize.
TEMPER_DEVICE uint32_t choose_lane(bool reaches, bool has_part) {
  const uint32_t lane = threadIdx.x % kWarpSize;
  const uint32_t best = warp_max(reaches ? 2 * kWarpSize - lane : has_part ? lane + 1 : 0);
  return best > kWarpSize ? 2 * kWarpSize - best : best > 0 ? best - 1 : kWarpSize;
}

// What a thread, and then all of them, know of a row: the largest l, the first place that has it, the sum of e^(l - largest).
struct Seen {
  float largest;
  uint32_t at;
  float sum;
};

template <bool kIsWhole>
TEMPER_DEVICE Seen see_row(const SampleArgs& a, const float* logits) {
  Seen seen{minus_infinity(), 0, 0.0f};
  for (uint32_t column = threadIdx.x * 8; column < a.vocab; column += kSampleThreads * 8) {
    const Octet<float> octet = load_part<kIsWhole>(logits, column, a.vocab);
    float l[8], largest = seen.largest;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      l[j] = kIsWhole || column + j < a.vocab ? element(octet, j) / a.temperature : minus_infinity();
      if (l[j] > largest) {
        largest = l[j];
        seen.at = column + j;
      }
    }
    if (largest > seen.largest) {
      seen.sum *= expf(seen.largest - largest);
      seen.largest = largest;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) seen.sum += l[j] == minus_infinity() ? 0.0f : expf(l[j] - seen.largest);
  }
  return seen;
}

// scratch [kSampleWarps] is shared memory.
TEMPER_DEVICE Seen seen_by_all(Seen mine, Seen* scratch) {
  Seen best = mine;
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    const float largest = __shfl_xor_sync(kFullWarp, best.largest, mask);
    const uint32_t at = __shfl_xor_sync(kFullWarp, best.at, mask);
    if (largest > best.largest || (largest == best.largest && at < best.at)) best.largest = largest, best.at = at;
  }
  // Of lanes that saw nothing above -infinity the sum is 0, or NaN.
  const float sum = warp_total(mine.largest == best.largest ? mine.sum : mine.sum * expf(mine.largest - best.largest));
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = Seen{best.largest, best.at, sum};
  __syncthreads();
  Seen all = scratch[0];
#pragma unroll 1
  for (uint32_t warp = 1; warp < kSampleWarps; ++warp) {
    const Seen other = scratch[warp];
    if (other.largest > all.largest || (other.largest == all.largest && other.at < all.at)) all = other;
  }
  all.sum = 0.0f;
#pragma unroll 1
  for (uint32_t warp = 0; warp < kSampleWarps; ++warp) {
    const Seen other = scratch[warp];
    all.sum += other.largest == all.largest ? other.sum : other.sum * expf(other.largest - all.largest);
  }
  return all;
}

// Probabilities of a row.
struct Probabilities {
  const float* logits;
  uint32_t vocab;
  float temperature, largest, log_sum;

  __device__ float logprob(float logit) const { return logit / temperature - largest - log_sum; }
  __device__ float at(uint32_t column) const { return column < vocab ? expf(logprob(logits[column])) : 0.0f; }
};

// A warp's: of tile `tile`, in every lane.
template <bool kIsWhole>
TEMPER_DEVICE float tile_sum(const Probabilities& p, uint32_t tile) {
  float sum = 0.0f;
#pragma unroll
  for (uint32_t i = 0; i < kPart / 8; ++i) {
    const uint32_t column = tile * kTile + (i * kWarpSize + threadIdx.x % kWarpSize) * 8;
    if (column >= p.vocab) continue;
    const Octet<float> octet = load_part<kIsWhole>(p.logits, column, p.vocab);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (kIsWhole || column + j < p.vocab) sum += expf(p.logprob(element(octet, j)));
    }
  }
  return warp_total(sum);
}

// A place in a sequence of parts, and the sum of those before it.
struct Found {
  uint32_t at;
  float before;
};

// Of parts [begin, end), after a sum: the first that has anything and takes the sum above `target`, else the last that has
// anything, else `begin`.
template <typename Part>
TEMPER_DEVICE Found walk(uint32_t begin, uint32_t end, float before, float target, const Part& part) {
  Found found{begin, before};
  for (uint32_t i = begin; i < end; ++i) {
    const float mine = part(i), next = before + mine;
    if (mine > 0.0f) {
      found = Found{i, before};
      if (next > target) break;
    }
    before = next;
  }
  return found;
}

// The first warp's: where `count` parts, after a sum, go above u times their total, or above a target. Each lane has a run of
// `of_lane` of them. at: `count` where no part has anything.
template <typename Part>
TEMPER_DEVICE Found find(uint32_t count, uint32_t of_lane, float before, float u, float& target, const Part& part) {
  const uint32_t lane = threadIdx.x % kWarpSize;
  const auto begin_of = [&](uint32_t lane) { return lane * of_lane < count ? lane * of_lane : count; };
  float mine = 0.0f;
  for (uint32_t i = begin_of(lane); i < begin_of(lane + 1); ++i) mine += part(i);
  const float sum = warp_scan(mine), end = before + sum;
  if (u >= 0.0f) target = u * __shfl_sync(kFullWarp, sum, kWarpSize - 1);
  const uint32_t chosen = choose_lane(mine > 0.0f && end > target, mine > 0.0f);
  const float start = __shfl_sync(kFullWarp, end, int(chosen > 0 ? (chosen - 1) % kWarpSize : 0));
  if (chosen == kWarpSize) return Found{count, before};
  return walk(begin_of(chosen), begin_of(chosen + 1), chosen > 0 ? start : before, target, part);
}

template <bool kIsWhole>
TEMPER_DEVICE void sample_row(const SampleArgs& a, Seen* scratch, float* tiles) {
  const float* const logits = a.logits + uint64_t(blockIdx.x) * a.vocab;
  const Seen seen = seen_by_all(see_row<kIsWhole>(a, logits), scratch);
  const Probabilities p{logits, a.vocab, a.temperature, seen.largest, logf(seen.sum)};
  uint32_t id = seen.at;
  if (!a.is_greedy) {
    const uint32_t count = (a.vocab + kTile - 1) / kTile, warp = threadIdx.x / kWarpSize;
    for (uint32_t tile = warp; tile < count; tile += kSampleWarps) {
      const float sum = tile_sum<kIsWhole>(p, tile);
      if (threadIdx.x % kWarpSize == 0) tiles[tile] = sum;
    }
    __syncthreads();
    if (warp > 0) return;
    const float u = uniform_of(a.seed, a.stream, a.keys[blockIdx.x]);
    float target = 0.0f;
    const auto of_tile = [&](uint32_t i) { return tiles[i]; };
    const Found tile = find(count, (count + kWarpSize - 1) / kWarpSize, 0.0f, u, target, of_tile);
    if (tile.at < count) {
      const auto of_token = [&](uint32_t i) { return p.at(tile.at * kTile + i); };
      const Found token = find(kTile, kPart, tile.before, -1.0f, target, of_token);
      if (token.at < kTile) id = tile.at * kTile + token.at;
    }
  }
  if (threadIdx.x > 0) return;
  a.ids[blockIdx.x] = id;
  a.logprobs[blockIdx.x] = p.logprob(logits[id]);
}

}  // namespace

TEMPER_KERNEL_OF(sample, SampleArgs, kSampleThreads, 1) {
  __shared__ Seen scratch[kSampleWarps];
  TEMPER_DYNAMIC_SHARED(dynamic);
  float* const tiles = reinterpret_cast<float*>(dynamic);
  if (args.is_whole) {
    sample_row<true>(args, scratch, tiles);
  } else {
    sample_row<false>(args, scratch, tiles);
  }
}

TEMPER_KERNEL(sample_uniforms, UniformArgs, 4) {
  const uint32_t row = blockIdx.x * kBlockThreads + threadIdx.x;
  if (row < args.rows) args.uniforms[row] = uniform_of(args.seed, args.stream, args.keys[row]);
}
