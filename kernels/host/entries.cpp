// What the tests call: every kernel by its name under the shim, and the codecs alone. The .cu files are included as they
// are: the text that nvcc compiles is the text that runs here. A function that returns text returns null, or what went
// wrong.

#include "shim.h"

#include "amax.cu"
#include "decode_attention.cu"
#include "fake_quant_fp8.cu"
#include "fake_quant_mxfp4.cu"
#include "fake_quant_nvfp4.cu"
#include "fake_quant_variants.cu"
#include "matmul_f32.cu"
#include "matmul_nn.cu"
#include "matmul_nt.cu"
#include "matmul_sm90.cu"
#include "matmul_tn.cu"
#include "matmul_w4.cu"
#include "noise.cu"
#include "rms_norm.cu"
#include "rotary.cu"
#include "sample.cu"
#include "swiglu.cu"

extern "C" {

void temper_host_thread_order(uint32_t order) { host::set_thread_order(order); }

const char* temper_host_run(const char* kernel, uint32_t grid, uint32_t block, uint32_t shared_bytes, const void* args,
                            size_t args_bytes) {
  return host::launch_entry(kernel, grid, block, shared_bytes, args, args_bytes);
}

uint32_t temper_host_e2m1_encode(float x) { return e2m1_encode(x); }
float temper_host_e2m1_decode(uint32_t code) { return e2m1_decode(code); }
uint32_t temper_host_e4m3_encode(float x) { return e4m3_encode(x); }
float temper_host_e4m3_decode(uint32_t byte) { return e4m3_decode(byte); }
uint16_t temper_host_to_bf16(float x) { return uint16_t(narrowed_pair(static_cast<const Bf16*>(nullptr), x, 0.0f)); }
uint16_t temper_host_to_f16(float x) { return uint16_t(narrowed_pair(static_cast<const F16*>(nullptr), x, 0.0f)); }
float temper_host_from_f16(uint16_t bits) { return widened(F16{bits}); }

void temper_host_philox(uint32_t key_lo, uint32_t key_hi, const uint32_t counter[4], uint32_t words[4]) {
  Words4 c;
  memcpy(c.x, counter, sizeof c.x);
  const Words4 w = philox4x32_7(key_lo, key_hi, c);
  memcpy(words, w.x, sizeof w.x);
}

// Two kernels that are wrong on purpose, so that the tests can see the shim notice.
const char* temper_host_missing_barrier(uint32_t block, float* out) {
  return host::launch(1, block, 0, [=] {
    __shared__ float values[1024];
    values[threadIdx.x] = 1.0f;
    out[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];  // read before the other thread has written
  });
}

const char* temper_host_divergent_barrier(uint32_t block) {
  return host::launch(1, block, 0, [=] {
    if (threadIdx.x != 3) __syncthreads();
  });
}

}  // extern "C"
