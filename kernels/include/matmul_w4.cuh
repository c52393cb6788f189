// The noisy matrix product with a packed weight: C [m, n] = round(law(A Q^T) + bias), A [m, k] bf16, Q [n, k] in MXFP4 or
// NVFP4, held as codes and scales and dequantized on the way to the tensor cores. Equal to fake-quantizing first and
// multiplying after, up to the order of sums: a weight's value is the same, rounded to bf16.
//
// For a decoding step, whose time is that of reading weights. The order of k within a product is free as long as A and Q agree,
// so it is the one in which a lane's loads are whole: of 128 k of a stage, lane q = lane mod 4 has 32 q .. 32 q + 31, which are
// 16 bytes of codes; of eight codes, a word, code i goes with code i + 4, which lie 16 bits apart as bf16 pairs do.
#pragma once

#include "block_scale.cuh"
#include "matmul_tile.cuh"
#include "mma.cuh"

constexpr uint32_t kPackedK = 128;

// The values of eight codes times 2^-126, as pairs of bf16: i and i + 4. The three bits below a code's sign are exponent and
// mantissa of a bf16, subnormals included.
TEMPER_DEVICE void pairs_of_codes(uint32_t codes, uint32_t pairs[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t magnitudes = (i < 2 ? codes << (6 - 4 * i) : codes >> (4 * i - 6)) & 0x01c001c0;
    pairs[i] = magnitudes | ((codes << (12 - 4 * i)) & 0x80008000);
  }
}

constexpr uint32_t kTwoTo126 = 0x7e807e80;  // a pair

// How a row's scales lie in shared memory, and what they make of a word of codes. scales: those of this lane's 32 k.
struct PackedMxfp4 {
  static constexpr uint32_t kBlock = 32, kScaleBytes = 4;  // of a row and a stage

  uint32_t scale;  // 2^k as a pair

  TEMPER_DEVICE float tensor_decode(const float*) { return 1.0f; }
  __device__ void read(Shared row, uint32_t q, float) {
    const uint32_t byte = load_shared_half(row + q / 2 * 2) >> (q % 2 * 8) & 255;
    const uint32_t bits = byte == 255 ? 0x7fc0 : byte == 0 ? 0x40 : byte << 7;
    scale = bits << 16 | bits;
  }

  // Word 0..3 of the lane's.
  __device__ void dequantize(uint32_t, uint32_t pairs[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = multiply_pairs(multiply_pairs(pairs[i], kTwoTo126), scale);
  }
};

struct PackedNvfp4 {
  static constexpr uint32_t kBlock = 16, kScaleBytes = 8;

  float decode[2];  // S * (1 / G) of the lane's two blocks

  TEMPER_DEVICE float tensor_decode(const float* amax) { return Nvfp4::tensor(kNearestEven, *amax).decode; }
  __device__ void read(Shared row, uint32_t q, float tensor_decode) {
    const uint32_t bytes = load_shared_half(row + q * 2);
    decode[0] = e4m3_decode(bytes & 255) * tensor_decode;
    decode[1] = e4m3_decode(bytes >> 8) * tensor_decode;
  }

  __device__ void dequantize(uint32_t word, uint32_t pairs[4]) const {
    const float by = decode[word / 2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t value = multiply_pairs(pairs[i], kTwoTo126);
      const float low = widened(Bf16{uint16_t(value)}) * by, high = widened(Bf16{uint16_t(value >> 16)}) * by;
      pairs[i] = narrowed_pair(static_cast<const Bf16*>(nullptr), low, high);
    }
  }
};

// All warps of a block share its rows.
template <class Packed, class Tile>
struct MatmulW4 : TileOfC<Bf16, Tile> {
  using Base = TileOfC<Bf16, Tile>;
  using Base::args, Base::first_m, Base::first_n, Base::warp_n, Base::sum;
  static constexpr uint32_t kBlocksM = Base::kBlocksM, kBlocksN = Base::kBlocksN;
  static constexpr uint32_t kBytesA = Tile::kTileM * kPackedK * 2, kBytesCodes = Tile::kTileN * kPackedK / 2;
  static constexpr uint32_t kStageBytes = kBytesA + kBytesCodes + Tile::kTileN * Packed::kScaleBytes;
  static_assert(Tile::kTileM == Tile::kWarpM, "warps lie side by side");

  __device__ MatmulW4(const MatmulArgs& args_, uint32_t block) : Base(args_, block) {}

  // The sums over this split's k, a multiple of kPackedK; A, codes and scales are aligned to their pieces.
  __device__ void multiply(Shared stages) {
    const uint32_t first_k = Base::first_k(), steps = (Base::end_k() - first_k) / kPackedK;
    const float tensor_decode = Packed::tensor_decode(args.amax);
    const auto load = [&](uint32_t step) {
      if (step < steps) this->load(stages + step % Tile::kStages * kStageBytes, first_k + step * kPackedK);
      commit_copies();
    };
    for (uint32_t step = 0; step < Tile::kStages - 1; ++step) load(step);
    for (uint32_t step = 0; step < steps; ++step) {
      wait_copies<Tile::kStages - 2>();
      __syncthreads();  // everyone's copies of this step are there, and everyone has read the one before
      load(step + Tile::kStages - 1);
      multiply_stage(stages + step % Tile::kStages * kStageBytes, tensor_decode);
    }
  }

