// y = x W^T, the forward product: both operands with k last. include/matmul.cuh has the body.

#include "matmul.cuh"

TEMPER_MATMUL(matmul_nt_128x128_bf16, Bf16, Tile128x128, true, true)
TEMPER_MATMUL(matmul_nt_64x128_bf16, Bf16, Tile64x128, true, true)
TEMPER_MATMUL(matmul_nt_32x256_bf16, Bf16, Tile32x256, true, true)
TEMPER_MATMUL(matmul_nt_16x256_bf16, Bf16, Tile16x256, true, true)

TEMPER_MATMUL(matmul_nt_128x128_f16, F16, Tile128x128, true, true)

// Of few rows, which wait for launches more than for anything else.
TEMPER_MATMUL_GROUP(matmul_nt_64x128_bf16_group, Bf16, Tile64x128)
TEMPER_MATMUL_GROUP(matmul_nt_32x256_bf16_group, Bf16, Tile32x256)
TEMPER_MATMUL_GROUP(matmul_nt_16x256_bf16_group, Bf16, Tile16x256)
