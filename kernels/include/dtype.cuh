// f32, bf16 and f16 in memory, one at a time and eight at a time: every read is exact into f32, every write rounds to
// nearest even.
#pragma once

#include "portable.cuh"

struct Bf16 {
  uint16_t bits;
};

struct F16 {
  uint16_t bits;
};

TEMPER_DEVICE float widened(float x) { return x; }
TEMPER_DEVICE float widened(Bf16 x) { return float_of(uint32_t(x.bits) << 16); }
TEMPER_DEVICE float widened(F16 x) {
#ifdef TEMPER_CUDA
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  const uint32_t exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023, sign = uint32_t(x.bits & 0x8000) << 16;
  if (exponent == 0) return float_of(bits_of(float(mantissa) * float_of((127 - 24) << 23)) | sign);
  return float_of(sign | (exponent == 31 ? kInfinityBits : (exponent + 112) << 23) | mantissa << 13);
#endif
}

// Two values to 16 bits each, the first in the low half; NaN stays NaN, in f16 what is too large becomes infinity.
TEMPER_DEVICE uint32_t narrowed_pair(const Bf16*, float low, float high) {
#ifdef TEMPER_CUDA
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  const auto narrow = [](float x) -> uint32_t {
    const uint32_t u = bits_of(x);
    return (u & ~kSignBit) > kInfinityBits ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  };
  return narrow(high) << 16 | narrow(low);
#endif
}

TEMPER_DEVICE uint32_t narrowed_pair(const F16*, float low, float high) {
#ifdef TEMPER_CUDA
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  const auto narrow = [](float x) -> uint32_t {
    const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000;
    const float a = magnitude(x);
    if (!(a == a)) return 0x7fff;
    if (a >= 65520.0f) return sign | 0x7c00;
    // Multiples of 2^-24 below 2^-14, else 10 mantissa bits; 1.5 * 2^23 steps round to nearest even.
    if (a < 6.103515625e-5f) return sign | (bits_of(a + 0.5f) & 0x7ff);
    return sign | (((bits_of(a) + 0xfff + (bits_of(a) >> 13 & 1)) >> 13) - (112 << 10));
  };
  return narrow(high) << 16 | narrow(low);
#endif
}

// The values that a reader sees after rounding to the dtype.
TEMPER_DEVICE float rounded(const float*, float x) { return x; }
template <typename T>
TEMPER_DEVICE float rounded(const T* dtype, float x) {
  return widened(T{uint16_t(narrowed_pair(dtype, x, 0.0f))});
}
TEMPER_DEVICE void round_pair(const float*, float&, float&) {}
template <typename T>
TEMPER_DEVICE void round_pair(const T* dtype, float& low, float& high) {
  const uint32_t pair = narrowed_pair(dtype, low, high);
  low = widened(T{uint16_t(pair)}), high = widened(T{uint16_t(pair >> 16)});
}

TEMPER_DEVICE void store(float* out, uint64_t at, float x) { out[at] = x; }
template <typename T>
TEMPER_DEVICE void store(T* out, uint64_t at, float x) {
  out[at].bits = uint16_t(narrowed_pair(out, x, 0.0f));
}

// Machine words that are read and written at once.
struct alignas(8) Words2 {
  uint32_t w[2];
};
struct alignas(16) Vector4 {
  uint32_t w[4];
};

// Eight consecutive elements of a row, as they lie in memory.
template <typename T>
struct Octet {
  static constexpr int kVectors = sizeof(T) / 2;
  Vector4 vector[kVectors];
};

TEMPER_DEVICE float element(const Octet<float>& x, int i) { return float_of(x.vector[i / 4].w[i % 4]); }
template <typename T>
TEMPER_DEVICE float element(const Octet<T>& x, int i) {
  return widened(T{uint16_t(x.vector[0].w[i / 2] >> (16 * (i % 2)))});
}

// The octet at x, which is aligned to 16 bytes.
template <typename T>
TEMPER_DEVICE Octet<T> load_octet(const T* x) {
  Octet<T> octet;
#pragma unroll
  for (int v = 0; v < Octet<T>::kVectors; ++v) octet.vector[v] = reinterpret_cast<const Vector4*>(x)[v];
  return octet;
}

// From row[column] on, one by one; elements from `cols` on are 0.
template <typename T>
TEMPER_DEVICE Octet<T> load_ragged(const T* row, uint32_t column, uint32_t cols) {
  Octet<T> x;
  constexpr int kPerWord = 4 / sizeof(T);
#pragma unroll
  for (int w = 0; w < 8 / kPerWord; ++w) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kPerWord; ++i) {
      const uint32_t c = column + uint32_t(w * kPerWord + i);
      if (c < cols) {
        if constexpr (sizeof(T) == 4) {
          word = bits_of(row[c]);
        } else {
          word |= uint32_t(row[c].bits) << (16 * i);
        }
      }
    }
    x.vector[w / 4].w[w % 4] = word;
  }
  return x;
}

