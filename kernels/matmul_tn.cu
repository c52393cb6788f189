// dW = dY^T x: both operands with their rows last, k the tokens. include/matmul.cuh has the body.

#include "matmul.cuh"

TEMPER_MATMUL(matmul_tn_128x128_bf16, Bf16, Tile128x128, false, false)
TEMPER_MATMUL(matmul_tn_64x128_bf16, Bf16, Tile64x128, false, false)

TEMPER_MATMUL(matmul_tn_128x128_f16, F16, Tile128x128, false, false)
