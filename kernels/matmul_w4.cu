// y = x Q^T with packed MXFP4 and NVFP4 weights, for a decoding step. include/matmul_w4.cuh has the body.

#include "matmul_w4.cuh"

using TileW4_16x256 = MatmulTile<16, 256, 16, 3, 2>;
using TileW4_32x256 = MatmulTile<32, 256, 32, 3, 2>;
using TileW4_64x256 = MatmulTile<64, 256, 64, 3, 1>;

TEMPER_MATMUL_W4(matmul_w4_16x256_mxfp4, PackedMxfp4, TileW4_16x256)
TEMPER_MATMUL_W4(matmul_w4_32x256_mxfp4, PackedMxfp4, TileW4_32x256)
TEMPER_MATMUL_W4(matmul_w4_64x256_mxfp4, PackedMxfp4, TileW4_64x256)

TEMPER_MATMUL_W4(matmul_w4_16x256_nvfp4, PackedNvfp4, TileW4_16x256)
TEMPER_MATMUL_W4(matmul_w4_32x256_nvfp4, PackedNvfp4, TileW4_32x256)
TEMPER_MATMUL_W4(matmul_w4_64x256_nvfp4, PackedNvfp4, TileW4_64x256)

TEMPER_MATMUL_W4_GROUP(matmul_w4_16x256_mxfp4_group, PackedMxfp4, TileW4_16x256)
TEMPER_MATMUL_W4_GROUP(matmul_w4_16x256_nvfp4_group, PackedNvfp4, TileW4_16x256)
