// The noisy matrix product on sm_80's tensor cores: C [m, n] = round(law(A B^T) + bias), or C += law(A B^T) in f32.
//
//   A (m, k), B (n, k)  bf16 or f16, each stored with k last ([rows, k], k-major) or with rows last ([k, rows])
//   forward  y = x W^T      A = x [tokens, in],    B = W [out, in]       both k-major        (NT)
//   dX       dx = dy W      A = dy [tokens, out],  B = W [out, in]       B with rows last    (NN)
//   dW       dw = dy^T x    A = dy [tokens, out],  B = x [tokens, in]    both with rows last (TN)
//
// A block of threads has a tile of C; a warp kWarpM x 64 of it, whose accumulators are columns.cuh's sixteen columns a row,
// so that the error is made in registers and never stored. A and B pass through shared memory in kStages stages of 32 k.
// Where a tile is too little work for a GPU, k is split: every split writes its sums, the last one adds them in order.
#pragma once

#include "columns.cuh"
#include "mma.cuh"

// The layout of this struct is the wire between src/ops/cuda/matmul/kernel.rs and the kernels.
struct MatmulArgs {
  const void* a;
  const void* b;
  void* c;             // [m, n] of the dtype of a, or f32
  const float* bias;   // [n], or null
  uint64_t keys;       // with kKeyList the address of [m] u64 keys; else the key of row r is keys + r
  uint64_t seed;
  double* sums;        // [kNoiseSums], added to; or null
  float* partials;     // [tiles, splits, tile] f32 where splits > 1
  uint32_t* tickets;   // [tiles], zero before and after
  uint32_t m, n, k;
  uint32_t law, stream;
  float scale;
  uint32_t flags;
  uint32_t tiles_m, tiles_n, splits, split_k;  // split_k: k of a split, a multiple of kTileK
  uint32_t unused;
};

enum MatmulFlags : uint32_t {
  kKeyList = 1,
  kAlignedA = 2,   // rows of a begin at multiples of 16 bytes
  kAlignedB = 4,
  kAlignedC = 8,   // rows of c, and bias, at multiples of 8
  kF32 = 16,       // c is f32
  kAdds = 32,      // c += law(A B^T); with kF32 alone
  kARowsLast = 64, kBRowsLast = 128,  // how the operands of matmul_f32 are stored
};

constexpr uint32_t kTileK = 32;
// Tiles of C that lie below each other and are worked on at about the same time: they share B's in the L2 cache.
constexpr uint32_t kBand = 8;

template <uint32_t kTileM_, uint32_t kTileN_, uint32_t kWarpM_, uint32_t kStages_, uint32_t kResident_>
struct MatmulTile {
  static constexpr uint32_t kTileM = kTileM_, kTileN = kTileN_, kWarpM = kWarpM_, kStages = kStages_;
  static constexpr uint32_t kResident = kResident_;  // blocks of threads that shall fit a multiprocessor
  static constexpr uint32_t kWarpsN = kTileN / 64, kWarps = kTileM / kWarpM * kWarpsN, kThreads = kWarps * kWarpSize;
  static constexpr uint32_t kStageBytes = (kTileM + kTileN) * kTileK * 2;
};

