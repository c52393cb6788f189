// A Hopper's instructions for matrix products, each behind one function with the same meaning on the host: barriers in shared
// memory that also count bytes (mbarrier), copies of a matrix's boxes by hardware (TMA), products of a warpgroup (wgmma),
// clusters of blocks. PTX ISA 8.7, sections 9.7.13, 9.7.9.27 and 9.7.15.
#pragma once

#include "mma.cuh"

constexpr uint32_t kWarpgroup = 128;  // threads

// A matrix in global memory and the box of it that a copy brings, as cuTensorMapEncodeTiled makes it: 16-bit elements, boxes of 64
// along the contiguous dimension, 128-byte swizzle, zeros outside.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// ---- Barriers: 8 bytes of shared memory. A phase ends when all arrivals and all expected bytes have come.

TEMPER_DEVICE void init_barrier(Shared barrier, uint32_t arrivals) {
#ifdef TEMPER_CUDA
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#else
  host::init_barrier(barrier, arrivals);
#endif
}

// Makes this thread's init_barrier seen by the cluster and by copies.
TEMPER_DEVICE void fence_barriers() {
#ifdef TEMPER_CUDA
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

TEMPER_DEVICE void arrive(Shared barrier) {
#ifdef TEMPER_CUDA
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#else
  host::arrive(barrier, host::cluster_rank(), 0);
#endif
}

// At the barrier of the same place in block `rank` of the cluster. It orders what this block sees alone, which is enough for
// reads that have ended; a release to the cluster would wait for all of the warp's writes to memory.
TEMPER_DEVICE void arrive_at(Shared barrier, uint32_t rank) {
#ifdef TEMPER_CUDA
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
#else
  host::arrive(barrier, rank, 0);
#endif
}

// One arrival, and so many bytes more that this phase waits for.
TEMPER_DEVICE void arrive_expecting(Shared barrier, uint32_t bytes) {
#ifdef TEMPER_CUDA
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#else
  host::arrive(barrier, host::cluster_rank(), bytes);
#endif
}

// Until the phase of that parity has ended; a new barrier's phase 0 is under way, so parity 1 does not wait. What does not come
// within 20 s is a fault, not a hang.
TEMPER_DEVICE void wait_barrier(Shared barrier, uint32_t parity) {
#ifdef TEMPER_CUDA
  uint64_t begin = 0;
#pragma unroll 1
  for (uint32_t tries = 0;; ++tries) {
    uint32_t has_ended;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(has_ended)
        : "r"(barrier), "r"(parity)
        : "memory");
    if (has_ended) return;
    if (tries % 1024 != 0) continue;
    uint64_t now_ns;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now_ns));
    if (begin == 0) begin = now_ns;
    if (now_ns - begin > 20000000000ull) asm volatile("trap;");
  }
#else
  host::wait_barrier(barrier, parity);
#endif
}

// ---- Clusters: two blocks on neighbouring multiprocessors that reach each other's shared memory.

TEMPER_DEVICE uint32_t cluster_rank() {
#ifdef TEMPER_CUDA
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return host::cluster_rank();
#endif
}

// Every thread of both blocks must call.
TEMPER_DEVICE void cluster_sync() {
#ifdef TEMPER_CUDA
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#else
  host::barrier();
#endif
}

// ---- Copies.

// The box at (x, y) to `to` of this block, x along the contiguous dimension; its bytes come at `barrier`.
TEMPER_DEVICE void load_box(Shared to, const TensorMap* map, uint32_t x, uint32_t y, Shared barrier) {
#ifdef TEMPER_CUDA
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
#else
  host::load_box_later(to, map, x, y, barrier, 1u << host::cluster_rank());
#endif
}

// ... to both blocks of the cluster, and to the barriers of both.
TEMPER_DEVICE void load_box_for_both(Shared to, const TensorMap* map, uint32_t x, uint32_t y, Shared barrier) {
#ifdef TEMPER_CUDA
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(uint16_t(3))
      : "memory");
#else
  host::load_box_later(to, map, x, y, barrier, 3);
#endif
}

// ---- Products of a warpgroup.

