// dX = dY W: dY with k (the out features) last, W with its rows. include/matmul.cuh has the body.

#include "matmul.cuh"

TEMPER_MATMUL(matmul_nn_128x128_bf16, Bf16, Tile128x128, true, false)
TEMPER_MATMUL(matmul_nn_64x128_bf16, Bf16, Tile64x128, true, false)

TEMPER_MATMUL(matmul_nn_128x128_f16, F16, Tile128x128, true, false)
