// Fake quantization y = dequantize(quantize(x)) in mxfp4 (three scale rules), nvfp4 (two-level) and
// nvfp4_single_level; bit for bit src/numerics/block_format.rs.
//
//   b = amax of a block, A = amax of the tensor or row over its finite blocks
//   scaled = x * encode(b, A)     code = e2m1(scaled)     y = value(code) * decode(b, A), rounded to the dtype of x
//
//   x, out  [rows, cols] f32 or bf16; blocks of 32 (mxfp4) or 16 (nvfp4) along a row, the last one may be ragged
//   amax    [1] (amax_stride 0) or [rows] (amax_stride 1) f32, zero before the amax kernel; nvfp4 only
//   counts  [2] u64, added to: blocks that held NaN or infinity (they become NaN), elements scaled beyond 6
//
// One lane has one element; a warp has one block of 32 or two of 16 and takes their amax by shuffles. The block's
// amax travels as the bits of a magnitude: ordered as integers, with NaN and infinity above every finite value.

#include "block_scale.cuh"
#include "dtype.cuh"
#include "reduce.cuh"

// Where a lane stands on one pass of its warp: all 32 lanes make the same passes, some of them outside the matrix.
struct Place {
  uint64_t row, at;  // at: index of the element
  bool inside;
};

struct Walk {
  uint64_t blocks, per_row, cols, next, stride;
  uint32_t size, lane;

  __device__ Walk(uint64_t rows, uint64_t cols_, uint32_t block_size)
      : per_row((cols_ + block_size - 1) / block_size), cols(cols_), size(block_size), lane(threadIdx.x % kWarpSize) {
    blocks = rows * per_row;
    const uint64_t per_warp = kWarpSize / block_size, warps_of_block = blockDim.x / kWarpSize;
    next = (uint64_t(blockIdx.x) * warps_of_block + threadIdx.x / kWarpSize) * per_warp;
    stride = uint64_t(gridDim.x) * warps_of_block * per_warp;
  }

  __device__ bool step(Place& place) {
    if (next >= blocks) return false;
    const uint64_t block = next + lane / size;
    const uint64_t column = block % per_row * size + lane % size;
    place.row = block / per_row;
    place.at = place.row * cols + column;
    place.inside = block < blocks && column < cols;
    next += stride;
    return true;
  }
};

template <typename T>
TEMPER_DEVICE void amax_body(const T* x, float* amax, uint64_t rows, uint64_t cols, uint32_t block_size,
                             uint32_t amax_stride) {
  Walk walk(rows, cols, block_size);
  uint32_t largest = 0;
  Place place;
  while (walk.step(place)) {
    const float value = place.inside ? load(x, place.at) : 0.0f;
    uint32_t b = group_max(bits_of(magnitude(value)), block_size);
    b = b >= kInfinityBits ? 0 : b;  // a non-finite block is left out of A
    largest = b > largest ? b : largest;
    if (amax_stride == 1 && place.inside && walk.lane % block_size == 0) {
      atomicMax(reinterpret_cast<unsigned int*>(amax) + place.row, b);
    }
  }
  largest = group_max(largest, kWarpSize);
  if (amax_stride == 0 && walk.lane == 0) atomicMax(reinterpret_cast<unsigned int*>(amax), largest);
}

template <typename T>
TEMPER_DEVICE void fake_quant_body(const T* x, T* out, const float* amax, unsigned long long* counts, uint64_t rows,
                                   uint64_t cols, uint32_t format, uint32_t amax_stride) {
  const uint32_t block_size = block_size_of(format);
  Walk walk(rows, cols, block_size);
  unsigned long long nonfinite = 0, saturated = 0;
  Place place;
  while (walk.step(place)) {
    const float value = place.inside ? load(x, place.at) : 0.0f;
    const uint32_t b = group_max(bits_of(magnitude(value)), block_size);
    if (!place.inside) continue;  // no shuffles below
    if (b >= kInfinityBits) {
      nonfinite += walk.lane % block_size == 0;
      store(out, place.at, not_a_number());
      continue;
    }
    const float g = format == kNvfp4 ? tensor_encode_scale(amax[place.row * amax_stride]) : 1.0f;
    const BlockScale scale = block_scale(format, float_of(b), g);
    const float scaled = scale.divide ? value / scale.decode : value * scale.encode;
    const uint32_t code = scale.divide ? e2m1_encode_ties_toward_zero(scaled) : e2m1_encode(scaled);
    saturated += magnitude(scaled) > kE2m1Max;
    store(out, place.at, e2m1_decode(code) * scale.decode);
  }
  nonfinite = warp_sum(nonfinite);
  saturated = warp_sum(saturated);
  if (walk.lane == 0 && nonfinite != 0) atomicAdd(&counts[0], nonfinite);
  if (walk.lane == 0 && saturated != 0) atomicAdd(&counts[1], saturated);
}

extern "C" __global__ void amax_f32(const float* x, float* amax, uint64_t rows, uint64_t cols, uint32_t block_size,
                                    uint32_t amax_stride) {
  amax_body(x, amax, rows, cols, block_size, amax_stride);
}

extern "C" __global__ void amax_bf16(const Bf16* x, float* amax, uint64_t rows, uint64_t cols, uint32_t block_size,
                                     uint32_t amax_stride) {
  amax_body(x, amax, rows, cols, block_size, amax_stride);
}

extern "C" __global__ void fake_quant_f32(const float* x, float* out, const float* amax, unsigned long long* counts,
                                          uint64_t rows, uint64_t cols, uint32_t format, uint32_t amax_stride) {
  fake_quant_body(x, out, amax, counts, rows, cols, format, amax_stride);
}

extern "C" __global__ void fake_quant_bf16(const Bf16* x, Bf16* out, const float* amax, unsigned long long* counts,
                                           uint64_t rows, uint64_t cols, uint32_t format, uint32_t amax_stride) {
  fake_quant_body(x, out, amax, counts, rows, cols, format, amax_stride);
}
