// The shim's part for include/hopper.cuh: barriers that count bytes, copies of boxes, products of warpgroups.

#include "fibers.h"

namespace host {

namespace {

// In the eight bytes of a barrier. Bytes may come before they are expected: then `bytes` is negative for a while.
struct Barrier {
  int32_t bytes;
  uint8_t arrivals, pending;  // of a phase; still missing
  uint16_t phase;
};
static_assert(sizeof(Barrier) == 8, "a barrier's place");

struct Box {
  uint32_t to;  // offset in the shared memory of every block of `ranks`
  uint32_t barrier;
  const Map* map;
  uint32_t x, y, ranks;
};

std::vector<Box> boxes;  // under way

constexpr uint32_t kLine = 128, kPiece = 16, kColumns = 64;  // bytes; 16-bit elements of a line

// Pieces change places within their line by the line's number.
uint32_t swizzled(uint32_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

void end_phase_if_complete(Barrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.arrivals;
  ++barrier.phase;
}

void bring(const Box& box) {
  const Map& map = *box.map;
  for (uint32_t rank = 0; rank < 2; ++rank) {
    if (!(box.ranks >> rank & 1)) continue;
    uint8_t* const shared = dynamic_shared_of(rank);
    for (uint32_t r = 0; r < map.box_rows; ++r) {
      for (uint32_t c = 0; c < kColumns; ++c) {
        const uint64_t row = uint64_t(box.y) + r, column = uint64_t(box.x) + c;
        uint8_t* to = shared + swizzled(box.to + r * kLine + c * 2);
        if (row < map.rows && column < map.columns) {
          memcpy(to, map.from + row * map.stride + column * 2, 2);
        } else {
          memset(to, 0, 2);
        }
      }
    }
    Barrier& barrier = *reinterpret_cast<Barrier*>(shared + box.barrier);
    barrier.bytes -= int32_t(map.box_rows * kLine);
    end_phase_if_complete(barrier);
  }
}

// Of an operand of sixteen k, by its descriptor.
struct Operand {
  uint32_t from, next_rows, next_eight;
  bool k_last;
  const uint8_t* shared;

  Operand(uint64_t bits, bool k_last_, const uint8_t* shared_)
      : from(uint32_t(bits & 0x3fff) * kPiece),
        next_rows(uint32_t(bits >> 16 & 0x3fff) * kPiece),
        next_eight(uint32_t(bits >> 32 & 0x3fff) * kPiece),
        k_last(k_last_),
        shared(shared_) {
    if (bits >> 62 != 1) fail("an operand that is not swizzled by 128 bytes");
  }

  float at(uint32_t row, uint32_t k) const {
    const uint32_t offset = k_last ? row / 8 * next_eight + row % 8 * kLine + k * 2
                                   : row / kColumns * next_rows + k / 8 * next_eight + k % 8 * kLine + row % kColumns * 2;
    uint32_t bits = 0;
    memcpy(reinterpret_cast<uint8_t*>(&bits) + 2, shared + swizzled(from + offset), 2);
    float value;
    memcpy(&value, &bits, 4);
    return value;
  }
};

// This lane's part.
void multiply(const Product& product) {
  const uint8_t* shared = dynamic_shared();
  const Operand a(product.a, product.a_k_last, shared), b(product.b, product.b_k_last, shared);
  const uint32_t warp = threadIdx.x / kWarp % 4, lane = threadIdx.x % kWarp;
  for (uint32_t i = 0; i < product.columns / 2; ++i) {
    const uint32_t row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    float sum = product.adds ? product.d[i] : 0.0f;
    for (uint32_t k = 0; k < 16; ++k) sum += a.at(row, k) * b.at(column, k);
    product.d[i] = sum;
  }
}

}  // namespace

uint32_t shared_offset(const uint8_t* shared) { return uint32_t(shared - dynamic_shared()); }

void init_barrier(uint8_t* barrier, uint32_t arrivals) {
  *reinterpret_cast<Barrier*>(barrier) = Barrier{0, uint8_t(arrivals), uint8_t(arrivals), 0};
}

void arrive(uint8_t* barrier, uint32_t rank, uint32_t expected_bytes) {
  Barrier& there = *reinterpret_cast<Barrier*>(dynamic_shared_of(rank) + shared_offset(barrier));
  if (there.pending == 0) return fail("an arrival at a barrier all of whose arrivals have come");
  there.bytes += int32_t(expected_bytes);
  --there.pending;
  end_phase_if_complete(there);
}

void wait_barrier(uint8_t* barrier, uint32_t parity) {
  self().phase_of = barrier;
  self().parity = parity;
  pause(Wait::kPhase);
}

bool has_phase_ended(const Fiber& fiber) {
  for (uint32_t rank = 0; rank < 2; ++rank) {
    const ptrdiff_t offset = fiber.phase_of - dynamic_shared_of(rank);
    for (size_t i = 0; i < boxes.size();) {
      if (boxes[i].ranks >> rank & 1 && offset == ptrdiff_t(boxes[i].barrier)) {
        const Box box = boxes[i];
        boxes.erase(boxes.begin() + ptrdiff_t(i));
        bring(box);
      } else {
        ++i;
      }
    }
  }
  return (reinterpret_cast<const Barrier*>(fiber.phase_of)->phase & 1) != fiber.parity;
}

void forget_boxes() { boxes.clear(); }

void load_box_later(uint8_t* to, const void* map, uint32_t x, uint32_t y, uint8_t* barrier, uint32_t ranks) {
  boxes.push_back(Box{shared_offset(to), shared_offset(barrier), static_cast<const Map*>(map), x, y, ranks});
}

void multiply_later(float* d, uint64_t a, uint64_t b, uint32_t columns, bool adds, bool a_k_last, bool b_k_last) {
  self().uncommitted_products.push_back(Product{d, a, b, columns, adds, a_k_last, b_k_last});
}

void commit_products() {
  Fiber& fiber = self();
  fiber.product_groups.push_back(std::move(fiber.uncommitted_products));
  fiber.uncommitted_products.clear();
}

void wait_products(size_t pending_groups) {
  Fiber& fiber = self();
  for (; fiber.product_groups.size() > pending_groups; fiber.product_groups.pop_front()) {
    for (const Product& product : fiber.product_groups.front()) multiply(product);
  }
  pause(Wait::kWarp);  // a warp's products are done together
}

}  // namespace host
