// The noisy matrix product on sm_90a: the same C [m, n] = round(law(A B^T) + bias) as matmul.cuh, of bf16 in any layout.
//
// A block has three warpgroups. One thread of the first brings A and B to shared memory (TMA), stage after stage, tile after tile.
// The other two multiply (wgmma), each a tile of its own, in turns: while one draws the errors of its tile and writes it, the
// other has the tensor cores. Two blocks are a cluster: they have tiles one below the other and share B, of which each brings
// half to both, because the L2 cache could not feed every multiprocessor with both operands. Blocks go from tile to tile until
// none is left.
#pragma once

#include "hopper.cuh"
#include "matmul_tile.cuh"

// The layout of this struct is the wire between src/ops/cuda/matmul/kernel.rs and the kernels.
struct MatmulSm90Args {
  TensorMap a, b;  // boxes: see box_a and box_b
  MatmulArgs rest;
};

template <uint32_t kTileN_, uint32_t kStages_, bool kAKLast, bool kBKLast>
struct MatmulSm90 {
  static constexpr uint32_t kTileM = 128, kTileN = kTileN_, kStepK = 64, kStages = kStages_, kBlocks = 2;
  static constexpr uint32_t kThreads = 3 * kWarpgroup, kWarpsOfGroup = kWarpgroup / kWarpSize;
  // Shared memory: stages, the sums of a tile on their way through the epilogue, barriers, each warp's sums of its noise.
  static constexpr uint32_t kBytesA = kTileM * kStepK * 2, kBytesB = kTileN * kStepK * 2, kStageBytes = kBytesA + kBytesB;
  static constexpr uint32_t kColumnBlocks = kTileN / 64, kItems = kTileM / 32 * kColumnBlocks;  // of a thread: (row, block)
  static constexpr uint32_t kSums = kStages * kStageBytes, kBarriers = kSums + kTileM * kTileN * 4;
  static constexpr uint32_t kAfterBarriers = kBarriers + (2 * kStages + 4) * 8;
  static constexpr uint32_t kTotals = 2 * kWarpsOfGroup * kNoiseSums, kSharedBytes = kAfterBarriers + kTotals * 8;
  // Boxes of a copy, (along the contiguous dimension) x (along the other).
  static constexpr uint32_t kBoxA = kAKLast ? kTileM : kStepK, kBoxB = kBKLast ? kTileN / kBlocks : kStepK / kBlocks;

  const MatmulSm90Args& all;
  const MatmulArgs& args;
  Shared shared;
  Words2* sums;            // [kItems, 8, kWarpgroup]
  double* totals;          // [2 kWarpsOfGroup, kNoiseSums]
  uint32_t rank, cluster, clusters, tiles, steps;

  __device__ MatmulSm90(const MatmulSm90Args& args_, uint8_t* memory) : all(args_), args(args_.rest) {
    shared = shared_address(memory);
    sums = reinterpret_cast<Words2*>(memory + kSums);
    totals = reinterpret_cast<double*>(memory + kAfterBarriers);
    rank = cluster_rank();
    cluster = blockIdx.x / kBlocks, clusters = gridDim.x / kBlocks;
    tiles = args.tiles_m * args.tiles_n;  // of a cluster: kBlocks kTileM rows
    steps = (args.k + kStepK - 1) / kStepK;
  }

  __device__ void run() {
    if (threadIdx.x == 0) {
      for (uint32_t stage = 0; stage < kStages; ++stage) {
        init_barrier(full(stage), 1);
        init_barrier(empty(stage), kBlocks * kWarpsOfGroup);
      }
      for (uint32_t group = 0; group < 2; ++group) {
        init_barrier(may_multiply(group), kWarpgroup);
        init_barrier(may_finish(group), kWarpgroup);
      }
      fence_barriers();
    }
    if (threadIdx.x < kTotals) totals[threadIdx.x] = 0.0;
    cluster_sync();  // both blocks' barriers are there, and the totals' zeros
    const uint32_t warpgroup = threadIdx.x / kWarpgroup;
    if (warpgroup == 0) {
      give_registers<24>();
      if (threadIdx.x == 0) bring();
    } else {
      take_registers<240>();
      multiply(warpgroup - 1);
    }
    // Nobody leaves while the other block may still write to it or arrive at its barriers.
    cluster_sync();
    // Once, not tile by tile: what all blocks add to one place would hold up the copies behind it. By threads that have registers.
    const uint32_t s = threadIdx.x - kWarpgroup;
    if (args.sums == nullptr || s >= kNoiseSums) return;
    double total = 0.0;
    for (uint32_t i = s; i < kTotals; i += kNoiseSums) total += totals[i];
    atomicAdd(noise_slot(args.sums) + s, total);
  }

