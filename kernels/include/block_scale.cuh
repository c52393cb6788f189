// From a block's amax b to its scale: what a finite block is multiplied by before E2M1, and what its codes are
// multiplied by after it (numerics.md section 2; the definition is src/numerics/block_format.rs).
#pragma once

#include "e2m1.cuh"
#include "e4m3.cuh"

// The values are the wire between src/ops/cuda/fake_quant.rs and the kernels.
enum QuantFormat : uint32_t {
  kMxfp4Floor = 0,
  kMxfp4Even = 1,
  kMxfp4Rceil = 2,
  kNvfp4 = 3,
  kNvfp4SingleLevel = 4,
};

TEMPER_DEVICE uint32_t block_size_of(uint32_t format) { return format <= kMxfp4Rceil ? 32 : 16; }

struct BlockScale {
  float encode;  // scaled = x * encode, or x / decode where `divide`
  float decode;  // y = value(code) * decode
  bool divide;
};

// mxfp4: 2^k with b = m * 2^e, k = e - 2 (+1 by rule), clamped to [-127, 127]; zero and subnormal b give -127.
TEMPER_DEVICE BlockScale mxfp4_scale(float b, uint32_t rule) {
  const uint32_t bits = bits_of(b);
  const int biased = int(bits >> 23);
  const uint32_t mantissa = bits & 0x7fffffu;
  int k = -127;
  if (biased != 0) {
    const int up = (rule == kMxfp4Even && mantissa >= 0x600000u)     // m >= 1.75
                   || (rule == kMxfp4Rceil && mantissa > 0x400000u);  // m > 1.5
    k = biased - 127 - 2 + up;
    k = k < -127 ? -127 : k;  // the largest e is 127, so k <= 126
  }
  return BlockScale{power_of_two(-k), power_of_two(k), false};
}

// G = 2688 / A, the tensor_encode_scale; 1 for a tensor of zeros.
TEMPER_DEVICE float tensor_encode_scale(float tensor_amax) {
  if (tensor_amax == 0.0f) return 1.0f;
  const float g = 2688.0f / tensor_amax;
  return g < kFloatMax ? g : kFloatMax;
}

// nvfp4: S = e4m3(min(b * (G * (1/6)), 448)), decode S * (1/G), encode min(1/decode, largest f32), 0 where S = 0.
TEMPER_DEVICE BlockScale nvfp4_scale(float b, float g) {
  const float target = b * (g * (1.0f / 6.0f));
  const float scale = e4m3_decode(e4m3_encode(target < kE4m3Max ? target : kE4m3Max));
  const float decode = scale * (1.0f / g);
  const float inverse = 1.0f / decode;
  const float encode = scale == 0.0f ? 0.0f : inverse < kFloatMax ? inverse : kFloatMax;
  return BlockScale{encode, decode, false};
}

// nvfp4_single_level (src/numerics/original.rs): b/6 to 3 mantissa bits, exponent in [-6, 8], mantissa in [1, 1.875].
TEMPER_DEVICE BlockScale nvfp4_single_level_scale(float b) {
  const float target = b / 6.0f;
  int exponent = int(bits_of(target) >> 23) - 127;
  exponent = exponent < -6 ? -6 : exponent > 8 ? 8 : exponent;
  const float power = power_of_two(exponent);
  float eighths = rintf(target / power * 8.0f);
  eighths = eighths < 8.0f ? 8.0f : eighths > 15.0f ? 15.0f : eighths;
  return BlockScale{0.0f, eighths * 0.125f * power, true};
}

TEMPER_DEVICE BlockScale block_scale(uint32_t format, float b, float g) {
  if (format == kNvfp4) return nvfp4_scale(b, g);
  if (format == kNvfp4SingleLevel) return nvfp4_single_level_scale(b);
  return mxfp4_scale(b, format);
}
