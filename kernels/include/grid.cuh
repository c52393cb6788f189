// Rounding a magnitude to the grid of a small float, without codes.
//
// With M = 1.5 * 2^23 steps of the grid at a, (a + M) - M is the nearest multiple of the step, ties to even multiples,
// which are the even codes; where the sum is cut instead of rounded, the multiple below. The definitions are
// src/numerics/e2m1.rs, e4m3.rs and, for half_away and ties toward zero, original.rs.
#pragma once

#include "portable.cuh"

struct E2m1Grid {
  static constexpr int kMantissaBits = 1, kMinExponent = 0;
  static constexpr float kMax = 6.0f;
};

struct E4m3Grid {
  static constexpr int kMantissaBits = 3, kMinExponent = -6;
  static constexpr float kMax = 448.0f;
};

// The values are the wire between src/ops/cuda/fake_quant.rs and the kernels; kTowardZero is nvfp4_single_level's own.
enum Rounding : uint32_t { kNearestEven = 0, kHalfAway = 1, kStochastic16 = 2, kStochastic8 = 3, kTowardZero = 4 };

TEMPER_DEVICE bool is_stochastic(uint32_t rounding) { return rounding == kStochastic16 || rounding == kStochastic8; }

// 2^e, e the exponent of a or the grid's smallest. What follows from it is made by multiplications, which are exact and leave
// the integer pipe, the busier one, alone.
template <class Grid>
TEMPER_DEVICE float binade_of(float a) {
  const uint32_t exponent = bits_of(a) & kInfinityBits, least = uint32_t(127 + Grid::kMinExponent) << 23;
  return float_of(exponent > least ? exponent : least);
}

// The distance of neighbours in a binade, over the binade.
template <class Grid>
TEMPER_DEVICE constexpr float step_ratio() {
  return 1.0f / (1 << Grid::kMantissaBits);
}

// M: 1.5 * 2^23 steps.
template <class Grid>
TEMPER_DEVICE float steps_of(float binade) {
  return binade * (12582912.0f * step_ratio<Grid>());
}

// a <= Grid::kMax, as below.
template <class Grid>
TEMPER_DEVICE float round_nearest_even(float a) {
  const float steps = steps_of<Grid>(binade_of<Grid>(a));
  return (a + steps) - steps;
}

template <class Grid>
TEMPER_DEVICE float round_half_away(float a) {
  const float binade = binade_of<Grid>(a), steps = steps_of<Grid>(binade), step = binade * step_ratio<Grid>();
  const float rounded = (a + steps) - steps;
  return a - rounded == 0.5f * step ? rounded + step : rounded;  // a tie that went down goes up
}

template <class Grid>
TEMPER_DEVICE float round_half_toward_zero(float a) {
  const float binade = binade_of<Grid>(a), steps = steps_of<Grid>(binade), step = binade * step_ratio<Grid>();
  const float rounded = (a + steps) - steps;
  return rounded - a == 0.5f * step ? rounded - step : rounded;  // a tie that went up goes down
}

// Down from t = a + u step, at most kMax, to a multiple of the step at t. u in [0, 1) in units of 2^-16 or coarser, so that
// u step is exact and the sum is rounded once, as in the definition.
template <class Grid>
TEMPER_DEVICE float round_stochastic(float a, float u) {
  const float t = fminf(fmaf(u * step_ratio<Grid>(), binade_of<Grid>(a), a), Grid::kMax);
  const float steps = steps_of<Grid>(binade_of<Grid>(t));
  return add_toward_zero(t, steps) - steps;
}
