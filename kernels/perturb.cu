// AQN: w' = w + RN(scale * z), z ~ N(0,1) of (seed, stream, token of the row, column), the product rounded, then the
// sum. w is never overwritten.
//
//   w, out  [rows, cols] f32      tokens  [rows] u64
//
// One thread has one (row, 64-column block, q): 16 columns and one Philox call (normal.cuh).

#include "normal.cuh"

extern "C" __global__ void perturb_f32(const float* __restrict__ w, const uint64_t* __restrict__ tokens,
                                       float* __restrict__ out, uint64_t rows, uint64_t cols, float scale,
                                       uint64_t seed, uint32_t stream) {
  const uint64_t calls = (cols + 63) / 64 * 4;  // of one row
  const uint64_t threads = uint64_t(gridDim.x) * blockDim.x;
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
      const float noise = scale * z[j];
      out[at] = w[at] + noise;
    }
  }
}