template <typename T>
TEMPER_DEVICE Octet<T> zero_octet() {
  Octet<T> x;
#pragma unroll
  for (int v = 0; v < Octet<T>::kVectors; ++v) x.vector[v] = Vector4{{0, 0, 0, 0}};
  return x;
}

TEMPER_DEVICE Octet<float> narrowed_octet(const float*, const float y[8]) {
  Octet<float> out;
#pragma unroll
  for (int i = 0; i < 8; ++i) out.vector[i / 4].w[i % 4] = bits_of(y[i]);
  return out;
}
template <typename T>
TEMPER_DEVICE Octet<T> narrowed_octet(const T* dtype, const float y[8]) {
  Octet<T> out;
#pragma unroll
  for (int w = 0; w < 4; ++w) out.vector[0].w[w] = narrowed_pair(dtype, y[2 * w], y[2 * w + 1]);
  return out;
}

// As load_octet.
template <typename T>
TEMPER_DEVICE void store_octet(T* y, const Octet<T>& octet) {
#pragma unroll
  for (int v = 0; v < Octet<T>::kVectors; ++v) reinterpret_cast<Vector4*>(y)[v] = octet.vector[v];
}

// As load_ragged.
template <typename T>
TEMPER_DEVICE void store_ragged(T* row, uint32_t column, uint32_t cols, const Octet<T>& y) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (column + i < cols) {
      if constexpr (sizeof(T) == 4) {
        row[column + i] = element(y, i);
      } else {
        row[column + i].bits = uint16_t(y.vector[0].w[i / 2] >> (16 * (i % 2)));
      }
    }
  }
}

// An octet of a row of `cols` elements, from `column` on; kIsWhole: all of it is below `cols` and aligned to 16 bytes.
template <bool kIsWhole, typename T>
TEMPER_DEVICE Octet<T> load_part(const T* row, uint32_t column, uint32_t cols) {
  if constexpr (kIsWhole) return load_octet(row + column);
  return load_ragged(row, column, cols);
}
template <bool kIsWhole, typename T>
TEMPER_DEVICE void store_part(T* row, uint32_t column, uint32_t cols, const Octet<T>& octet) {
  if constexpr (kIsWhole) {
    store_octet(row + column, octet);
  } else {
    store_ragged(row, column, cols, octet);
  }
}

// The magnitudes of a word: of one f32, or of two values of 16 bits.
TEMPER_DEVICE uint32_t magnitudes(const float*, uint32_t word) { return word & ~kSignBit; }
template <typename T>
TEMPER_DEVICE uint32_t magnitudes(const T*, uint32_t word) {
  return word & 0x7fff7fffu;
}

// The larger of the magnitudes of two words; NaN wins over everything. As integers magnitudes have the order of their values,
// NaN above infinity.
#ifdef TEMPER_CUDA
TEMPER_DEVICE uint32_t larger(const float*, uint32_t a, uint32_t b) {
  float max;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(max) : "f"(float_of(a)), "f"(float_of(b)));
  return bits_of(max);
}
TEMPER_DEVICE uint32_t larger(const Bf16*, uint32_t a, uint32_t b) {
  uint32_t max;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(max) : "r"(a), "r"(b));
  return max;
}
TEMPER_DEVICE uint32_t larger(const F16*, uint32_t a, uint32_t b) {
  uint32_t max;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(max) : "r"(a), "r"(b));
  return max;
}
#else
TEMPER_DEVICE uint32_t larger(const float*, uint32_t a, uint32_t b) { return a > b ? a : b; }
template <typename T>
uint32_t larger(const T*, uint32_t a, uint32_t b) {
  const uint32_t low_a = a & 0xffffu, low_b = b & 0xffffu, high_a = a >> 16, high_b = b >> 16;
  return (high_a > high_b ? high_a : high_b) << 16 | (low_a > low_b ? low_a : low_b);
}
#endif

// The largest magnitude of eight elements as the bits of an f32, which are ordered as it is; kInfinityBits or more where
// NaN or infinity is among them.
template <typename T>
TEMPER_DEVICE uint32_t octet_amax(const Octet<T>& x) {
  constexpr int kWords = 4 * Octet<T>::kVectors;
  const T* dtype = nullptr;
  uint32_t word[kWords];
#pragma unroll
  for (int w = 0; w < kWords; ++w) word[w] = magnitudes(dtype, x.vector[w / 4].w[w % 4]);
#pragma unroll
  for (int half = kWords / 2; half > 0; half /= 2) {
#pragma unroll
    for (int w = 0; w < half; ++w) word[w] = larger(dtype, word[w], word[w + half]);
  }
  if constexpr (sizeof(T) == 4) {
    return word[0];
  } else {
    const uint32_t low = bits_of(widened(T{uint16_t(word[0])})), high = bits_of(widened(T{uint16_t(word[0] >> 16)}));
    return high > low ? high : low;
  }
}
