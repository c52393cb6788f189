// Noise on a batch of matrices, keyed by row and column: the error of a matrix product in its epilogue, and AQN.
//
//   out = round(law(y, s, z) + bias), one rounding; or into += law(y, s, z)
//   relative_gaussian  fma(|y|, RN(s z), y)     absolute_gaussian  y + RN(s z)     systematic_bias  y + s sign(y)
//
// AQN is absolute_gaussian on a weight: w' = w + RN(m sigma z). One thread has one (row, 64-column block, q) at a time:
// 16 columns and one Philox call (normal.cuh). What was injected is summed in f64 on the way, thread, warp, block, then one
// atomicAdd a block: the last bits of the sums depend on the order of blocks, the outputs' do not.

#include "dtype.cuh"
#include "error_law.cuh"
#include "normal.cuh"
#include "reduce.cuh"

// The layout of these structs is the wire between src/ops/cuda/noise.rs and the kernels.
struct NoiseTensor {
  const void* y;        // [rows, cols], f32 unless the kernel's name says otherwise
  void* out;            // [rows, cols]; where its dtype is that of y it may be y itself
  const float* bias;    // [cols] f32, or null
  uint64_t keys;        // with kKeyArray the address of [rows] u64 keys; else the key of row r is keys + r
  uint32_t rows, cols;
  uint32_t first_tile;  // of the tensor, among the blocks of the grid
  uint32_t stream;
  Divider by_row;       // divides by the calls of a row: 4 ceil(cols / 64)
  float scale;
  uint32_t flags;
};

enum NoiseFlags : uint32_t {
  kKeyArray = 1,
  kWholeBlocks = 2,  // cols is a multiple of 64 and everything aligned to 8 bytes: columns are read and written in pairs
  kAccumulate = 4,   // out += law(y); f32 alone, without bias
};

struct NoiseBatch {
  uint32_t count, law;
  uint64_t seed;
  double* sums;  // [count, kNoiseSums], added to; or null
  NoiseTensor tensors[62];
};
static_assert(sizeof(NoiseBatch) <= 4096, "kernel arguments");

// error = round(y' + bias) - round(y + bias).
enum NoiseSum { kNoise, kNoiseSquare, kCleanSquare, kCleanFourth, kNoisyElements, kNoiseSums };

// Calls of a tile: each thread takes four.
constexpr uint32_t kTileCalls = 4 * kBlockThreads;

namespace {

// The columns of a thread: pairs first + 8i, first + 8i + 1. kIsWhole: all of them are below `cols`, and pairs aligned.
template <bool kIsWhole, typename T>
TEMPER_DEVICE void load_columns(const T* row, uint32_t first, uint32_t cols, float y[16]) {
#pragma unroll
  for (uint32_t i = 0; i < 8; ++i) {
    const uint32_t column = first + 8 * i;
    if constexpr (!kIsWhole) {
      y[2 * i] = column < cols ? widened(row[column]) : 0.0f;
      y[2 * i + 1] = column + 1 < cols ? widened(row[column + 1]) : 0.0f;
    } else if constexpr (sizeof(T) == 4) {
      const Words2 pair = *reinterpret_cast<const Words2*>(row + column);
      y[2 * i] = float_of(pair.w[0]), y[2 * i + 1] = float_of(pair.w[1]);
    } else {
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(row + column);
      y[2 * i] = widened(T{uint16_t(pair)}), y[2 * i + 1] = widened(T{uint16_t(pair >> 16)});
    }
  }
}

template <bool kIsWhole>
TEMPER_DEVICE void store_columns(float* row, uint32_t first, uint32_t cols, const float out[16]) {
#pragma unroll
  for (uint32_t i = 0; i < 8; ++i) {
    const uint32_t column = first + 8 * i;
    if constexpr (kIsWhole) {
      *reinterpret_cast<Words2*>(row + column) = Words2{{bits_of(out[2 * i]), bits_of(out[2 * i + 1])}};
    } else {
      if (column < cols) row[column] = out[2 * i];
      if (column + 1 < cols) row[column + 1] = out[2 * i + 1];
    }
  }
}

// The four lanes of a 64-column block hold 4-byte pairs; where all are whole, neighbours exchange half of them, so that
// each writes 8 bytes and the block whole sectors of 32.
template <bool kIsWhole, typename T>
TEMPER_DEVICE void store_columns(T* row, uint32_t first, uint32_t cols, const float out[16]) {
  uint32_t pair[8];
#pragma unroll
  for (uint32_t i = 0; i < 8; ++i) pair[i] = narrowed_pair(row, out[2 * i], out[2 * i + 1]);
  if constexpr (kIsWhole) {
    const bool odd = threadIdx.x & 1;
    T* to = row + first + (odd ? 6 : 0);
#pragma unroll
    for (uint32_t m = 0; m < 4; ++m) {
      const uint32_t mine = odd ? pair[2 * m + 1] : pair[2 * m], other = odd ? pair[2 * m] : pair[2 * m + 1];
      const uint32_t received = __shfl_xor_sync(kFullWarp, other, 1);
      *reinterpret_cast<Words2*>(to + 16 * m) = Words2{{odd ? received : mine, odd ? mine : received}};
    }
  } else {
#pragma unroll
    for (uint32_t j = 0; j < 16; ++j) {
      const uint32_t column = first + j / 2 * 8 + j % 2;
      if (column < cols) row[column].bits = uint16_t(pair[j / 2] >> (16 * (j % 2)));
    }
  }
}

struct NoiseSums {
  double sum[kNoisyElements];
  uint32_t elements;

