// The noisy matrix product on sm_80's tensor cores: C [m, n] = round(law(A B^T) + bias), or C += law(A B^T) in f32.
//
//   A (m, k), B (n, k)  bf16 or f16, each stored with k last ([rows, k], k-major) or with rows last ([k, rows])
//   forward  y = x W^T      A = x [tokens, in],    B = W [out, in]       both k-major        (NT)
//   dX       dx = dy W      A = dy [tokens, out],  B = W [out, in]       B with rows last    (NN)
//   dW       dw = dy^T x    A = dy [tokens, out],  B = x [tokens, in]    both with rows last (TN)
//
// A block of threads has a tile of C (matmul_tile.cuh). A and B pass through shared memory in kStages stages of 32 k.
#pragma once

#include "matmul_tile.cuh"
#include "mma.cuh"

constexpr uint32_t kStepK = 32;

// A tile of one operand in shared memory: kRows rows of kStepK elements. With k last a row has 64 bytes, two rows a line of
// 128; with rows last a k has 2 kRows bytes. Pieces of 16 bytes change places within their line, so that the eight pieces that
// ldmatrix reads at once lie in different banks.
template <typename T, uint32_t kRows, uint32_t kThreads, bool kKLast>
struct OperandTile {
  const T* from;
  uint32_t leading, first_row, rows, end_k;
  bool is_aligned;

  TEMPER_DEVICE uint32_t offset(uint32_t row, uint32_t k) {
    if constexpr (kKLast) {
      const uint32_t line = row / 2, piece = row % 2 * 4 + k / 8;
      return line * 128 + (piece ^ (line % 8)) * 16;
    } else {
      const uint32_t piece = row / 8;
      return k * (kRows * 2) + (piece ^ (k % 8)) * 16;
    }
  }

  // Begins to copy elements [first_row, +kRows) x [k, +kStepK) to `stage`; zeros beyond `rows` and `end_k`.
  __device__ void load(Shared stage, uint32_t first_k) const {
    constexpr uint32_t kPieces = kRows * kStepK / 8, kPiecesOfLine = kKLast ? kStepK / 8 : kRows / 8;
    constexpr uint32_t kLines = kThreads / kPiecesOfLine;  // between a thread's pieces
    static_assert(kThreads % kPiecesOfLine == 0 && kLines % (kKLast ? 16 : 8) == 0,
                  "a thread's pieces lie in the same place of their lines");
    static_assert(kPieces % kThreads == 0 || kPieces < kThreads, "threads have equally many pieces, or some none");
    if (kPieces < kThreads && threadIdx.x >= kPieces) return;
    constexpr uint32_t kOfThread = kPieces < kThreads ? 1 : kPieces / kThreads;
    const uint32_t line = threadIdx.x / kPiecesOfLine, in_line = threadIdx.x % kPiecesOfLine * 8;
    const uint32_t row = first_row + (kKLast ? line : in_line), k = first_k + (kKLast ? in_line : line);
    const T* piece = from + (kKLast ? uint64_t(row) * leading + k : uint64_t(k) * leading + row);
    const Shared to = stage + offset(kKLast ? line : in_line, kKLast ? in_line : line);
    constexpr uint32_t kToNext = kLines * (kKLast ? 64 : kRows * 2);
    if (is_aligned) {
#pragma unroll
      for (uint32_t i = 0; i < kOfThread; ++i, piece += kLines * uint64_t(leading)) {
        const bool inside = (kKLast ? row + i * kLines : row) < rows && (kKLast ? k : k + i * kLines) < end_k;
        copy_async(to + i * kToNext, piece, inside);
      }
      return;
    }
#pragma unroll 1
    for (uint32_t i = 0; i < kOfThread; ++i, piece += kLines * uint64_t(leading)) {
      const uint32_t at_row = kKLast ? row + i * kLines : row, at_k = kKLast ? k : k + i * kLines;
      const bool inside = at_row < rows && at_k < end_k;
      store_shared(to + i * kToNext, by_element(piece, inside ? (kKLast ? end_k - at_k : rows - at_row) : 0));
    }
  }

  // Of a warp's fragments: 16 rows from `row` on (a multiple of 16) times i, 16 k from `k` on; from the offset of lane
  // (row, k) for i = 0, k = 0. The lanes' places within a line depend on neither.
  TEMPER_DEVICE uint32_t fragment(uint32_t lane_offset, uint32_t i, uint32_t k) {
    if constexpr (kKLast) {
      return (lane_offset ^ k * 2) + i * 1024;
    } else {
      return (lane_offset ^ i * 32) + k * (kRows * 2);
    }
  }

  // The first `count` of eight elements, the rest 0.
  TEMPER_DEVICE Vector4 by_element(const T* from, uint32_t count) {
    Vector4 value = {{0, 0, 0, 0}};
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
      if (i < count) value.w[i / 2] |= uint32_t(from[i].bits) << (16 * (i % 2));
    }
    return value;
  }
};

template <typename T, class Tile, bool kAKLast, bool kBKLast>
struct Matmul : TileOfC<T, Tile> {
  using Base = TileOfC<T, Tile>;
  using Base::args, Base::first_m, Base::first_n, Base::warp_m, Base::warp_n, Base::sum;
  static constexpr uint32_t kBlocksM = Base::kBlocksM, kBlocksN = Base::kBlocksN;
  static constexpr uint32_t kStageBytes = (Tile::kTileM + Tile::kTileN) * kStepK * 2;
  using OperandA = OperandTile<T, Tile::kTileM, Tile::kThreads, kAKLast>;
  using OperandB = OperandTile<T, Tile::kTileN, Tile::kThreads, kBKLast>;

