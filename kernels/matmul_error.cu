// The error of a matrix product, in its epilogue: out = round(law(y, s, z) + bias), one rounding to the output dtype,
// and what was measured while doing so.
//
//   relative_gaussian  fma(|y|, RN(s z), y)     absolute_gaussian  y + RN(s z)     systematic_bias  y + s sign(y)
//
//   y       [rows, cols] f32, the clean product          tokens  [rows] u64, the noise key of each row
//   bias    [cols] f32 or null                           out     [rows, cols] f32 or bf16; an f32 out may be y itself
//   sums    [4] f64, added to: error^2, y^2, y^4, elements; error = round(y' + b) - round(y + b)
//
// One thread has one (row, 64-column block, q): 16 columns and one Philox call (normal.cuh). Sums go thread, warp,
// block, then one atomicAdd a block: their last bits depend on the order of blocks, the outputs' do not.

#include "dtype.cuh"
#include "error_law.cuh"
#include "normal.cuh"
#include "reduce.cuh"

struct Sums {
  double error_sq, clean_sq, clean_fourth, elements;
};

template <typename T>
TEMPER_DEVICE Sums matmul_error_body(const float* y, const uint64_t* tokens, const float* bias, T* out, uint64_t rows,
                                     uint64_t cols, uint32_t law, float scale, uint64_t seed, uint32_t stream) {
  const uint64_t calls = (cols + 63) / 64 * 4;  // of one row
  const uint64_t threads = uint64_t(gridDim.x) * blockDim.x;
  Sums sums = {0.0, 0.0, 0.0, 0.0};
  for (uint64_t t = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; t < rows * calls; t += threads) {
    const uint64_t row = t / calls;
    const uint32_t call = uint32_t(t % calls);
    float z[16];
    normals_of_call(seed, stream, tokens[row], call, z);
    const uint64_t first = uint64_t(call / 4) * 64 + call % 4 * 2;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const uint64_t column = first + j / 2 * 8 + j % 2;
      if (column >= cols) continue;
      const uint64_t at = row * cols + column;
      const float clean = y[at];
      float noisy = apply_error_law(law, clean, scale, z[j]);
      float exact = clean;
      if (bias != nullptr) {  // adding a bias of 0 would lose -0
        noisy += bias[column];
        exact += bias[column];
      }
      const double error = double(store(out, at, noisy)) - double(rounded_as(out, exact));
      const double square = double(clean) * double(clean);
      sums.error_sq += error * error;
      sums.clean_sq += square;
      sums.clean_fourth += square * square;
      sums.elements += 1.0;
    }
  }
  return sums;
}

TEMPER_DEVICE void add_sums(const Sums& mine, double* scratch, double* sums) {
  const double parts[4] = {mine.error_sq, mine.clean_sq, mine.clean_fourth, mine.elements};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const double total = block_sum(parts[i], scratch);
    if (threadIdx.x == 0) atomicAdd(&sums[i], total);
  }
}

extern "C" __global__ void matmul_error_f32(const float* y, const uint64_t* tokens, const float* bias, float* out,
                                            double* sums, uint64_t rows, uint64_t cols, uint32_t law, float scale,
                                            uint64_t seed, uint32_t stream) {
  __shared__ double scratch[kWarpSize];
  add_sums(matmul_error_body(y, tokens, bias, out, rows, cols, law, scale, seed, stream), scratch, sums);
}

extern "C" __global__ void matmul_error_bf16(const float* y, const uint64_t* tokens, const float* bias, Bf16* out,
                                             double* sums, uint64_t rows, uint64_t cols, uint32_t law, float scale,
                                             uint64_t seed, uint32_t stream) {
  __shared__ double scratch[kWarpSize];
  add_sums(matmul_error_body(y, tokens, bias, out, rows, cols, law, scale, seed, stream), scratch, sums);
}
