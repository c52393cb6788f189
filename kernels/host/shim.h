// Runs a CUDA kernel on the host: one fiber per thread of a block, block after block. Tests only.
//
// What it shows: indexing, arithmetic (bit for bit, with -ffp-contract=off), a missing __syncthreads (shared memory
// starts as NaN and threads run in the order a test asks for), a missing wait for an asynchronous copy, a barrier or shuffle
// that not all threads reach (reported, not hung). What it cannot show: timing, memory ordering between blocks, hardware limits.
//
// A thread runs until it meets a barrier or shuffle, then the next one runs. A warp shuffle is one exchange: write the value,
// wait for the warp, read, wait again.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>

#define __device__
#define __forceinline__ inline
// A section of its own, so that a block can begin with all of it set to NaN. Only in extern "C" kernels: GCC gives a
// template's statics another section.
#define __shared__ static __attribute__((section("temper_shared")))

struct dim3 {
  uint32_t x = 1, y = 1, z = 1;
};

namespace host {

constexpr int kWarp = 32;

struct ThreadState {
  dim3 thread, block, block_dim, grid_dim;
};

extern ThreadState current;  // of the running fiber

// A kernel under its name (TEMPER_KERNEL of include/portable.cuh makes one of each): `run` is one thread of it.
struct Entry {
  const char* name;
  size_t args_bytes;
  uint32_t cluster;  // blocks of one
  void (*run)(const void* args);
  const Entry* next;

  Entry(const char* name, size_t args_bytes, uint32_t cluster, void (*run)(const void*));
};

// Runs `kernel` for every thread of a one-dimensional grid, with `shared_bytes` of dynamic shared memory, a cluster of blocks at a
// time. Returns null, or what went wrong. One launch at a time; concurrent callers wait.
const char* launch(uint32_t grid, uint32_t block, uint32_t shared_bytes, const std::function<void()>& kernel,
                   uint32_t cluster = 1);

// Launches the kernel of that name with its argument struct.
const char* launch_entry(const char* name, uint32_t grid, uint32_t block, uint32_t shared_bytes, const void* args,
                         size_t args_bytes);

// The dynamic shared memory of the block; begins as NaN, aligned to 1024 bytes.
uint8_t* dynamic_shared();

// 0: all threads in turns, ascending; 1: the last warp as far as it gets, then the one before it; else all in turns, in a
// permutation drawn anew after every barrier. Of the launches of the calling thread. Blocks run to their end one after the other: ascending, the last first, or in a
// permutation.
void set_thread_order(uint32_t order);

void barrier();  // of the block; of the cluster, where there is one
uint32_t cluster_rank();

// What a warp's lanes show each other; every lane must call show, read, and call seen.
constexpr size_t kShownBytes = 32;
void show(const void* mine, size_t bytes);
const void* shown(int lane);
void seen();

template <typename T>
T shuffle(T value, int from_lane) {
  static_assert(sizeof(T) <= 8, "shuffles move up to 8 bytes");
  show(&value, sizeof(T));
  memcpy(&value, shown(from_lane), sizeof(T));
  seen();
  return value;
}

// cp.async: a copy happens as late as it may, when its thread waits for its group. source null: zeros.
void copy_later(void* to, const void* source, size_t bytes);
void commit_copies();
void wait_copies(size_t pending_groups);

// hopper.cpp, for include/hopper.cuh. Bytes of a copy come as late as they may, when somebody waits for them; products are made
// when their warp waits for them.
uint32_t shared_offset(const uint8_t* shared);
void init_barrier(uint8_t* barrier, uint32_t arrivals);
void arrive(uint8_t* barrier, uint32_t rank, uint32_t expected_bytes);
void wait_barrier(uint8_t* barrier, uint32_t parity);
void load_box_later(uint8_t* to, const void* map, uint32_t x, uint32_t y, uint8_t* barrier, uint32_t ranks);
void multiply_later(float* d, uint64_t a, uint64_t b, uint32_t columns, bool adds, bool a_k_last, bool b_k_last);
void commit_products();
void wait_products(size_t pending_groups);

// What takes the place of a CUtensorMap: 16-bit elements [rows, columns], a row `stride` bytes after the other, and a box's rows.
struct Map {
  const uint8_t* from;
  uint64_t columns, rows, stride, box_rows;
  uint64_t unused[11];
};

}  // namespace host

#define threadIdx (host::current.thread)
#define blockIdx (host::current.block)
#define blockDim (host::current.block_dim)
#define gridDim (host::current.grid_dim)

inline void __syncthreads() { host::barrier(); }
inline void __threadfence() {}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask, int width = host::kWarp) {
  const int lane = threadIdx.x % host::kWarp;
  const int other = lane ^ mask;
  return host::shuffle(value, other / width == lane / width ? other : lane);
}

template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned delta, int width = host::kWarp) {
  const int lane = threadIdx.x % host::kWarp;
  const int other = lane + int(delta);
  return host::shuffle(value, other / width == lane / width ? other : lane);
}

template <typename T>
T __shfl_sync(unsigned, T value, int from_lane) {
  return host::shuffle(value, from_lane);
}

inline uint32_t __reduce_max_sync(unsigned mask, uint32_t value) {
  for (int bit = 1; bit < host::kWarp; bit *= 2) {
    const uint32_t other = __shfl_xor_sync(mask, value, bit);
    value = other > value ? other : value;
  }
  return value;
}
inline bool __any_sync(unsigned mask, bool value) { return __reduce_max_sync(mask, value) != 0; }
inline bool __all_sync(unsigned mask, bool value) { return !__any_sync(mask, !value); }

// Only one fiber runs at a time, so these need no lock.
template <typename T, typename U>
T atomicAdd(T* at, U value) {
  const T old = *at;
  *at = old + T(value);
  return old;
}

template <typename T>
T atomicMax(T* at, T value) {
  const T old = *at;
  if (value > old) *at = value;
  return old;
}