  // The difference of two rounded values that lie near each other is exact in f32; else it has f32's places.
  __device__ void add(float clean, float noise) {
    const double error = noise, square = double(clean) * double(clean);
    sum[kNoise] += error;
    sum[kNoiseSquare] += error * error;
    sum[kCleanSquare] += square;
    sum[kCleanFourth] += square * square;
  }
};

template <bool kIsWhole, typename Out>
TEMPER_DEVICE void add_to_sums(const Out* dtype, uint32_t first, uint32_t cols, const float clean[16],
                               const float exact[16], const float noisy[16], NoiseSums& sums) {
#pragma unroll
  for (uint32_t j = 0; j < 16; ++j) {
    if (!kIsWhole && first + j / 2 * 8 + j % 2 >= cols) continue;
    sums.add(clean[j], rounded(dtype, noisy[j]) - rounded(dtype, exact[j]));
    if (!kIsWhole) ++sums.elements;
  }
  if (kIsWhole) sums.elements += 16;
}

// A tile of kTileCalls calls, all of them inside whole blocks if kIsWhole.
template <typename In, typename Out, bool kIsWhole>
TEMPER_DEVICE void noise_tile(const NoiseBatch& batch, uint32_t tensor, double* scratch) {
  const NoiseTensor& t = batch.tensors[tensor];
  const uint32_t calls = (t.cols + 63) / 64 * 4;  // of a row
  uint32_t at = (blockIdx.x - t.first_tile) * kTileCalls + threadIdx.x;
  NoiseSums sums = {};
#pragma unroll 1
  for (uint32_t i = 0; i < kTileCalls; i += kBlockThreads, at += kBlockThreads) {
    const uint32_t row = t.by_row.divide(at), call = at - row * calls;
    if (!kIsWhole && row >= t.rows) break;
    const uint32_t first = call / 4 * 64 + call % 4 * 2;
    float y[16], z[16];
    load_columns<kIsWhole>(static_cast<const In*>(t.y) + uint64_t(row) * t.cols, first, t.cols, y);
    const uint64_t key = t.flags & kKeyArray ? reinterpret_cast<const uint64_t*>(t.keys)[row] : t.keys + row;
    normals_of_call(batch.seed, t.stream, key, call, z);
    apply_error_law(batch.law, t.scale, y, z);
    Out* out = static_cast<Out*>(t.out) + uint64_t(row) * t.cols;
    if (t.bias == nullptr) {
      if (batch.sums != nullptr) add_to_sums<kIsWhole>(out, first, t.cols, y, y, z, sums);
    } else {
      float exact[16];
      load_columns<kIsWhole>(t.bias, first, t.cols, exact);
#pragma unroll
      for (uint32_t j = 0; j < 16; ++j) {
        z[j] += exact[j];
        exact[j] += y[j];
      }
      if (batch.sums != nullptr) add_to_sums<kIsWhole>(out, first, t.cols, y, exact, z, sums);
    }
    if constexpr (sizeof(Out) == 4) {
      if (t.flags & kAccumulate) {
        load_columns<kIsWhole>(out, first, t.cols, y);
#pragma unroll
        for (uint32_t j = 0; j < 16; ++j) z[j] = y[j] + z[j];
      }
    }
    store_columns<kIsWhole>(out, first, t.cols, z);
  }
  if (batch.sums == nullptr) return;
#pragma unroll
  for (int s = 0; s < kNoiseSums; ++s) {
    const double sum = s == kNoisyElements ? sums.elements : sums.sum[s];
    add_block(sum, scratch, &batch.sums[tensor * kNoiseSums + s]);
  }
}

template <typename In, typename Out>
TEMPER_DEVICE void noise_body(const NoiseBatch& batch, double* scratch) {
  const uint32_t tensor = tensor_of_tile(batch.tensors, batch.count, blockIdx.x);
  const NoiseTensor& t = batch.tensors[tensor];
  const uint32_t end = (blockIdx.x - t.first_tile + 1) * kTileCalls;
  if (t.flags & kWholeBlocks && end <= t.cols / 64 * 4 * t.rows) {
    noise_tile<In, Out, true>(batch, tensor, scratch);
  } else {
    noise_tile<In, Out, false>(batch, tensor, scratch);
  }
}

}  // namespace

#define TEMPER_NOISE(name, In, Out)             \
  TEMPER_KERNEL(name, NoiseBatch, 2) {             \
    __shared__ double scratch[kWarps];          \
    noise_body<In, Out>(args, scratch);         \
  }

TEMPER_NOISE(noise_f32, float, float)
TEMPER_NOISE(noise_f32_to_bf16, float, Bf16)
TEMPER_NOISE(noise_f32_to_f16, float, F16)
TEMPER_NOISE(noise_bf16, Bf16, Bf16)
TEMPER_NOISE(noise_f16, F16, F16)
