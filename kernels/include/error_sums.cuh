// The sums behind the error metrics of a quantized tensor, x original, y dequantized: src/numerics/tensor_error.rs.
// Elements where x or y is not finite enter kNonfinite alone.
#pragma once

#include "reduce.cuh"

// The order is the wire between src/ops/cuda/fake_quant/kernel.rs and the kernels.
enum ErrorSum {
  kSquareX, kSquareY, kProduct, kSquareError, kRelative, kElements, kNonzero, kDeadzone, kSaturated, kNonfinite,
  kMaxError,  // a maximum, kept as the bits of a double
  kErrorSums
};

constexpr uint32_t kErrorScratch = kWarps * kMaxError;

// Of one thread.
struct ErrorSums {
  double square_x, square_y, product, square_error, relative, max_error;
  uint32_t elements, nonzero, deadzone, saturated, nonfinite;

  __device__ void add(float x_, float y_, bool is_saturated) {
    saturated += is_saturated;
    if ((bits_of(x_) & kInfinityBits) == kInfinityBits || (bits_of(y_) & kInfinityBits) == kInfinityBits) {
      ++nonfinite;
      return;
    }
    const double x = x_, y = y_, error = fabs(y - x);
    square_x += x * x;
    square_y += y * y;
    product += x * y;
    square_error += error * error;
    relative += double(float(error) / (fabsf(x_) + 1e-10f));  // a term to the places of an f32
    ++elements;
    nonzero += x_ != 0.0f;
    deadzone += x_ != 0.0f && y_ == 0.0f;
    max_error = error > max_error ? error : max_error;
  }

  // Adds the block's to sums [kErrorSums]. Every thread must call; scratch [kErrorScratch] is shared memory.
  __device__ void finish(double* scratch, double* sums) const {
    const double values[kMaxError] = {square_x, square_y, product, square_error, relative, double(elements), double(nonzero),
                                      double(deadzone), double(saturated), double(nonfinite)};
    add_block_sums<kWarps>(values, scratch, sums);
    unsigned long long bits;  // of magnitudes: ordered as they are
    memcpy(&bits, &max_error, 8);
#pragma unroll
    for (uint32_t delta = kWarpSize / 2; delta > 0; delta /= 2) {
      const unsigned long long other = __shfl_down_sync(kFullWarp, bits, delta);
      bits = other > bits ? other : bits;
    }
    if (threadIdx.x % kWarpSize == 0 && bits != 0) {
      atomicMax(reinterpret_cast<unsigned long long*>(&sums[kMaxError]), bits);
    }
  }
};