  uint32_t lane_a, lane_b;  // offsets of this lane's rows of fragments

  __device__ Matmul(const MatmulArgs& args_, uint32_t block) : Base(args_, block) {
    // Of the four matrices that a lane's ldmatrix reads: a[1], a[3] have rows 8..15, a[2], a[3] k 8..15; b[1], b[3] have k
    // 8..15, b[2], b[3] rows 8..15. The lanes of a matrix give its lines.
    const uint32_t lane = threadIdx.x % kWarpSize, in_matrix = lane % 8, odd = lane / 8 % 2 * 8, upper = lane / 16 * 8;
    lane_a = OperandA::offset(warp_m + odd + (kAKLast ? in_matrix : 0), upper + (kAKLast ? 0 : in_matrix));
    lane_b = OperandB::offset(warp_n + upper + (kBKLast ? in_matrix : 0), odd + (kBKLast ? 0 : in_matrix));
  }

  // The sums over this split's k.
  __device__ void multiply(Shared stages) {
    const uint32_t first_k = Base::first_k(), end_k = Base::end_k();
    const uint32_t steps = (end_k - first_k + kStepK - 1) / kStepK;
    const OperandA a{static_cast<const T*>(args.a), kAKLast ? args.k : args.m, first_m, args.m, end_k,
                     bool(args.flags & kAlignedA)};
    const OperandB b{static_cast<const T*>(args.b), kBKLast ? args.k : args.n, first_n, args.n, end_k,
                     bool(args.flags & kAlignedB)};
    const auto load = [&](uint32_t step) {
      if (step < steps) {
        const Shared stage = stages + step % Tile::kStages * kStageBytes;
        a.load(stage, first_k + step * kStepK);
        b.load(stage + Tile::kTileM * kStepK * 2, first_k + step * kStepK);
      }
      commit_copies();
    };
    for (uint32_t step = 0; step < Tile::kStages - 1; ++step) load(step);
    wait_copies<Tile::kStages - 2>();
    __syncthreads();  // everyone's copies of step 0 are there
    Fragments fragments[kStepK / 16];
    read(fragments[0], stages, 0);
    for (uint32_t step = 0; step < steps; ++step) {
      const Shared stage = stages + step % Tile::kStages * kStageBytes;
      const Shared next = stages + (step + 1) % Tile::kStages * kStageBytes;
#pragma unroll
      for (uint32_t part = 0; part < kStepK / 16; ++part) {
        // The next fragments are on their way while these are multiplied; a step's last ones come with the next step's stage.
        if (part + 1 < kStepK / 16) {
          read(fragments[part + 1], stage, (part + 1) * 16);
        } else {
          load(step + Tile::kStages - 1);
          wait_copies<Tile::kStages - 2>();
          __syncthreads();  // everyone's copies of the next step are there, and everyone has read this one's
          read(fragments[0], next, 0);
        }
        multiply(fragments[part]);
      }
    }
  }

 private:
  // Of 16 k.
  struct Fragments {
    uint32_t a[kBlocksM][4], b[kBlocksN / 2][4];
  };

  __device__ void read(Fragments& to, Shared stage, uint32_t k) const {
    const Shared a = stage, b = stage + Tile::kTileM * kStepK * 2;
#pragma unroll
    for (uint32_t i = 0; i < kBlocksM; ++i) load_fragment<kAKLast>(to.a[i], a + OperandA::fragment(lane_a, i, k));
#pragma unroll
    for (uint32_t j = 0; j < kBlocksN / 2; ++j) {
      load_fragment<kBKLast>(to.b[j], b + OperandB::fragment(lane_b, j, k));
    }
  }

  template <bool kKLast>
  TEMPER_DEVICE void load_fragment(uint32_t to[4], Shared row) {
    if constexpr (kKLast) {
      load_matrices(to, row);
    } else {
      load_matrices_transposed(to, row);
    }
  }

  __device__ void multiply(const Fragments& from) {
    const T* dtype = nullptr;
#pragma unroll
    for (uint32_t i = 0; i < kBlocksM; ++i) {
#pragma unroll
      for (uint32_t j = 0; j < kBlocksN; ++j) mma_16x8x16(dtype, sum[i][j], from.a[i], &from.b[j / 2][j % 2 * 2]);
    }
  }
};

#define TEMPER_MATMUL(name, T, Tile, a_k_last, b_k_last)                  \
  TEMPER_KERNEL_OF(name, MatmulArgs, Tile::kThreads, Tile::kResident) {   \
    using Product = Matmul<T, Tile, a_k_last, b_k_last>;                  \
    TEMPER_MATMUL_BLOCK(Product, args, blockIdx.x)                        \
  }

#define TEMPER_MATMUL_GROUP(name, T, Tile)                                \
  TEMPER_KERNEL_OF(name, MatmulGroup, Tile::kThreads, Tile::kResident) {  \
    using Product = Matmul<T, Tile, true, true>;                          \
    TEMPER_MATMUL_BLOCK_OF_GROUP(Product, args)                           \
  }

// For many rows; for few tiles of those; for the rows of a decoding step.
using Tile128x128 = MatmulTile<128, 128, 64, 4, 2>;
using Tile64x128 = MatmulTile<64, 128, 32, 4, 3>;
using Tile32x256 = MatmulTile<32, 256, 32, 4, 2>;
using Tile16x256 = MatmulTile<16, 256, 16, 4, 2>;
