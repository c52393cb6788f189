// The scheduler of the host shim: fibers (ucontext), barriers, warp exchanges. See shim.h.

#include "shim.h"

#include <stdlib.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

// The linker's names for the section that holds every __shared__ array; weak: a build may have none.
extern "C" {
extern char __start_temper_shared[] __attribute__((weak));
extern char __stop_temper_shared[] __attribute__((weak));
}

namespace host {

ThreadState current;

namespace {

constexpr size_t kStackBytes = 64 * 1024;

enum class Wait { kNone, kBlock, kWarp, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Wait wait = Wait::kNone;
  uint64_t slot = 0;  // what this lane offers in an exchange
};

std::mutex launch_lock;
uint32_t thread_order = 0;
uint64_t order_state = 0;
std::vector<Fiber> fibers;
ucontext_t scheduler;
uint32_t running = 0;
const std::function<void()>* body = nullptr;
const Entry* first_entry = nullptr;

void entry() {
  (*body)();
  fibers[running].wait = Wait::kDone;
  swapcontext(&fibers[running].context, &scheduler);
}

void pause(Wait why) {
  const uint32_t self = running;
  fibers[self].wait = why;
  swapcontext(&fibers[self].context, &scheduler);
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
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = &scheduler;
  makecontext(&fiber.context, entry, 0);
}

const char* run_block(uint32_t block_dim) {
  std::vector<uint32_t> order(block_dim);
  for (;;) {
    arrange(order);
    bool ran = false;
    for (uint32_t t : order) {
      if (fibers[t].wait != Wait::kNone) continue;
      ran = true;
      running = t;
      current.thread.x = t;
      swapcontext(&scheduler, &fibers[t].context);
    }
    if (all_wait(0, block_dim, Wait::kDone)) return nullptr;
    if (all_wait(0, block_dim, Wait::kBlock)) {
      release(0, block_dim);
      continue;
    }
    for (uint32_t first = 0; first < block_dim; first += kWarp) {
      const uint32_t last = std::min(first + uint32_t(kWarp), block_dim);
      if (all_wait(first, last, Wait::kWarp)) {
        release(first, last);
        ran = true;
      }
    }
    if (!ran) return "a barrier or shuffle that not every thread reaches";
  }
}

}  // namespace

void set_thread_order(uint32_t order) {
  std::lock_guard<std::mutex> hold(launch_lock);
  thread_order = order;
  order_state = order;
}

void barrier() { pause(Wait::kBlock); }

uint64_t exchange(uint64_t value, int from_lane) {
  const uint32_t self = running;
  fibers[self].slot = value;
  pause(Wait::kWarp);  // everyone has written
  const uint64_t received = fibers[self / kWarp * kWarp + uint32_t(from_lane)].slot;
  pause(Wait::kWarp);  // everyone has read
  return received;
}

Entry::Entry(const char* name_, size_t args_bytes_, void (*run_)(const void*))
    : name(name_), args_bytes(args_bytes_), run(run_), next(first_entry) {
  first_entry = this;
}

const char* launch_entry(const char* name, uint32_t grid, uint32_t block, const void* args, size_t args_bytes) {
  for (const Entry* entry = first_entry; entry != nullptr; entry = entry->next) {
    if (strcmp(entry->name, name) != 0) continue;
    if (entry->args_bytes != args_bytes) return "an argument struct of another size than the kernel's";
    return launch(grid, block, [=] { entry->run(args); });
  }
  return "no kernel of that name";
}

const char* launch(uint32_t grid, uint32_t block, const std::function<void()>& kernel) {
  std::lock_guard<std::mutex> hold(launch_lock);
  if (block == 0 || block > 1024 || grid == 0) return "a launch without threads, or with more than 1024 a block";
  if (block % kWarp != 0) return "a block that is not a multiple of the warp: its last shuffle would not return";
  body = &kernel;
  if (fibers.size() < block) fibers.resize(block);
  for (uint32_t b = 0; b < grid; ++b) {
    memset(__start_temper_shared, 0xff, size_t(__stop_temper_shared - __start_temper_shared));
    current = ThreadState{};
    current.block.x = b;
    current.block_dim.x = block;
    current.grid_dim.x = grid;
    for (uint32_t t = 0; t < block; ++t) prepare(fibers[t]);
    if (const char* error = run_block(block)) return error;
  }
  return nullptr;
}

}  // namespace host
