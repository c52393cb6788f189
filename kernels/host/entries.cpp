// The kernels under the shim, as functions that a test calls with a launch geometry. Each returns null, or what went
// wrong. The .cu files are included as they are: the text that nvcc compiles is the text that runs here.

#include "shim.h"

#include "fake_quant.cu"
#include "matmul_error.cu"
#include "perturb.cu"

extern "C" {

void temper_host_thread_order(uint32_t order) { host::set_thread_order(order); }

const char* temper_host_amax_f32(uint32_t grid, uint32_t block, const float* x, float* amax, uint64_t rows,
                                 uint64_t cols, uint32_t block_size, uint32_t amax_stride) {
  return host::launch(grid, block, [=] { amax_f32(x, amax, rows, cols, block_size, amax_stride); });
}

const char* temper_host_amax_bf16(uint32_t grid, uint32_t block, const Bf16* x, float* amax, uint64_t rows,
                                  uint64_t cols, uint32_t block_size, uint32_t amax_stride) {
  return host::launch(grid, block, [=] { amax_bf16(x, amax, rows, cols, block_size, amax_stride); });
}

const char* temper_host_fake_quant_f32(uint32_t grid, uint32_t block, const float* x, float* out, const float* amax,
                                       unsigned long long* counts, uint64_t rows, uint64_t cols, uint32_t format,
                                       uint32_t amax_stride) {
  return host::launch(grid, block, [=] { fake_quant_f32(x, out, amax, counts, rows, cols, format, amax_stride); });
}

const char* temper_host_fake_quant_bf16(uint32_t grid, uint32_t block, const Bf16* x, Bf16* out, const float* amax,
                                        unsigned long long* counts, uint64_t rows, uint64_t cols, uint32_t format,
                                        uint32_t amax_stride) {
  return host::launch(grid, block, [=] { fake_quant_bf16(x, out, amax, counts, rows, cols, format, amax_stride); });
}

const char* temper_host_matmul_error_f32(uint32_t grid, uint32_t block, const float* y, const uint64_t* tokens,
                                         const float* bias, float* out, double* sums, uint64_t rows, uint64_t cols,
                                         uint32_t law, float scale, uint64_t seed, uint32_t stream) {
  return host::launch(grid, block, [=] {
    matmul_error_f32(y, tokens, bias, out, sums, rows, cols, law, scale, seed, stream);
  });
}

const char* temper_host_matmul_error_bf16(uint32_t grid, uint32_t block, const float* y, const uint64_t* tokens,
                                          const float* bias, Bf16* out, double* sums, uint64_t rows, uint64_t cols,
                                          uint32_t law, float scale, uint64_t seed, uint32_t stream) {
  return host::launch(grid, block, [=] {
    matmul_error_bf16(y, tokens, bias, out, sums, rows, cols, law, scale, seed, stream);
  });
}

const char* temper_host_perturb_f32(uint32_t grid, uint32_t block, const float* w, const uint64_t* tokens, float* out,
                                    uint64_t rows, uint64_t cols, float scale, uint64_t seed, uint32_t stream) {
  return host::launch(grid, block, [=] { perturb_f32(w, tokens, out, rows, cols, scale, seed, stream); });
}

// The codecs alone.
uint32_t temper_host_e2m1_encode(float x) { return e2m1_encode(x); }
float temper_host_e2m1_decode(uint32_t code) { return e2m1_decode(code); }
uint32_t temper_host_e4m3_encode(float x) { return e4m3_encode(x); }
float temper_host_e4m3_decode(uint32_t byte) { return e4m3_decode(byte); }
uint16_t temper_host_to_bf16(float x) { return to_bf16(x).bits; }

void temper_host_philox(uint32_t key_lo, uint32_t key_hi, const uint32_t counter[4], uint32_t words[4]) {
  Words4 c;
  memcpy(c.x, counter, sizeof c.x);
  const Words4 w = philox4x32_7(key_lo, key_hi, c);
  memcpy(words, w.x, sizeof w.x);
}

// Two kernels that are wrong on purpose, so that the tests can see the shim notice.
const char* temper_host_missing_barrier(uint32_t block, float* out) {
  return host::launch(1, block, [=] {
    __shared__ float values[1024];
    values[threadIdx.x] = 1.0f;
    out[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];  // read before the other thread has written
  });
}

const char* temper_host_divergent_barrier(uint32_t block) {
  return host::launch(1, block, [=] {
    if (threadIdx.x != 3) __syncthreads();
  });
}

}  // extern "C"
