// The scheduler of the host shim: fibers (ucontext), barriers, warp exchanges. See shim.h.

#include <stdlib.h>

#include <algorithm>
#include <mutex>

#include "fibers.h"

// The linker's names for the section that holds every __shared__ array; weak: a build may have none.
extern "C" {
extern char __start_temper_shared[] __attribute__((weak));
extern char __stop_temper_shared[] __attribute__((weak));
}

namespace host {

ThreadState current;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kDynamicBytes = 163 * 1024, kHopperBytes = 227 * 1024;  // that a block may have
constexpr uint32_t kMostBlocks = 2;  // of a cluster

std::mutex launch_lock;
thread_local uint32_t wanted_order = 0;  // of this caller's launches
uint32_t thread_order = 0;
uint64_t order_state = 0;
std::vector<Fiber> fibers;
alignas(1024) uint8_t dynamic_memory[kMostBlocks][(kHopperBytes + 1023) / 1024 * 1024];
const char* failure = nullptr;
jmp_buf scheduler;
uint32_t running = 0;
uint32_t first_block = 0;  // of the cluster
const std::function<void()>* body = nullptr;
const Entry* first_entry = nullptr;

[[noreturn]] void back_to_scheduler() { _longjmp(scheduler, 1); }

void entry() {
  (*body)();
  fibers[running].wait = Wait::kDone;
  back_to_scheduler();
}

// Runs a thread until it waits or ends.
__attribute__((noinline)) void resume(uint32_t thread) {
  running = thread;
  current.thread.x = thread % current.block_dim.x;
  current.block.x = first_block + thread / current.block_dim.x;
  if (_setjmp(scheduler) != 0) return;
  Fiber& fiber = fibers[thread];
  if (fiber.has_begun) _longjmp(fiber.at, 1);
  fiber.has_begun = true;
  setcontext(&fiber.begin);
}

uint64_t next_random() {
  order_state = order_state * 6364136223846793005ull + 1442695040888963407ull;
  return order_state >> 33;
}

void arrange(std::vector<uint32_t>& order) {
  for (uint32_t i = 0; i < order.size(); ++i) order[i] = i;
  if (thread_order == 1) std::reverse(order.begin(), order.end());
  if (thread_order > 1) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  }
}

// Whether every fiber of [first, last) waits for the same reason.
bool all_wait(uint32_t first, uint32_t last, Wait why) {
  for (uint32_t t = first; t < last; ++t) {
    if (fibers[t].wait != why) return false;
  }
  return true;
}

void release(uint32_t first, uint32_t last) {
  for (uint32_t t = first; t < last; ++t) fibers[t].wait = Wait::kNone;
}

void prepare(Fiber& fiber) {
  if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
  fiber.wait = Wait::kNone;
  fiber.has_begun = false;
  fiber.groups.clear();
  fiber.uncommitted.clear();
  fiber.product_groups.clear();
  fiber.uncommitted_products.clear();
  getcontext(&fiber.begin);
  fiber.begin.uc_stack.ss_sp = fiber.stack.get();
  fiber.begin.uc_stack.ss_size = kStackBytes;
  fiber.begin.uc_link = nullptr;  // `entry` does not return
  makecontext(&fiber.begin, entry, 0);
}

// Lets every thread of [first, last) that may run do so, in the order of `order`, until it waits. Whether any ran.
bool run_threads(const std::vector<uint32_t>& order, uint32_t first, uint32_t last) {
  bool ran = false;
  for (uint32_t t : order) {
    if (t < first || t >= last) continue;
    Fiber& fiber = fibers[t];
    if (fiber.wait == Wait::kPhase && has_phase_ended(fiber)) fiber.wait = Wait::kNone;
    if (fiber.wait != Wait::kNone || failure != nullptr) continue;
    ran = true;
    resume(t);
  }
  return ran;
}

// Releases the warps of [first, last) whose lanes all wait for an exchange. Whether there was one.
bool release_warps(uint32_t first, uint32_t last) {
  bool released = false;
  for (; first < last; first += kWarp) {
    if (!all_wait(first, first + kWarp, Wait::kWarp)) continue;
    release(first, first + kWarp);
    released = true;
  }
  return released;
}

