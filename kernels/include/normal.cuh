// The normal law of one Philox call: 4 words -> 16 values z = S / 32768, S an integer (numerics.md section 4a).
//
// Column c of a row belongs to call 4*floor(c/64) + (floor(c/2) mod 4); it is that call's value
// j = 2*(floor(c/8) mod 8) + (c mod 2). So one thread that holds the columns 8i + 2q + {0,1}, i = 0..7, of a
// 64-column block (as an mma accumulator does) uses all 16 values of the call 4*block + q: value 2i + parity.
#pragma once

#include "philox.cuh"

// TABLE digit of a nibble: +-(2d+1), d = table[n mod 4] for n < 8 and 0 for n >= 8; minus where bit 2 of n is set.
TEMPER_DEVICE int odd_digit(uint32_t table, uint32_t nibble) {
  const int digit = nibble < 8 ? int((table >> (8 * (nibble & 3))) & 255) : 0;
  const int odd = 2 * digit + 1;
  return nibble & 4 ? -odd : odd;
}

// z of all 16 values of a call; S = 1/2 sum over word k and position i of ROW[r][k]*COEF[v][i]*BASE[i^v]*digit[k][i]
// for value j = 4v + r. Summed by word first: T[v][k], then over k with the signs of ROW.
TEMPER_DEVICE void normals_of_words(const Words4& words, float z[16]) {
  constexpr uint32_t low_table = 121u | 29u << 8 | 23u << 16 | 17u << 24;
  constexpr uint32_t high_table = 126u | 118u << 8 | 106u << 16 | 82u << 24;
  constexpr int base[4] = {12, 17, 19, 20};
  // Bit i (or k) set: minus. COEF rows ++++, +-+-, +--+, --++; ROW rows ++++, +-+-, ++--, -++-.
  constexpr uint32_t coef_minus[4] = {0x0, 0xa, 0x6, 0x3};
  constexpr uint32_t row_minus[4] = {0x0, 0xa, 0xc, 0x9};
  int by_word[4][4] = {};  // [v][k]
#pragma unroll
  for (int k = 0; k < 4; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = (words.x[k] >> (4 * i)) & 15, high = (words.x[k] >> (16 + 4 * i)) & 15;
      const int digit = 6 * odd_digit(low_table, low) + 5 * odd_digit(high_table, high);
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int term = base[i ^ v] * digit;
        by_word[v][k] += (coef_minus[v] >> i) & 1 ? -term : term;
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const int v = j / 4, r = j % 4;
    int twice = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) twice += (row_minus[r] >> k) & 1 ? -by_word[v][k] : by_word[v][k];
    z[j] = float(twice / 2) * (1.0f / 32768.0f);  // twice is even; the quotient and z are exact
  }
}

// The 16 normals of columns 64*block + 8i + 2q + {0,1} under (seed, stream, token).
TEMPER_DEVICE void normals_of_call(uint64_t seed, uint32_t stream, uint64_t token, uint32_t call, float z[16]) {
  const Words4 counter{{call, stream, uint32_t(token), uint32_t(token >> 32)}};
  normals_of_words(philox4x32_7(uint32_t(seed), uint32_t(seed >> 32), counter), z);
}
