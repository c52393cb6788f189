// The normal law of one Philox call: 4 words -> 16 values z = S / 32768, S an integer (numerics.md section 4a).
//
// Column c of a row belongs to call 4*floor(c/64) + (floor(c/2) mod 4); it is that call's value
// j = 2*(floor(c/8) mod 8) + (c mod 2). So one thread that holds the columns 8i + 2q + {0,1}, i = 0..7, of a
// 64-column block (as an mma accumulator does) uses all 16 values of the call 4*block + q: value 2i + parity.
//
// A digit is odd(T, n) = 2 e + 1 with a signed byte e: T[n mod 4] for n < 4, its complement for 4 <= n < 8, and of that
// byte the sign alone (0 or -1) for n >= 8. That is what prmt does with a nibble as selector, so a word's four low
// nibbles become four digits at once, and a product with four coefficients is a dp4a:
//
//   D[v][k] = sum over i of COEF[v][i] BASE[i^v] (6 e(TL, l_ki) + 5 e(TH, h_ki)),   S[4v + r] = sum over k of ROW[r][k] D[v][k]
//
// where half of the "+ 1" of its digits, 11/2 of the sum over i of COEF BASE, is added to every D.
#pragma once

#include "philox.cuh"

namespace normal {

constexpr int kBase[4] = {12, 17, 19, 20};
// Bit i set: minus. COEF rows ++++, +-+-, +--+, --++.
constexpr uint32_t kCoefMinus[4] = {0x0, 0xa, 0x6, 0x3};

constexpr uint32_t table(uint32_t a, uint32_t b, uint32_t c, uint32_t d) { return a | b << 8 | c << 16 | d << 24; }
constexpr uint32_t kLow = table(121, 29, 23, 17), kHigh = table(126, 118, 106, 82);

constexpr int coefficient(int v, int i) { return (kCoefMinus[v] >> i & 1 ? -1 : 1) * kBase[i ^ v]; }

template <int v>
struct Coefficients {
  // Four signed bytes: times * COEF[v][i] * BASE[i ^ v].
  static constexpr uint32_t bytes(int times) {
    return table(uint8_t(times * coefficient(v, 0)), uint8_t(times * coefficient(v, 1)),
                 uint8_t(times * coefficient(v, 2)), uint8_t(times * coefficient(v, 3)));
  }
  static constexpr uint32_t kSix = bytes(6), kFive = bytes(5);
  static constexpr int kOffset =
      11 * (coefficient(v, 0) + coefficient(v, 1) + coefficient(v, 2) + coefficient(v, 3)) / 2;
};

template <int v>
TEMPER_DEVICE void four_values(const uint32_t low[4], const uint32_t high[4], int s[4]) {
  using C = Coefficients<v>;
  int d[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) d[k] = dot_bytes(low[k], C::kSix, dot_bytes(high[k], C::kFive, C::kOffset));
  // ROW rows ++++, +-+-, ++--, -++-.
  const int sum = d[0] + d[1], difference = d[0] - d[1];
  s[0] = sum + d[2] + d[3];
  s[1] = difference + d[2] - d[3];
  s[2] = sum - d[2] - d[3];
  s[3] = d[2] - d[3] - difference;
}

}  // namespace normal

// S of all 16 values of a call: z = S * 2^-15.
TEMPER_DEVICE void normal_integers(const Words4& words, int s[16]) {
  uint32_t low[4], high[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    low[k] = choose_bytes(normal::kLow, ~normal::kLow, words.x[k]);
    high[k] = choose_bytes(normal::kHigh, ~normal::kHigh, words.x[k] >> 16);
  }
  normal::four_values<0>(low, high, s);
  normal::four_values<1>(low, high, s + 4);
  normal::four_values<2>(low, high, s + 8);
  normal::four_values<3>(low, high, s + 12);
}

// The 16 normals of columns 64*block + 8i + 2q + {0,1} under (seed, stream, key), call = 4*block + q.
TEMPER_DEVICE void normals_of_call(uint64_t seed, uint32_t stream, uint64_t key, uint32_t call, float z[16]) {
  const Words4 counter{{call, stream, uint32_t(key), uint32_t(key >> 32)}};
  int s[16];
  normal_integers(philox4x32_7(uint32_t(seed), uint32_t(seed >> 32), counter), s);
#pragma unroll
  for (int j = 0; j < 16; ++j) z[j] = float(s[j]) * (1.0f / 32768.0f);
}