// A block, or a cluster's threads block by block.
const char* run_threads_to_end(uint32_t count) {
  std::vector<uint32_t> order(count);
  for (;;) {
    arrange(order);
    bool ran = false;
    if (thread_order == 1) {
      // The last warp as far as it gets, then the one before it.
      for (uint32_t first = count; first > 0 && !ran;) {
        first -= kWarp;
        while (run_threads(order, first, first + kWarp) || release_warps(first, first + kWarp)) ran = true;
      }
    } else {
      ran = run_threads(order, 0, count);
      ran = release_warps(0, count) || ran;
    }
    if (failure != nullptr) return failure;
    if (ran) continue;
    if (all_wait(0, count, Wait::kDone)) return nullptr;
    if (!all_wait(0, count, Wait::kBlock)) return "a barrier or shuffle that not every thread reaches";
    release(0, count);
  }
}

}  // namespace

void set_thread_order(uint32_t order) { wanted_order = order; }

Fiber& self() { return fibers[running]; }

void pause(Wait why) {
  Fiber& fiber = self();
  fiber.wait = why;
  if (_setjmp(fiber.at) == 0) back_to_scheduler();
}

void fail(const char* what) { failure = what; }

void barrier() { pause(Wait::kBlock); }

uint32_t cluster_rank() { return running / current.block_dim.x; }

void show(const void* mine, size_t bytes) {
  memcpy(self().shown, mine, bytes);
  pause(Wait::kWarp);  // everyone has written
}

const void* shown(int lane) { return fibers[running / kWarp * kWarp + uint32_t(lane)].shown; }

void seen() { pause(Wait::kWarp); }

void copy_later(void* to, const void* source, size_t bytes) {
  self().uncommitted.push_back(Copy{to, source, bytes});
}

void commit_copies() {
  Fiber& fiber = self();
  fiber.groups.push_back(std::move(fiber.uncommitted));
  fiber.uncommitted.clear();
}

void wait_copies(size_t pending_groups) {
  Fiber& fiber = self();
  for (; fiber.groups.size() > pending_groups; fiber.groups.pop_front()) {
    for (const Copy& copy : fiber.groups.front()) {
      if (copy.source == nullptr) {
        memset(copy.to, 0, copy.bytes);
      } else {
        memcpy(copy.to, copy.source, copy.bytes);
      }
    }
  }
}

uint8_t* dynamic_shared() { return dynamic_memory[cluster_rank()]; }
uint8_t* dynamic_shared_of(uint32_t rank) { return dynamic_memory[rank]; }

Entry::Entry(const char* name_, size_t args_bytes_, uint32_t cluster_, void (*run_)(const void*))
    : name(name_), args_bytes(args_bytes_), cluster(cluster_), run(run_), next(first_entry) {
  first_entry = this;
}

const char* launch_entry(const char* name, uint32_t grid, uint32_t block, uint32_t shared_bytes, const void* args,
                         size_t args_bytes) {
  for (const Entry* entry = first_entry; entry != nullptr; entry = entry->next) {
    if (strcmp(entry->name, name) != 0) continue;
    if (entry->args_bytes != args_bytes) return "an argument struct of another size than the kernel's";
    return launch(grid, block, shared_bytes, [=] { entry->run(args); }, entry->cluster);
  }
  return "no kernel of that name";
}

const char* launch(uint32_t grid, uint32_t block, uint32_t shared_bytes, const std::function<void()>& kernel,
                   uint32_t cluster) {
  std::lock_guard<std::mutex> hold(launch_lock);
  thread_order = wanted_order;
  order_state = wanted_order;
  if (block == 0 || block > 1024 || grid == 0) return "a launch without threads, or with more than 1024 a block";
  if (cluster > kMostBlocks || grid % cluster != 0) return "a grid that is not whole clusters of at most 2 blocks";
  if (shared_bytes > (cluster > 1 ? kHopperBytes : kDynamicBytes)) {
    return "more dynamic shared memory than an A100 has, or in clusters an H100";
  }
  if (block % kWarp != 0) return "a block that is not a multiple of the warp: its last shuffle would not return";
  body = &kernel;
  const uint32_t threads = cluster * block;
  if (fibers.size() < threads) fibers.resize(threads);
  std::vector<uint32_t> clusters(grid / cluster);
  arrange(clusters);
  for (uint32_t number : clusters) {
    first_block = number * cluster;
    memset(__start_temper_shared, 0xff, size_t(__stop_temper_shared - __start_temper_shared));
    for (uint32_t rank = 0; rank < cluster; ++rank) memset(dynamic_memory[rank], 0xff, shared_bytes);
    forget_boxes();
    failure = nullptr;
    current = ThreadState{};
    current.block_dim.x = block;
    current.grid_dim.x = grid;
    for (uint32_t t = 0; t < threads; ++t) prepare(fibers[t]);
    if (const char* error = run_threads_to_end(threads)) return error;
  }
  return nullptr;
}

}  // namespace host