 private:
  __device__ Shared full(uint32_t stage) const { return shared + kBarriers + stage * 8; }
  __device__ Shared empty(uint32_t stage) const { return full(kStages + stage); }
  __device__ Shared may_multiply(uint32_t group) const { return full(2 * kStages + group); }
  __device__ Shared may_finish(uint32_t group) const { return full(2 * kStages + 2 + group); }

  // Where the ring of stages is after so many steps.
  struct Ring {
    uint32_t stage, parity;

    __device__ explicit Ring(uint32_t step) : stage(step % kStages), parity(step / kStages % 2) {}
    __device__ void advance() {
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
  };

  // All of A's rows and half of B's, or of B's k where its rows are last.
  __device__ void bring() const {
    Ring ring(0);
    for (uint32_t tile = cluster; tile < tiles; tile += clusters) {
      const TilePlace place(tile, args.tiles_m, args.tiles_n);
      const uint32_t first_m = (place.m * kBlocks + rank) * kTileM, first_n = place.n * kTileN;
      for (uint32_t step = 0; step < steps; ++step, ring.advance()) {
        const uint32_t k = step * kStepK;
        const Shared a = shared + ring.stage * kStageBytes, b = a + kBytesA, barrier = full(ring.stage);
        wait_barrier(empty(ring.stage), ring.parity ^ 1);  // both blocks are done with what was there
        arrive_expecting(barrier, kStageBytes);
        if constexpr (kAKLast) {
          load_box(a, &all.a, k, first_m, barrier);
        } else {
          for (uint32_t i = 0; i < kTileM / 64; ++i) load_box(a + i * 128 * kStepK, &all.a, first_m + i * 64, k, barrier);
        }
        if constexpr (kBKLast) {
          load_box_for_both(b + rank * (kBytesB / kBlocks), &all.b, k, first_n + rank * kBoxB, barrier);
        } else {
          for (uint32_t i = 0; i < kTileN / 64; ++i) {
            load_box_for_both(b + (i * kStepK + rank * kBoxB) * 128, &all.b, first_n + i * 64, k + rank * kBoxB, barrier);
          }
        }
      }
    }
  }

  // Every other tile, `group` first.
  __device__ void multiply(uint32_t group) const {
    uint32_t first_step = group * steps, turn = 0;
    double* of_warp = totals + (threadIdx.x / kWarpSize - kWarpsOfGroup) * kNoiseSums;
    for (uint32_t tile = cluster + group * clusters; tile < tiles; tile += 2 * clusters, turn ^= 1) {
      float sum[2][kTileN / 2];  // of 64 rows each
      // The first of group 0 waits for nobody, and group 1 for the one of group 0 before it.
      wait_barrier(may_multiply(group), group == 0 ? turn ^ 1 : turn);
      multiply_tile(Ring(first_step), group, sum);
      wait_barrier(may_finish(group), group == 0 ? turn ^ 1 : turn);
      finish_tile(tile, sum, of_warp);
      arrive(may_finish(group ^ 1));
      first_step += 2 * steps;
    }
  }

  __device__ void multiply_tile(Ring ring, uint32_t group, float (&sum)[2][kTileN / 2]) const {
    multiply_stage<true>(ring, sum);
    for (uint32_t step = 1; step < steps; ++step) {
      const uint32_t before = ring.stage;
      ring.advance();
      multiply_stage<false>(ring, sum);
      wait_products<1>();
      release(before);
    }
    arrive(may_multiply(group ^ 1));
    wait_products<0>();
    pin_sums(sum);
    release(ring.stage);
  }

