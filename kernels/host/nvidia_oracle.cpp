// NVIDIA's own conversions (cuda_fp4.h, cuda_fp8.h, cuda_bf16.h compile with plain g++), an oracle for the codecs
// that shares no code with them. A build without CUDA's headers answers "not available" and the tests say so.

#include <stdint.h>

#if __has_include(<cuda_fp4.h>) && __has_include(<cuda_fp8.h>)
#include <cuda_bf16.h>
#include <cuda_fp4.h>
#include <cuda_fp8.h>
#include <string.h>

extern "C" {

int temper_oracle_available() { return 1; }

uint32_t temper_oracle_e2m1(float x) { return __nv_cvt_float_to_fp4(x, __NV_E2M1, cudaRoundNearest); }

uint32_t temper_oracle_e4m3(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }

uint16_t temper_oracle_bf16(float x) {
  const __nv_bfloat16 value = __float2bfloat16_rn(x);
  uint16_t bits;
  memcpy(&bits, &value, 2);
  return bits;
}

}  // extern "C"

#else

extern "C" {
int temper_oracle_available() { return 0; }
uint32_t temper_oracle_e2m1(float) { return 0; }
uint32_t temper_oracle_e4m3(float) { return 0; }
uint16_t temper_oracle_bf16(float) { return 0; }
}

#endif