// A tile of one operand in shared memory: kRows rows of kTileK elements. With k last a row has 64 bytes, two rows a line of
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

  // Begins to copy elements [first_row, +kRows) x [k, +kTileK) to `stage`; zeros beyond `rows` and `end_k`.
  __device__ void load(Shared stage, uint32_t first_k) const {
    constexpr uint32_t kPieces = kRows * kTileK / 8, kPiecesOfLine = kKLast ? kTileK / 8 : kRows / 8;
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

// A thread's columns of a row of C, from `first_column` on; rows from args.m on are nobody's.
template <typename Out>
TEMPER_DEVICE void finish_row(const MatmulArgs& args, const ColumnsCall& call, uint32_t row, uint32_t first_column,
                              float y[16], NoiseSums& sums) {
  const bool active = row < args.m;
  const uint32_t at_row = active ? row : 0;
  const uint64_t key = args.flags & kKeyList ? reinterpret_cast<const uint64_t*>(args.keys)[at_row] : args.keys + row;
  Out* out = static_cast<Out*>(args.c) + uint64_t(at_row) * args.n;
  if (args.flags & kAlignedC && first_column / 64 * 64 + 64 <= args.n) {
    finish_columns<true>(call, key, out, first_column, args.n, active, y, sums);
  } else {
    finish_columns<false>(call, key, out, first_column, args.n, active, y, sums);
  }
}

template <typename T, class Tile, bool kAKLast, bool kBKLast>
struct Matmul {
  static constexpr uint32_t kBlocksM = Tile::kWarpM / 16, kBlocksN = 8;       // of mma, of a warp
  static constexpr uint32_t kRows = 2 * kBlocksM, kPairs = kBlocksN;          // of a thread, in the tile
  static constexpr uint32_t kSums = kRows * kPairs * Tile::kThreads;          // pairs of a tile
  using OperandA = OperandTile<T, Tile::kTileM, Tile::kThreads, kAKLast>;
  using OperandB = OperandTile<T, Tile::kTileN, Tile::kThreads, kBKLast>;

  const MatmulArgs& args;
  uint32_t tile, split, first_m, first_n;  // of this block
  uint32_t warp_m, warp_n;                 // of this warp, in the tile
  uint32_t lane_a, lane_b;                 // offsets of this lane's rows of fragments
  float sum[kBlocksM][kBlocksN][4];

  __device__ Matmul(const MatmulArgs& args_) : args(args_), sum{} {
    tile = blockIdx.x / args.splits;
    split = blockIdx.x % args.splits;
    // Bands of kBand tiles below each other, band by band, each from left to right.
    const uint32_t band = tile / (kBand * args.tiles_n), in_band = tile % (kBand * args.tiles_n);
    const uint32_t height = args.tiles_m - band * kBand < kBand ? args.tiles_m - band * kBand : kBand;
    first_m = (band * kBand + in_band % height) * Tile::kTileM;
    first_n = in_band / height * Tile::kTileN;
    const uint32_t warp = threadIdx.x / kWarpSize;
    warp_m = warp / Tile::kWarpsN * Tile::kWarpM;
    warp_n = warp % Tile::kWarpsN * 64;
    // Of the four matrices that a lane's ldmatrix reads: a[1], a[3] have rows 8..15, a[2], a[3] k 8..15; b[1], b[3] have k
    // 8..15, b[2], b[3] rows 8..15. The lanes of a matrix give its lines.
    const uint32_t lane = threadIdx.x % kWarpSize, in_matrix = lane % 8, odd = lane / 8 % 2 * 8, upper = lane / 16 * 8;
    lane_a = OperandA::offset(warp_m + odd + (kAKLast ? in_matrix : 0), upper + (kAKLast ? 0 : in_matrix));
    lane_b = OperandB::offset(warp_n + upper + (kBKLast ? in_matrix : 0), odd + (kBKLast ? 0 : in_matrix));
  }

  // The sums over this split's k.
  __device__ void multiply(Shared stages) {
    const uint32_t first_k = split * args.split_k;
    const uint32_t end_k = args.k - first_k < args.split_k ? args.k : first_k + args.split_k;
    const uint32_t steps = (end_k - first_k + kTileK - 1) / kTileK;
    const OperandA a{static_cast<const T*>(args.a), kAKLast ? args.k : args.m, first_m, args.m, end_k,
                     bool(args.flags & kAlignedA)};
    const OperandB b{static_cast<const T*>(args.b), kBKLast ? args.k : args.n, first_n, args.n, end_k,
                     bool(args.flags & kAlignedB)};
    const auto load = [&](uint32_t step) {
      if (step < steps) {
        const Shared stage = stages + step % Tile::kStages * Tile::kStageBytes;
        a.load(stage, first_k + step * kTileK);
        b.load(stage + Tile::kTileM * kTileK * 2, first_k + step * kTileK);
      }
      commit_copies();
    };
    for (uint32_t step = 0; step < Tile::kStages - 1; ++step) load(step);
    wait_copies<Tile::kStages - 2>();
    __syncthreads();  // everyone's copies of step 0 are there
    Fragments fragments[kTileK / 16];
    read(fragments[0], stages, 0);
    for (uint32_t step = 0; step < steps; ++step) {
      const Shared stage = stages + step % Tile::kStages * Tile::kStageBytes;
      const Shared next = stages + (step + 1) % Tile::kStages * Tile::kStageBytes;
#pragma unroll
      for (uint32_t part = 0; part < kTileK / 16; ++part) {
        // The next fragments are on their way while these are multiplied; a step's last ones come with the next step's stage.
        if (part + 1 < kTileK / 16) {
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

  // The error, the bias and the rounding; every thread of the block must call. `stages` is free by now; scratch [kWarps] is
  // shared memory. A loop over the thread's rows, whose sums pass through memory: unrolled, as registers would want it, the
  // code would not fit the instruction cache.
  __device__ void finish(Words2* stages, double* scratch) {
    __syncthreads();  // everyone is done with the stages (no test can see it: the last fragments read are not used)
    const Words2* parts = stages + threadIdx.x;
    uint32_t count = 1;
    if (args.splits == 1) {
      write_sums(stages + threadIdx.x);
    } else {
      Words2* of_tile = reinterpret_cast<Words2*>(args.partials) + uint64_t(tile) * args.splits * kSums + threadIdx.x;
      write_sums(of_tile + uint64_t(split) * kSums);
      if (!is_last_split(scratch)) return;
      parts = of_tile;
      count = args.splits;
    }
    NoiseSums sums = {};
    const ColumnsCall call{args.seed, args.stream, args.law, args.scale, args.bias, bool(args.flags & kAdds),
                           args.sums != nullptr};
    const uint32_t lane = threadIdx.x % kWarpSize, first_column = first_n + warp_n + lane % 4 * 2;
#pragma unroll 1
    for (uint32_t i = 0; i < kRows; ++i, parts += kPairs * Tile::kThreads) {
      float y[16];
      read_sums(parts, count, y);
      const uint32_t row = first_m + warp_m + i * 8 + lane / 4;
      if (args.flags & kF32) {
        finish_row<float>(args, call, row, first_column, y, sums);
      } else {
        finish_row<T>(args, call, row, first_column, y, sums);
      }
    }
    if (call.is_measured) add_noise_sums<Tile::kWarps>(sums, scratch, args.sums);
  }

 private:
  // Of 16 k.
  struct Fragments {
    uint32_t a[kBlocksM][4], b[kBlocksN / 2][4];
  };

  __device__ void read(Fragments& to, Shared stage, uint32_t k) const {
    const Shared a = stage, b = stage + Tile::kTileM * kTileK * 2;
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

  // A thread's pairs of columns, kPairs to a row, kThreads apart.
  __device__ void write_sums(Words2* to) const {
#pragma unroll
    for (uint32_t i = 0; i < kRows; ++i) {
#pragma unroll
      for (uint32_t j = 0; j < kPairs; ++j) {
        const float* s = &sum[i / 2][j][i % 2 * 2];
        to[(i * kPairs + j) * Tile::kThreads] = Words2{{bits_of(s[0]), bits_of(s[1])}};
      }
    }
  }

  // The row at `from`, added over `count` splits in their order.
  TEMPER_DEVICE void read_sums(const Words2* from, uint32_t count, float y[16]) {
#pragma unroll
    for (uint32_t j = 0; j < 16; ++j) y[j] = 0.0f;
    for (uint32_t split = 0; split < count; ++split, from += kSums) {
#pragma unroll
      for (uint32_t j = 0; j < kPairs; ++j) {
        const Words2 pair = from[j * Tile::kThreads];
        y[2 * j] = split == 0 ? float_of(pair.w[0]) : y[2 * j] + float_of(pair.w[0]);  // 0 + -0 would lose the sign
        y[2 * j + 1] = split == 0 ? float_of(pair.w[1]) : y[2 * j + 1] + float_of(pair.w[1]);
      }
    }
  }

  // Whether all other splits of the tile have written their sums; the same in all threads.
  __device__ bool is_last_split(double* scratch) const {
    uint32_t* ticket = reinterpret_cast<uint32_t*>(scratch);
    __threadfence();
    __syncthreads();  // every thread's sums are visible before the ticket is drawn (no test can see it: blocks run in turns)
    if (threadIdx.x == 0) *ticket = atomicAdd(&args.tickets[tile], 1u);
    __syncthreads();
    const bool is_last = *ticket == args.splits - 1;
    if (is_last && threadIdx.x == 0) args.tickets[tile] = 0;
    __threadfence();
    return is_last;
  }
};

#define TEMPER_MATMUL(name, T, Tile, a_k_last, b_k_last)                  \
  TEMPER_KERNEL_OF(name, MatmulArgs, Tile::kThreads, Tile::kResident) {   \
    TEMPER_DYNAMIC_SHARED(stages);                                        \
    __shared__ double scratch[Tile::kWarps];                              \
    Matmul<T, Tile, a_k_last, b_k_last> matmul(args);                     \
    matmul.multiply(shared_address(stages));                              \
    matmul.finish(reinterpret_cast<Words2*>(stages), scratch);            \
  }

// For many rows; for few tiles of those; for the rows of a decoding step.
using Tile128x128 = MatmulTile<128, 128, 64, 4, 2>;
using Tile64x128 = MatmulTile<64, 128, 32, 4, 3>;
using Tile32x256 = MatmulTile<32, 256, 32, 4, 2>;
using Tile16x256 = MatmulTile<16, 256, 16, 4, 2>;
