// The batch of matrices that the fake_quant and amax kernels take, cut into octets (eight consecutive elements of a row)
// and tiles: which octet a thread has, and how it is read and written.
#pragma once

#include "dtype.cuh"
#include "reduce.cuh"

enum FakeQuantFlags : uint32_t {
  kWhole = 1,  // rows end with a block, and all matrices are aligned to 16 bytes: octets are whole, and consecutive in memory
  kAmaxPerRow = 2,
};

// The layout of these structs is the wire between src/ops/cuda/fake_quant/kernel.rs and the kernels.
struct FakeQuantTensor {
  const void* x;           // [rows, cols]
  void* y;                 // [rows, cols] in the dtype of x, or null
  uint8_t* codes;          // [rows, ceil(cols / 2)] low nibble first; fp8, mxfp8: [rows, cols]; or null
  void* scales;            // [rows, blocks of a row] u8; fp8: [rows] f32; or null
  float* amax;             // nvfp4: [1], or [rows] with kAmaxPerRow; fp8:tensor: [1]; null where the format needs none
  void* of_rows;           // stochastic rounding: [rows] u64 keys, or null; fp8: [rows] f32, each row's amax
  uint64_t first_key;      // the key of row r is first_key + r where of_rows is null
  uint32_t rows, cols;
  uint32_t first_tile;     // of the tensor, among the blocks of the grid
  uint32_t stream;         // of stochastic rounding
  uint32_t octets_of_row;  // filled up to whole blocks, so that the lanes of a block share a row
  uint32_t flags;
  Divider by_row;          // divides by octets_of_row

  __device__ uint32_t row(uint32_t octet) const { return by_row.divide(octet); }
  __device__ uint32_t column(uint32_t octet, uint32_t row) const { return (octet - row * octets_of_row) * 8; }
};

struct FakeQuantBatch {
  uint32_t count, rule, rounding;
  uint32_t octets_of_thread;             // in the kernels that go by rows: a tile has this many times kBlockThreads
  uint64_t seed;
  unsigned long long* nonfinite_blocks;  // [count], added to
  double* sums;                          // [count, kErrorSums], added to; read by the kernels *_errors alone
  FakeQuantTensor tensors[46];
};
static_assert(sizeof(FakeQuantBatch) <= 4096, "kernel arguments");

constexpr uint32_t kMostOctetsOfThread = 4;

// An octet's number in its tensor, and whether it has elements there.
struct Place {
  uint32_t at;
  bool inside;
};

// kIsWhole: the tensor's flag kWhole.
template <bool kIsWhole>
TEMPER_DEVICE Place place_of(const FakeQuantTensor& t, uint32_t at) {
  bool inside = at < t.rows * t.octets_of_row;
  if constexpr (!kIsWhole) inside = inside && t.column(at, t.row(at)) < t.cols;
  return Place{at, inside};
}

template <typename T, bool kIsWhole>
TEMPER_DEVICE Octet<T> load_at(const FakeQuantTensor& t, const Place& place) {
  if (!place.inside) return zero_octet<T>();
  const T* x = static_cast<const T*>(t.x);
  if constexpr (kIsWhole) return load_octet(x + uint64_t(place.at) * 8);
  const uint32_t row = t.row(place.at);
  return load_ragged(x + uint64_t(row) * t.cols, t.column(place.at, row), t.cols);
}

template <typename T, bool kIsWhole>
TEMPER_DEVICE void store_at(const FakeQuantTensor& t, T* y, const Place& place, const Octet<T>& octet) {
  if constexpr (kIsWhole) {
    store_octet(y + uint64_t(place.at) * 8, octet);
  } else {
    const uint32_t row = t.row(place.at);
    store_ragged(y + uint64_t(row) * t.cols, t.column(place.at, row), t.cols, octet);
  }
}

// The blocks of a grid in reverse: the last tiles that an amax kernel has read lie in the L2 cache when the kernel that
// quantizes begins.
TEMPER_DEVICE uint32_t block_from_the_end() { return gridDim.x - 1 - blockIdx.x; }

// Option 2d: one scale per square tile of kSize rows and columns. A block of threads takes kSize rows and
// 8 * (kBlockThreads / kSize) columns, a thread one octet; the lanes of a square are spread over all warps.
template <uint32_t kSize>
struct SquareTiles {
  static constexpr uint32_t kAcross = kBlockThreads / kSize;  // octets of a row
  static constexpr uint32_t kLanes = kSize / 8;               // octets of a square's row
  static constexpr uint32_t kSquares = kAcross / kLanes;      // side by side
  static constexpr uint32_t kScratch = kWarps * kSquares;

  // `block`: number of the block of threads in the grid.
  TEMPER_DEVICE Place place(const FakeQuantTensor& t, uint32_t block) {
    const uint32_t across = (t.octets_of_row + kAcross - 1) / kAcross, tile = block - t.first_tile;
    const uint32_t row = tile / across * kSize + threadIdx.x / kAcross;
    const uint32_t octet = tile % across * kAcross + threadIdx.x % kAcross;
    return Place{row * t.octets_of_row + octet, row < t.rows && octet * 8 < t.cols};
  }

  // The amax of a thread's square. scratch [kScratch] is shared memory; every thread must call, once.
  TEMPER_DEVICE uint32_t amax(uint32_t of_octet, uint32_t* scratch) {
    const uint32_t warp = threadIdx.x / kWarpSize, square = threadIdx.x % kAcross / kLanes;
    uint32_t b = group_max(of_octet, 1, kLanes);  // of a row of the square
    b = group_max(b, kAcross, kWarpSize);         // of its rows in this warp
    if (threadIdx.x % kWarpSize < kAcross && threadIdx.x % kLanes == 0) scratch[warp * kSquares + square] = b;
    __syncthreads();
#pragma unroll
    for (uint32_t w = 0; w < kWarps; ++w) {
      const uint32_t of_warp = scratch[w * kSquares + square];
      b = of_warp > b ? of_warp : b;
    }
    return b;
  }
};