  template <bool kIsFirst>
  __device__ void multiply_stage(const Ring& ring, float (&sum)[2][kTileN / 2]) const {
    const Shared a = shared + ring.stage * kStageBytes, b = a + kBytesA;
    wait_barrier(full(ring.stage), ring.parity);
    begin_products();
#pragma unroll
    for (uint32_t k = 0; k < kStepK; k += 16) {
      const uint64_t of_b = operand(b + k * (kBKLast ? 2 : 128), 128 * kStepK);
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        const uint64_t of_a = operand(a + half * 128 * 64 + k * (kAKLast ? 2 : 128), 128 * kStepK);
        multiply_async<kAKLast, kBKLast>(sum[half], of_a, of_b, !(kIsFirst && k == 0));
      }
    }
    commit_products();
  }

  // Tells the threads that bring, in both blocks, that this warp has read the stage.
  __device__ void release(uint32_t stage) const {
    const uint32_t lane = threadIdx.x % kWarpSize;
    if (lane < kBlocks) arrive_at(empty(stage), lane);
  }

  // A loop over the thread's (row, block of 64 columns), whose sums pass through memory: unrolled, the code would be too long.
  __device__ void finish_tile(uint32_t tile, const float (&sum)[2][kTileN / 2], double* of_warp) const {
    const TilePlace place(tile, args.tiles_m, args.tiles_n);
    const uint32_t lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize % kWarpsOfGroup;
    const uint32_t first_row = (place.m * kBlocks + rank) * kTileM + warp * 16 + lane / 4;
    const uint32_t first_column = place.n * kTileN + lane % 4 * 2;
    const ColumnsCall call{args.seed, args.stream, args.law, args.scale, args.bias, bool(args.flags & kAdds),
                           args.sums != nullptr};
    NoiseSums noise = {};
    Words2* mine = sums + threadIdx.x % kWarpgroup;
    write_sums(mine, sum);
#pragma unroll 1
    for (uint32_t item = 0; item < kItems; ++item, mine += 8 * kWarpgroup) {
      const uint32_t in_tile = item / kColumnBlocks, row = first_row + in_tile / 2 * 64 + in_tile % 2 * 8;
      if (row - lane / 4 >= args.m) break;  // no row of the warp is left
      float y[16];
#pragma unroll
      for (uint32_t j = 0; j < 8; ++j) {
        const Words2 pair = mine[j * kWarpgroup];
        y[2 * j] = float_of(pair.w[0]), y[2 * j + 1] = float_of(pair.w[1]);
      }
      const uint32_t column = first_column + item % kColumnBlocks * 64;
      if (args.flags & kF32) {
        finish_row<float>(args, call, row, column, y, noise);
      } else {
        finish_row<Bf16>(args, call, row, column, y, noise);
      }
    }
    if (call.is_measured) add_warp_noise_sums(noise, of_warp);
  }

  // Item by item, eight pairs of columns each, a warpgroup's threads side by side.
  __device__ void write_sums(Words2* to, const float (&sum)[2][kTileN / 2]) const {
#pragma unroll
    for (uint32_t item = 0; item < kItems; ++item) {
      const uint32_t row = item / kColumnBlocks, block = item % kColumnBlocks;
#pragma unroll
      for (uint32_t j = 0; j < 8; ++j) {
        const float* s = &sum[row / 2][(block * 8 + j) * 4 + row % 2 * 2];
        to[(item * 8 + j) * kWarpgroup] = Words2{{bits_of(s[0]), bits_of(s[1])}};
      }
    }
  }
};

#define TEMPER_MATMUL_SM90(name, tile_n, stages, a_k_last, b_k_last)                 \
  TEMPER_CLUSTER_KERNEL(name, MatmulSm90Args, 3 * kWarpgroup, 2) {                   \
    TEMPER_DYNAMIC_SHARED(memory);                                                   \
    MatmulSm90<tile_n, stages, a_k_last, b_k_last>(args, memory).run();              \
  }
