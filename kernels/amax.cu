// The amax A of a batch of matrices, for the formats that have a scale of the tensor or of a row:
//
//   amax_blocks, amax_tiles  of every tensor (or row, kAmaxPerRow) over its finite blocks: nvfp4, nvfp4:2d  -> amax
//   amax_rows                of every row, NaN and infinity included: fp8                                  -> of_rows
//   amax_of_rows             of every tensor over its finite rows, after amax_rows: fp8:tensor             -> amax
//
// amax and of_rows are zero before. The arguments are those of the fake_quant kernels that follow, and so are the tiles;
// src/ops/cuda/fake_quant.rs.

#include "octets.cuh"

namespace {

// Enters a lane's amax (bits) for its row: one atomic a warp where the warp has one row.
TEMPER_DEVICE void enter_row_amax(float* rows, uint32_t row, bool inside, uint32_t b) {
  unsigned int* bits = reinterpret_cast<unsigned int*>(rows);
  const uint32_t first = __shfl_sync(kFullWarp, row, 0);
  if (__all_sync(kFullWarp, inside && row == first)) {
    b = warp_max(b);
    if (threadIdx.x % kWarpSize == 0) atomicMax(bits + row, b);
  } else if (inside) {
    atomicMax(bits + row, b);
  }
}

// One atomic a block. scratch [kWarps] is shared memory; every thread must call.
TEMPER_DEVICE void enter_tensor_amax(float* amax, uint32_t b, uint32_t* scratch) {
  b = warp_max(b);
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = b;
  __syncthreads();
  if (threadIdx.x >= kWarpSize) return;
  b = warp_max(threadIdx.x < kWarps ? scratch[threadIdx.x] : 0);
  if (threadIdx.x == 0) atomicMax(reinterpret_cast<unsigned int*>(amax), b);
}

// Blocks of kBlock; 0: of whole rows, NaN and infinity included, and the result is the row's.
template <typename T, uint32_t kBlock, bool kIsWhole>
TEMPER_DEVICE void amax_of_tile(const FakeQuantTensor& t, uint32_t octets_of_thread, uint32_t* scratch) {
  constexpr bool kOfRows = kBlock == 0;
  const uint32_t first = (blockIdx.x - t.first_tile) * octets_of_thread * kBlockThreads + threadIdx.x;
  const auto place = [&](uint32_t i) {
    const Place place = place_of<kIsWhole>(t, first + i * kBlockThreads);
    return Place{place.at, place.inside && i < octets_of_thread};
  };
  Octet<T> x[kMostOctetsOfThread];
#pragma unroll
  for (uint32_t i = 0; i < kMostOctetsOfThread; ++i) x[i] = load_at<T, kIsWhole>(t, place(i));
  uint32_t largest = 0;
#pragma unroll
  for (uint32_t i = 0; i < kMostOctetsOfThread; ++i) {
    uint32_t b = octet_amax(x[i]);
    if (!kOfRows && __any_sync(kFullWarp, b >= kInfinityBits)) {
      const uint32_t of_block = group_max(b, 1, kBlock / 8);
      b = of_block >= kInfinityBits ? 0 : b;
    }
    if (kOfRows || t.flags & kAmaxPerRow) {
      enter_row_amax(kOfRows ? static_cast<float*>(t.of_rows) : t.amax, t.row(place(i).at), place(i).inside, b);
    } else {
      largest = b > largest ? b : largest;
    }
  }
  if (!kOfRows && !(t.flags & kAmaxPerRow)) enter_tensor_amax(t.amax, largest, scratch);
}

template <typename T, uint32_t kBlock>
TEMPER_DEVICE void amax_by_rows(const FakeQuantBatch& batch, uint32_t* scratch) {
  const FakeQuantTensor& t = batch.tensors[tensor_of_tile(batch.tensors, batch.count, blockIdx.x)];
  if (t.flags & kWhole) {
    amax_of_tile<T, kBlock, true>(t, batch.octets_of_thread, scratch);
  } else {
    amax_of_tile<T, kBlock, false>(t, batch.octets_of_thread, scratch);
  }
}

template <typename T>
TEMPER_DEVICE void amax_by_squares(const FakeQuantBatch& batch, uint32_t* amaxes, uint32_t* scratch) {
  const FakeQuantTensor& t = batch.tensors[tensor_of_tile(batch.tensors, batch.count, blockIdx.x)];
  const Place place = SquareTiles<16>::place(t, blockIdx.x);
  const Octet<T> x = t.flags & kWhole ? load_at<T, true>(t, place) : load_at<T, false>(t, place);
  const uint32_t b = SquareTiles<16>::amax(octet_amax(x), amaxes);
  enter_tensor_amax(t.amax, b >= kInfinityBits ? 0 : b, scratch);
}

}  // namespace

#define TEMPER_AMAX(dtype, T)                                                     \
  TEMPER_KERNEL(amax_blocks_##dtype, FakeQuantBatch, 4) {                            \
    __shared__ uint32_t scratch[kWarps];                                          \
    amax_by_rows<T, 16>(args, scratch);                                 \
  }                                                                               \
  TEMPER_KERNEL(amax_rows_##dtype, FakeQuantBatch, 4) { amax_by_rows<T, 0>(args, nullptr); } \
  TEMPER_KERNEL(amax_tiles_##dtype, FakeQuantBatch, 4) {                             \
    __shared__ uint32_t amaxes[SquareTiles<16>::kScratch];                     \
    __shared__ uint32_t scratch[kWarps];                                          \
    amax_by_squares<T>(args, amaxes, scratch);                                      \
  }

TEMPER_AMAX(f32, float)
TEMPER_AMAX(bf16, Bf16)
TEMPER_AMAX(f16, F16)

// One block of threads a tensor.
TEMPER_KERNEL(amax_of_rows, FakeQuantBatch, 4) {
  __shared__ uint32_t scratch[kWarps];
  const FakeQuantTensor& t = args.tensors[blockIdx.x];
  uint32_t largest = 0;
  for (uint32_t row = threadIdx.x; row < t.rows; row += kBlockThreads) {
    const uint32_t b = bits_of(static_cast<const float*>(t.of_rows)[row]);
    if (b < kInfinityBits && b > largest) largest = b;
  }
  enter_tensor_amax(t.amax, largest, scratch);
}
