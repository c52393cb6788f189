// From a block's amax b to its scale: what a finite block is multiplied by (or divided by) before its elements are
// rounded, what their values are multiplied by after it, and what is stored (numerics.md section 2; the definition is
// src/numerics/block_scale.rs). A format is a struct: its grid, its block, scale(), and how many blocks of threads its
// kernels want on a multiprocessor. tensor(): what scale() wants to know of the tensor, from its amax.
#pragma once

#include "e2m1.cuh"
#include "e4m3.cuh"

struct TensorScale {
  float factor;  // b * factor is the target of the block's scale
  float decode;  // 1 / G
};

struct BlockScale {
  float encode;   // scaled = x * encode; unused where the format divides
  float decode;   // scaled = x / decode where the format divides; y = value * decode
  uint32_t byte;  // E8M0 or E4M3; 0 in fp8
};

// The values are the wire between src/ops/cuda/fake_quant.rs and the kernels.
enum MxScaleRule : uint32_t { kFloor = 0, kEven = 1, kRceil = 2 };

// mxfp4, mxfp8: 2^k with b = m * 2^e, k = e - emax (+1 by rule), at least -127, as zero and subnormal b give.
template <class Grid_, int kMaxExponent, uint32_t kLargestMantissa>
struct MxFormat {
  using Grid = Grid_;
  static constexpr uint32_t kBlock = 32, kResident = 6;
  static constexpr bool kDivides = false, kTwoCandidates = false;
  static constexpr uint32_t kNonfiniteByte = 0xff;

  TEMPER_DEVICE BlockScale scale(uint32_t rule, float b, const TensorScale&) {
    // Carries into the exponent where the rule goes up: m >= 1.75, or m above that of the largest element.
    const uint32_t carry = rule == kEven ? 0x200000 : rule == kRceil ? 0x7fffff - kLargestMantissa : 0;
    const int exponent = int((bits_of(b) + carry) >> 23) - kMaxExponent;  // k + 127, at most 253
    const uint32_t byte = exponent < 0 ? 0 : uint32_t(exponent);
    return BlockScale{float_of((254 - byte) << 23), float_of(byte == 0 ? 0x400000 : byte << 23), byte};
  }
  TEMPER_DEVICE TensorScale tensor(uint32_t, float) { return TensorScale{1.0f, 1.0f}; }
};

using Mxfp4 = MxFormat<E2m1Grid, 2, 0x400000>;  // 6 = 1.5 * 2^2
using Mxfp8 = MxFormat<E4m3Grid, 8, 0x600000>;  // 448 = 1.75 * 2^8

// G = range / A, the tensor_encode_scale; 1 for a tensor of zeros.
TEMPER_DEVICE float tensor_encode_scale(float range, float tensor_amax) {
  return tensor_amax == 0.0f ? 1.0f : fminf(range / tensor_amax, kFloatMax);
}

// S = e4m3(min(target, 448)), decode S * (1/G), encode min(1/decode, largest f32), 0 where S = 0.
TEMPER_DEVICE BlockScale two_level_scale(float target, float tensor_decode) {
  const float scale = round_nearest_even<E4m3Grid>(fminf(target, E4m3Grid::kMax));
  const float decode = scale * tensor_decode;
  return BlockScale{scale == 0.0f ? 0.0f : fminf(1.0f / decode, kFloatMax), decode, e4m3_index(scale)};
}

struct Nvfp4 {
  using Grid = E2m1Grid;
  static constexpr uint32_t kBlock = 16, kResident = 6;
  static constexpr bool kDivides = false, kTwoCandidates = false;
  static constexpr uint32_t kNonfiniteByte = kE4m3Nan;

  TEMPER_DEVICE BlockScale scale(uint32_t, float b, const TensorScale& tensor) {
    return two_level_scale(b * tensor.factor, tensor.decode);
  }
  // With stochastic rounding no S rounded down may let b clip: 16/17 of the range, 17/16 of S.
  TEMPER_DEVICE TensorScale tensor(uint32_t rounding, float amax) {
    const bool stochastic = is_stochastic(rounding);
    const float g = tensor_encode_scale(stochastic ? 43008.0f / 17.0f : 2688.0f, amax);
    return TensorScale{g * (stochastic ? 17.0f / 96.0f : 1.0f / 6.0f), 1.0f / g};
  }
};

// nvfp4:4over6: of the scales that map b to 6 and to 4 the one of smaller squared error.
struct Nvfp4FourOverSix {
  using Grid = E2m1Grid;
  static constexpr uint32_t kBlock = 16, kResident = 2;
  static constexpr bool kDivides = false, kTwoCandidates = true;
  static constexpr uint32_t kNonfiniteByte = kE4m3Nan;

  TEMPER_DEVICE BlockScale scale(uint32_t, float b, const TensorScale& tensor) {
    return two_level_scale(b * tensor.factor, tensor.decode);
  }
  TEMPER_DEVICE BlockScale other_scale(float b, const TensorScale& tensor) {
    return two_level_scale(1.5f * (b * tensor.factor), tensor.decode);
  }
  TEMPER_DEVICE TensorScale tensor(uint32_t, float amax) {
    const float g = tensor_encode_scale(1536.0f, amax);
    return TensorScale{g / 6.0f, 1.0f / g};
  }
};

// nvfp4_single_level (src/numerics/original.rs): b/6 to 3 mantissa bits, exponent in [-6, 8], mantissa in [1, 1.875].
struct Nvfp4SingleLevel {
  using Grid = E2m1Grid;
  static constexpr uint32_t kBlock = 16, kResident = 4;
  static constexpr bool kDivides = true, kTwoCandidates = false;
  static constexpr uint32_t kNonfiniteByte = kE4m3Nan;

  TEMPER_DEVICE BlockScale scale(uint32_t, float b, const TensorScale&) {
    const float target = b / 6.0f;
    int exponent = int(bits_of(target) >> 23) - 127;
    exponent = exponent < -6 ? -6 : exponent > 8 ? 8 : exponent;
    const float power = power_of_two(exponent);
    const float eighths = fminf(fmaxf(rintf(target / power * 8.0f), 8.0f), 15.0f);
    return BlockScale{0.0f, eighths * 0.125f * power, uint32_t(exponent + 7) << 3 | (uint32_t(eighths) - 8)};
  }
  TEMPER_DEVICE TensorScale tensor(uint32_t, float) { return TensorScale{1.0f, 1.0f}; }
};

// fp8: s = A / 448, A of the row or of the tensor; 1 where that is 0. Its block is the row, whose amax is found before.
struct Fp8 {
  using Grid = E4m3Grid;
  static constexpr uint32_t kBlock = 0, kResident = 4;
  static constexpr bool kDivides = true, kTwoCandidates = false;

  TEMPER_DEVICE BlockScale scale(uint32_t, float amax, const TensorScale&) {
    const float s = amax / 448.0f;
    return BlockScale{0.0f, s == 0.0f ? 1.0f : s, 0};
  }
  TEMPER_DEVICE TensorScale tensor(uint32_t, float) { return TensorScale{1.0f, 1.0f}; }
};
