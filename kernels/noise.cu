// Noise on a batch of matrices, keyed by row and column: the error of a matrix product in its epilogue, and AQN.
//
//   out = round(law(y, s, z) + bias), one rounding; or into += law(y, s, z)
//   relative_gaussian  fma(|y|, RN(s z), y)     absolute_gaussian  y + RN(s z)     systematic_bias  y + s sign(y)
//
// AQN is absolute_gaussian on a weight: w' = w + RN(m sigma z). One thread has one (row, 64-column block, q) at a time:
// 16 columns and one Philox call (normal.cuh). What was injected is summed on the way, thread, warp, block, then one atomicAdd a
// block: the last bits of the sums depend on the order of blocks, the outputs' do not.

#include "columns.cuh"

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
  double* sums;  // [count, kNoiseSlots, kNoiseStride], added to; or null
  NoiseTensor tensors[62];
};
static_assert(sizeof(NoiseBatch) <= 4096, "kernel arguments");

// Calls of a tile: each thread takes four.
constexpr uint32_t kTileCalls = 4 * kBlockThreads;

namespace {

// A tile of kTileCalls calls, all of them inside whole blocks if kIsWhole.
template <typename In, typename Out, bool kIsWhole>
TEMPER_DEVICE void noise_tile(const NoiseBatch& batch, uint32_t tensor, double* scratch) {
  const NoiseTensor& t = batch.tensors[tensor];
  const bool accumulates = t.flags & kAccumulate, is_measured = batch.sums != nullptr;
  const ColumnsCall columns{batch.seed, t.stream, batch.law, t.scale, t.bias, accumulates, is_measured};
  const uint32_t calls = (t.cols + 63) / 64 * 4;  // of a row
  uint32_t at = (blockIdx.x - t.first_tile) * kTileCalls + threadIdx.x;
  NoiseSums sums = {};
#pragma unroll 1
  for (uint32_t i = 0; i < kTileCalls; i += kBlockThreads, at += kBlockThreads) {
    const uint32_t row = t.by_row.divide(at), call = at - row * calls;
    if (!kIsWhole && row >= t.rows) break;
    const uint32_t first = call / 4 * 64 + call % 4 * 2;
    float y[16];
    load_columns<kIsWhole>(static_cast<const In*>(t.y) + uint64_t(row) * t.cols, first, t.cols, y);
    const uint64_t key = t.flags & kKeyArray ? reinterpret_cast<const uint64_t*>(t.keys)[row] : t.keys + row;
    Out* out = static_cast<Out*>(t.out) + uint64_t(row) * t.cols;
    finish_columns<kIsWhole>(columns, key, out, first, t.cols, true, y, sums);
  }
  if (is_measured) add_noise_sums<kWarps>(sums, scratch, batch.sums + tensor * (kNoiseSlots * kNoiseStride));
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

#define TEMPER_NOISE(name, In, Out)                 \
  TEMPER_KERNEL(name, NoiseBatch, 2) {              \
    __shared__ double scratch[kWarps * kNoiseSums]; \
    noise_body<In, Out>(args, scratch);             \
  }

TEMPER_NOISE(noise_f32, float, float)
TEMPER_NOISE(noise_f32_to_bf16, float, Bf16)
TEMPER_NOISE(noise_f32_to_f16, float, F16)
TEMPER_NOISE(noise_bf16, Bf16, Bf16)
TEMPER_NOISE(noise_f16, F16, F16)
