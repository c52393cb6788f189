// y' = round(law(x W^T) + bias), dX and dW of bf16 on a Hopper: include/matmul_sm90.cuh. Built for sm_90a alone.
#include "matmul_sm90.cuh"

TEMPER_MATMUL_SM90(matmul_sm90_nt_256x128_bf16, 128, 5, true, true)
TEMPER_MATMUL_SM90(matmul_sm90_nt_256x192_bf16, 192, 3, true, true)
TEMPER_MATMUL_SM90(matmul_sm90_nn_256x128_bf16, 128, 5, true, false)
TEMPER_MATMUL_SM90(matmul_sm90_nn_256x192_bf16, 192, 3, true, false)
TEMPER_MATMUL_SM90(matmul_sm90_tn_256x128_bf16, 128, 5, false, false)
TEMPER_MATMUL_SM90(matmul_sm90_tn_256x192_bf16, 192, 3, false, false)
