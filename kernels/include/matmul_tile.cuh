// A tile of C in the accumulators of a block of threads: which tile it is, and its end: the sums of all splits of k, the error,
// the bias, one rounding. include/matmul.cuh and matmul_w4.cuh fill the accumulators.
//
// A warp has kWarpM x 64 of the tile, in mma's layout, which is columns.cuh's sixteen columns a row: so the error is made where
// the sums are, and never stored.
#pragma once

#include "columns.cuh"

// The layout of this struct is the wire between src/ops/cuda/matmul/kernel.rs and the kernels.
struct MatmulArgs {
  const void* a;
  const void* b;       // where packed, its codes: [n, k / 2] u8
  void* c;             // [m, n] of the dtype of a, or f32
  const float* bias;   // [n], or null
  uint64_t keys;       // with kKeyList the address of [m] u64 keys; else the key of row r is keys + r
  uint64_t seed;
  double* sums;        // [kNoiseSlots, kNoiseStride], added to; or null
  float* partials;     // [tiles, splits, tile] f32 where splits > 1
  uint32_t* tickets;   // [tiles], zero before and after
  const uint8_t* scales;  // of a packed b: [n, blocks of k]
  const float* amax;      // of a packed b in nvfp4: [1]
  uint32_t m, n, k;
  uint32_t law, stream;
  float scale;
  uint32_t flags;
  uint32_t tiles_m, tiles_n, splits, split_k;  // split_k: k of a split, a multiple of a stage's
  uint32_t unused;
};

// Up to kGroup products of one kernel, with blocks of their own in one grid. As src/ops/cuda/matmul/group.rs.
constexpr uint32_t kGroup = 3;
struct MatmulGroup {
  MatmulArgs products[kGroup];
  uint32_t first_block[kGroup];
  uint32_t count;
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

// Tiles of C that lie below each other and are worked on at about the same time: they share B's in the L2 cache.
constexpr uint32_t kBand = 8;

// Which tile of tiles_m x tiles_n is the `tile`th: in bands of kBand tiles below each other, band by band, each from left to right.
struct TilePlace {
  uint32_t m, n;

  __device__ TilePlace(uint32_t tile, uint32_t tiles_m, uint32_t tiles_n) {
    const uint32_t band = tile / (kBand * tiles_n), in_band = tile % (kBand * tiles_n);
    const uint32_t height = tiles_m - band * kBand < kBand ? tiles_m - band * kBand : kBand;
    m = band * kBand + in_band % height;
    n = in_band / height;
  }
};

template <uint32_t kTileM_, uint32_t kTileN_, uint32_t kWarpM_, uint32_t kStages_, uint32_t kResident_>
struct MatmulTile {
  static constexpr uint32_t kTileM = kTileM_, kTileN = kTileN_, kWarpM = kWarpM_, kStages = kStages_;
  static constexpr uint32_t kResident = kResident_;  // blocks of threads that shall fit a multiprocessor
  static constexpr uint32_t kWarpsN = kTileN / 64, kWarps = kTileM / kWarpM * kWarpsN, kThreads = kWarps * kWarpSize;
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

// Of T where it is not f32.
template <typename T, class Tile>
struct TileOfC {
  static constexpr uint32_t kBlocksM = Tile::kWarpM / 16, kBlocksN = 8;  // of mma, of a warp
  static constexpr uint32_t kRows = 2 * kBlocksM, kPairs = kBlocksN;     // of a thread, in the tile
  static constexpr uint32_t kSums = kRows * kPairs * Tile::kThreads;     // pairs of a tile
  static constexpr uint32_t kScratch = Tile::kWarps * kNoiseSums + 1;    // the last for a ticket

  const MatmulArgs& args;
  uint32_t tile, split, first_m, first_n;  // of this block
  uint32_t warp_m, warp_n;                 // of this warp, in the tile
  float sum[kBlocksM][kBlocksN][4];

  // `block` of the product's.
  __device__ TileOfC(const MatmulArgs& args_, uint32_t block) : args(args_), sum{} {
    tile = block / args.splits;
    split = block % args.splits;
    const TilePlace place(tile, args.tiles_m, args.tiles_n);
    first_m = place.m * Tile::kTileM;
    first_n = place.n * Tile::kTileN;
    const uint32_t warp = threadIdx.x / kWarpSize;
    warp_m = warp / Tile::kWarpsN * Tile::kWarpM;
    warp_n = warp % Tile::kWarpsN * 64;
  }

  // [first, end) of this split's k.
  __device__ uint32_t first_k() const { return split * args.split_k; }
  __device__ uint32_t end_k() const {
    return args.k - first_k() < args.split_k ? args.k : first_k() + args.split_k;
  }

  // The error, the bias and the rounding; every thread of the block must call. `stages` is free by now; scratch [kScratch] is
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
      const uint32_t of_warp = first_m + warp_m + i * 8, row = of_warp + lane / 4;
      if (of_warp >= args.m) break;  // a decoding step has few rows
      float y[16];
      read_sums(parts, count, y);
      if (args.flags & kF32) {
        finish_row<float>(args, call, row, first_column, y, sums);
      } else {
        finish_row<T>(args, call, row, first_column, y, sums);
      }
    }
    if (call.is_measured) add_noise_sums<Tile::kWarps>(sums, scratch, args.sums);
  }

 private:
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

  // The row at `from`, added over `count` splits in their order; of kAtOnce splits the loads are under way together.
  TEMPER_DEVICE void read_sums(const Words2* from, uint32_t count, float y[16]) {
#pragma unroll
    for (uint32_t j = 0; j < kPairs; ++j) {
      const Words2 pair = from[j * Tile::kThreads];
      y[2 * j] = float_of(pair.w[0]), y[2 * j + 1] = float_of(pair.w[1]);
    }
    constexpr uint32_t kAtOnce = 4;
#pragma unroll 1
    for (uint32_t split = 1; split < count; split += kAtOnce) {
      Words2 pairs[kAtOnce][kPairs];
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (uint32_t j = 0; j < kPairs && split + i < count; ++j) {
          pairs[i][j] = from[(split + i) * kSums + j * Tile::kThreads];
        }
      }
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (uint32_t j = 0; j < kPairs && split + i < count; ++j) {
          y[2 * j] += float_of(pairs[i][j].w[0]);
          y[2 * j + 1] += float_of(pairs[i][j].w[1]);
        }
      }
    }
  }

  // Whether all other splits of the tile have written their sums; the same in all threads.
  __device__ bool is_last_split(double* scratch) const {
    uint32_t* ticket = reinterpret_cast<uint32_t*>(&scratch[kScratch - 1]);
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

// The body of a kernel: one block of a product, Product a TileOfC.
#define TEMPER_MATMUL_BLOCK(Product, args, block)            \
  TEMPER_DYNAMIC_SHARED(stages);                             \
  __shared__ double scratch[Product::kScratch];              \
  Product matmul(args, block);                               \
  matmul.multiply(shared_address(stages));                   \
  matmul.finish(reinterpret_cast<Words2*>(stages), scratch);

#define TEMPER_MATMUL_BLOCK_OF_GROUP(Product, group)                                            \
  uint32_t of_group = 0;                                                                        \
  while (of_group + 1 < group.count && blockIdx.x >= group.first_block[of_group + 1]) ++of_group; \
  const uint32_t block = blockIdx.x - group.first_block[of_group];                              \
  TEMPER_MATMUL_BLOCK(Product, group.products[of_group], block)
