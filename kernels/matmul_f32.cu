// The noisy matrix product of f32 operands, without tensor cores: C [m, n] = law(A B^T) + bias, or C += law(A B^T). For
// references and small models; operands as in include/matmul.cuh, each with k last or with its rows last.
//
// A block of 256 threads has 128 rows and 64 columns of C; a thread two rows and columns.cuh's sixteen columns of them. Sums
// run over k in order, by fmaf.

#include "matmul_tile.cuh"

namespace {

constexpr uint32_t kRowsOfTile = 128, kColumnsOfTile = 64, kStep = 16;

// Copies rows [first_row, +kRows) x [first_k, +kStep) of an operand to tile [kStep][kRows]; zeros beyond.
template <uint32_t kRows>
TEMPER_DEVICE void load_tile(float* tile, const float* from, uint32_t rows, uint32_t ks, uint32_t first_row,
                             uint32_t first_k, bool k_last) {
  for (uint32_t i = threadIdx.x; i < kRows * kStep; i += kBlockThreads) {
    const uint32_t row = k_last ? i / kStep : i % kRows, k = k_last ? i % kStep : i / kRows;
    const uint32_t at_row = first_row + row, at_k = first_k + k;
    const uint64_t at = k_last ? uint64_t(at_row) * ks + at_k : uint64_t(at_k) * rows + at_row;
    tile[k * kRows + row] = at_row < rows && at_k < ks ? from[at] : 0.0f;
  }
}

}  // namespace

TEMPER_KERNEL(matmul_f32, MatmulArgs, 2) {
  __shared__ float a[kStep * kRowsOfTile];
  __shared__ float b[kStep * kColumnsOfTile];
  __shared__ double scratch[kWarps * kNoiseSums];
  const uint32_t first_m = blockIdx.x / args.tiles_n * kRowsOfTile, first_n = blockIdx.x % args.tiles_n * kColumnsOfTile;
  const uint32_t row = threadIdx.x / 4, first = threadIdx.x % 4 * 2;
  float sum[2][16] = {};
  for (uint32_t k = 0; k < args.k; k += kStep) {
    __syncthreads();  // everyone is done with the step before
    load_tile<kRowsOfTile>(a, static_cast<const float*>(args.a), args.m, args.k, first_m, k, !(args.flags & kARowsLast));
    load_tile<kColumnsOfTile>(b, static_cast<const float*>(args.b), args.n, args.k, first_n, k,
                              !(args.flags & kBRowsLast));
    __syncthreads();
#pragma unroll
    for (uint32_t i = 0; i < kStep; ++i) {
      const float of_row[2] = {a[i * kRowsOfTile + row], a[i * kRowsOfTile + row + 64]};
#pragma unroll
      for (uint32_t j = 0; j < 16; ++j) {
        const float of_column = b[i * kColumnsOfTile + first + j / 2 * 8 + j % 2];
#pragma unroll
        for (uint32_t r = 0; r < 2; ++r) sum[r][j] = fmaf(of_row[r], of_column, sum[r][j]);
      }
    }
  }
  NoiseSums sums = {};
  const ColumnsCall call{args.seed, args.stream, args.law, args.scale, args.bias, bool(args.flags & kAdds),
                         args.sums != nullptr};
#pragma unroll
  for (uint32_t r = 0; r < 2; ++r) {
    finish_row<float>(args, call, first_m + row + r * 64, first_n + first, sum[r], sums);
  }
  if (call.is_measured) add_noise_sums<kWarps>(sums, scratch, args.sums);
}
