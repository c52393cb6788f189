// What the parts of the shim share: the fibers of a cluster, and how one waits.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <deque>
#include <memory>
#include <vector>

#include "shim.h"

namespace host {

enum class Wait { kNone, kBlock, kWarp, kPhase, kDone };

// A copy that is under way.
struct Copy {
  void* to;
  const void* source;
  size_t bytes;
};

// A product that is under way.
struct Product {
  float* d;
  uint64_t a, b;
  uint32_t columns;
  bool adds, a_k_last, b_k_last;
};

// A fiber begins with a context of its own and goes on by jumps: swapcontext would ask the kernel for the signal mask
// at every switch.
struct Fiber {
  ucontext_t begin;
  jmp_buf at;
  bool has_begun = false;
  std::unique_ptr<char[]> stack;
  Wait wait = Wait::kNone;
  alignas(8) uint8_t shown[kShownBytes];  // what this lane shows its warp
  std::deque<std::vector<Copy>> groups;   // committed copies, the oldest first
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Product>> product_groups;  // as the copies
  std::vector<Product> uncommitted_products;
  uint8_t* phase_of = nullptr;  // the barrier that it waits for, and the parity
  uint32_t parity = 0;
};

// The running fiber.
Fiber& self();
void pause(Wait why);

// The dynamic shared memory of block `rank` of the cluster.
uint8_t* dynamic_shared_of(uint32_t rank);

// Ends the launch with that.
void fail(const char* what);

// Whether what the fiber waits for has come; brings the bytes that are under way to its barrier.
bool has_phase_ended(const Fiber& fiber);

// Forgets what an earlier cluster left.
void forget_boxes();

}  // namespace host