 private:
  // Of A, a row's sixteen pieces of 16 bytes; places that a warp reads at once lie in different banks.
  TEMPER_DEVICE uint32_t offset_a(uint32_t row, uint32_t piece) {
    return row * (kPackedK * 2) + (piece ^ (piece / 8) ^ row % 2 * 2) * 16;
  }

  __device__ void load(Shared stage, uint32_t k) const {
    const Shared codes = stage + kBytesA, scales = codes + kBytesCodes;
    for (uint32_t i = threadIdx.x; i < Tile::kTileM * 16; i += Tile::kThreads) {
      const uint32_t row = i / 16, piece = i % 16;
      const bool inside = first_m + row < args.m;
      const uint64_t at = uint64_t(inside ? first_m + row : 0) * args.k + k + piece * 8;
      copy_async(stage + offset_a(row, piece), static_cast<const Bf16*>(args.a) + at, inside);
    }
#pragma unroll
    for (uint32_t i = 0; i < Tile::kTileN * 4; i += Tile::kThreads) {
      const uint32_t row = (i + threadIdx.x) / 4, piece = threadIdx.x % 4;
      const bool inside = first_n + row < args.n;
      const uint64_t at = uint64_t(inside ? first_n + row : 0) * (args.k / 2) + k / 2 + piece * 16;
      copy_async(codes + row * (kPackedK / 2) + piece * 16, static_cast<const uint8_t*>(args.b) + at, inside);
    }
#pragma unroll
    for (uint32_t i = 0; i < Tile::kTileN; i += Tile::kThreads) {
      const uint32_t row = i + threadIdx.x;
      const bool inside = first_n + row < args.n;
      const uint64_t at = uint64_t(inside ? first_n + row : 0) * (args.k / Packed::kBlock) + k / Packed::kBlock;
      copy_async<Packed::kScaleBytes>(scales + row * Packed::kScaleBytes, args.scales + at, inside);
    }
  }

  __device__ void multiply_stage(Shared stage, float tensor_decode) {
    const uint32_t lane = threadIdx.x % kWarpSize, q = lane % 4;
    const Shared rows = stage + kBytesA, scales = rows + kBytesCodes;
    Vector4 codes[kBlocksN];
    Packed packed[kBlocksN];
#pragma unroll
    for (uint32_t j = 0; j < kBlocksN; ++j) {
      const uint32_t row = warp_n + j * 8 + lane / 4;
      codes[j] = load_shared(rows + row * (kPackedK / 2) + q * 16);
      packed[j].read(scales + row * Packed::kScaleBytes, q, tensor_decode);
    }
#pragma unroll
    for (uint32_t word = 0; word < 4; ++word) {
      // Of two mma: each has two of the four pairs of eight k.
      uint32_t a[2][kBlocksM][4];
#pragma unroll
      for (uint32_t i = 0; i < kBlocksM; ++i) {
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half) {
          const Vector4 row = load_shared(stage + offset_a(i * 16 + half * 8 + lane / 4, q * 4 + word));
#pragma unroll
          for (uint32_t p = 0; p < 4; ++p) {
            a[p / 2][i][p % 2 * 2 + half] = choose_bytes(row.w[p / 2], row.w[p / 2 + 2], p % 2 ? 0x7632 : 0x5410);
          }
        }
      }
#pragma unroll
      for (uint32_t j = 0; j < kBlocksN; ++j) {
        uint32_t pairs[4];
        pairs_of_codes(codes[j].w[word], pairs);
        packed[j].dequantize(word, pairs);
#pragma unroll
        for (uint32_t i = 0; i < kBlocksM; ++i) {
          mma_16x8x16(static_cast<const Bf16*>(nullptr), sum[i][j], a[0][i], pairs);
          mma_16x8x16(static_cast<const Bf16*>(nullptr), sum[i][j], a[1][i], pairs + 2);
        }
      }
    }
  }
};

#define TEMPER_MATMUL_W4(name, Packed, Tile)                              \
  TEMPER_KERNEL_OF(name, MatmulArgs, Tile::kThreads, Tile::kResident) {   \
    using Product = MatmulW4<Packed, Tile>;                               \
    TEMPER_MATMUL_BLOCK(Product, args, blockIdx.x)                        \
  }

#define TEMPER_MATMUL_W4_GROUP(name, Packed, Tile)                        \
  TEMPER_KERNEL_OF(name, MatmulGroup, Tile::kThreads, Tile::kResident) {  \
    using Product = MatmulW4<Packed, Tile>;                               \
    TEMPER_MATMUL_BLOCK_OF_GROUP(Product, args)                           \
  }
