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
  kPairs = 2,       // rows begin at multiples of two elements' bytes: pairs of columns are read and written at once
  kQuads = 4,       // ... of four elements' bytes in out
  kAccumulate = 8,  // out += law(y); f32 alone, without bias
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

// Two elements from row[column] on; 0 beyond `cols`.
template <typename T>
TEMPER_DEVICE void load_pair(const T* row, uint32_t column, uint32_t cols, bool pairs, float y[2]) {
  if (pairs && column < cols) {
    if constexpr (sizeof(T) == 4) {
      const Words2 pair = *reinterpret_cast<const Words2*>(row + column);
      y[0] = float_of(pair.w[0]), y[1] = float_of(pair.w[1]);
    } else {
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(row + column);
      y[0] = widened(T{uint16_t(pair)}), y[1] = widened(T{uint16_t(pair >> 16)});
    }
    return;
  }
#pragma unroll
  for (uint32_t i = 0; i < 2; ++i) y[i] = column + i < cols ? widened(row[column + i]) : 0.0f;
}

// The outputs of a thread: pairs of columns first + 8i, first + 8i + 1.
TEMPER_DEVICE void store_columns(float* row, uint32_t first, uint32_t cols, uint32_t flags, const float out[16]) {
#pragma unroll
  for (uint32_t i = 0; i < 8; ++i) {
    const uint32_t column = first + 8 * i;
    if (flags & kPairs && column < cols) {
      *reinterpret_cast<Words2*>(row + column) = Words2{{bits_of(out[2 * i]), bits_of(out[2 * i + 1])}};
    } else {
      if (column < cols) row[column] = out[2 * i];
      if (column + 1 < cols) row[column + 1] = out[2 * i + 1];
    }
  }
}

// The four lanes of a 64-column block hold 4-byte pairs; neighbours exchange half of them, so that each writes 8 bytes and
// the block whole sectors of 32. All lanes of a warp must call; `active`: whether this one has columns.
template <typename T>
TEMPER_DEVICE void store_columns(T* row, uint32_t first, uint32_t cols, uint32_t flags, bool active,
                                 const float out[16]) {
  uint32_t pair[8];
#pragma unroll
  for (uint32_t i = 0; i < 8; ++i) pair[i] = narrowed_pair(row, out[2 * i], out[2 * i + 1]);
  const bool odd = threadIdx.x & 1;
#pragma unroll
  for (uint32_t m = 0; m < 4; ++m) {
    const uint32_t mine = odd ? pair[2 * m + 1] : pair[2 * m], other = odd ? pair[2 * m] : pair[2 * m + 1];
    const uint32_t received = __shfl_xor_sync(kFullWarp, other, 1);
    const uint32_t column = first + 16 * m + (odd ? 6 : 0);
    if (!active || column >= cols || !(flags & kQuads)) continue;
    *reinterpret_cast<Words2*>(row + column) = odd ? Words2{{received, mine}} : Words2{{mine, received}};
  }
  if (flags & kQuads || !active) return;
#pragma unroll
  for (uint32_t i = 0; i < 16; ++i) {
    const uint32_t column = first + i / 2 * 8 + i % 2;
    if (column < cols) row[column].bits = uint16_t(pair[i / 2] >> (16 * (i % 2)));
  }
}

struct NoiseSums {
  double sum[kNoisyElements];
  uint32_t elements;

  __device__ void add(float clean, double error) {
    const double square = double(clean) * double(clean);
    sum[kNoise] += error;
    sum[kNoiseSquare] += error * error;
    sum[kCleanSquare] += square;
    sum[kCleanFourth] += square * square;
    ++elements;
  }
};

template <typename In, typename Out>
TEMPER_DEVICE void noise_body(const NoiseBatch& batch, double* scratch) {
  const uint32_t tensor = tensor_of_tile(batch.tensors, batch.count, blockIdx.x);
  const NoiseTensor& t = batch.tensors[tensor];
  const uint32_t calls = (t.cols + 63) / 64 * 4;  // of a row
  uint32_t at = (blockIdx.x - t.first_tile) * kTileCalls + threadIdx.x;
  NoiseSums sums = {};
#pragma unroll 1
  for (uint32_t i = 0; i < kTileCalls; i += kBlockThreads, at += kBlockThreads) {
    const uint32_t row = t.by_row.divide(at), call = at - row * calls;
    const bool active = row < t.rows;
    const uint32_t first = call / 4 * 64 + call % 4 * 2, cols = active ? t.cols : 0;
    const uint64_t at_row = uint64_t(active ? row : 0) * t.cols;
    float y[16], z[16];
#pragma unroll
    for (uint32_t j = 0; j < 8; ++j) {
      load_pair(static_cast<const In*>(t.y) + at_row, first + 8 * j, cols, t.flags & kPairs, y + 2 * j);
    }
    const uint64_t* keys = reinterpret_cast<const uint64_t*>(t.keys);
    const uint64_t key = t.flags & kKeyArray ? keys[active ? row : 0] : t.keys + row;
    normals_of_call(batch.seed, t.stream, key, call, z);
    Out* out = static_cast<Out*>(t.out) + at_row;
#pragma unroll
    for (uint32_t j = 0; j < 16; ++j) {
      const uint32_t column = first + j / 2 * 8 + j % 2;
      float noisy = apply_error_law(batch.law, y[j], t.scale, z[j]), exact = y[j];
      if (t.bias != nullptr && column < cols) {  // adding a bias of 0 would lose -0
        noisy += t.bias[column];
        exact += t.bias[column];
      }
      if (batch.sums != nullptr && column < cols) {
        sums.add(y[j], double(rounded(out, noisy)) - double(rounded(out, exact)));
      }
      z[j] = noisy;
    }
    if constexpr (sizeof(Out) == 4) {
      if (t.flags & kAccumulate) {
#pragma unroll
        for (uint32_t j = 0; j < 8; ++j) {
          float before[2];
          load_pair(out, first + 8 * j, cols, t.flags & kPairs, before);
          z[2 * j] = before[0] + z[2 * j];
          z[2 * j + 1] = before[1] + z[2 * j + 1];
        }
      }
      store_columns(out, first, cols, t.flags, z);
    } else {
      store_columns(out, first, cols, t.flags, active, z);
    }
  }
  if (batch.sums == nullptr) return;
#pragma unroll
  for (int s = 0; s < kNoiseSums; ++s) {
    const double sum = s == kNoisyElements ? sums.elements : sums.sum[s];
    add_block(sum, scratch, &batch.sums[tensor * kNoiseSums + s]);
  }
}

}  // namespace

#define TEMPER_NOISE(name, In, Out)             \
  TEMPER_KERNEL(name, NoiseBatch, 3) {             \
    __shared__ double scratch[kWarps];          \
    noise_body<In, Out>(args, scratch);         \
  }

TEMPER_NOISE(noise_f32, float, float)
TEMPER_NOISE(noise_f32_to_bf16, float, Bf16)
TEMPER_NOISE(noise_f32_to_f16, float, F16)
TEMPER_NOISE(noise_bf16, Bf16, Bf16)
TEMPER_NOISE(noise_f16, F16, F16)