// An operand in shared memory of lines of 128 bytes, swizzled as TensorMap says, from an address whose line's swizzle is 0 on.
// k last: rows lie in lines, 8 of them 1024 bytes apart. Rows last: k in lines, 8 of them 1024 bytes apart, the next 64 rows
// `next_rows` bytes apart.
TEMPER_DEVICE uint64_t operand(Shared from, uint32_t next_rows) {
#ifdef TEMPER_CUDA
  const uint32_t address = from;
#else
  const uint32_t address = host::shared_offset(from);
#endif
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  return kSwizzle128 | uint64_t(1024 / 16) << 32 | uint64_t(next_rows / 16) << 16 | (address & 0x3ffff) / 16;
}

// Keeps the compiler from moving reads or writes of the sums across this place: a product works on them from its issue to its
// wait, of which the compiler knows nothing.
template <uint32_t kCount>
TEMPER_DEVICE void pin_sums(float (&sums)[2][kCount]) {
#ifdef TEMPER_CUDA
#pragma unroll
  for (uint32_t i = 0; i < 2 * kCount; ++i) asm volatile("" : "+f"(sums[i / kCount][i % kCount])::"memory");
#else
  (void)sums;
#endif
}

// Before the first product after others have touched the sums.
TEMPER_DEVICE void begin_products() {
#ifdef TEMPER_CUDA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

TEMPER_DEVICE void commit_products() {
#ifdef TEMPER_CUDA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  host::commit_products();
#endif
}

// Until at most kPending groups are under way.
template <int kPending>
TEMPER_DEVICE void wait_products() {
#ifdef TEMPER_CUDA
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#else
  host::wait_products(kPending);
#endif
}

// d [64, columns] (+)= a [64, 16] b [columns, 16], in f32: bf16 operands of `operand`, each with k last or rows last. Warp w of the
// warpgroup has rows 16 w .. 16 w + 15, and of those lane l rows l / 4 + {0, 8} in columns 8 j + 2 (l % 4) + {0, 1}, which are
// d[4 j + {0, 1}] and d[4 j + {2, 3}].
#define TEMPER_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TEMPER_SUMS_16(i) TEMPER_SUMS_4(i), TEMPER_SUMS_4(i + 4), TEMPER_SUMS_4(i + 8), TEMPER_SUMS_4(i + 12)

template <bool kAKLast, bool kBKLast>
TEMPER_DEVICE void multiply_async(float (&d)[64], uint64_t a, uint64_t b, bool adds) {
#ifdef TEMPER_CUDA
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
      "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
      "%60, %61, %62, %63"
      "}, %64, %65, p, 1, 1, %67, %68;\n}"
      : TEMPER_SUMS_16(0), TEMPER_SUMS_16(16), TEMPER_SUMS_16(32), TEMPER_SUMS_16(48)
      : "l"(a), "l"(b), "r"(uint32_t(adds)), "n"(!kAKLast), "n"(!kBKLast));
#else
  host::multiply_later(d, a, b, sizeof d / sizeof *d * 2, adds, kAKLast, kBKLast);
#endif
}

template <bool kAKLast, bool kBKLast>
TEMPER_DEVICE void multiply_async(float (&d)[96], uint64_t a, uint64_t b, bool adds) {
#ifdef TEMPER_CUDA
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
      "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
      "%60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, "
      "%72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "
      "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
      "}, %96, %97, p, 1, 1, %99, %100;\n}"
      : TEMPER_SUMS_16(0), TEMPER_SUMS_16(16), TEMPER_SUMS_16(32), TEMPER_SUMS_16(48),
        TEMPER_SUMS_16(64), TEMPER_SUMS_16(80)
      : "l"(a), "l"(b), "r"(uint32_t(adds)), "n"(!kAKLast), "n"(!kBKLast));
#else
  host::multiply_later(d, a, b, sizeof d / sizeof *d * 2, adds, kAKLast, kBKLast);
#endif
}

// Registers of a thread: more for warpgroups that hold sums, from those that only copy.
template <uint32_t kCount>
TEMPER_DEVICE void take_registers() {
#ifdef TEMPER_CUDA
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}
template <uint32_t kCount>
TEMPER_DEVICE void give_registers() {
#ifdef TEMPER_CUDA
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}
