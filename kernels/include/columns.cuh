// The end of a matrix product: sixteen columns of a row get their error, their bias, one rounding, and are written.
//
//   out = round(law(y, s, z) + bias); or out += law(y, s, z)
//
// The four threads q = 0..3 of a 64-column block of a row have columns 8i + 2q + {0,1}, i = 0..7, as an mma accumulator does;
// value 2i + parity. So a thread uses all values of one Philox call (normal.cuh). What was injected is summed on the way.
#pragma once

#include "dtype.cuh"
#include "error_law.cuh"
#include "normal.cuh"
#include "reduce.cuh"

// The columns of a thread: pairs first + 8i, first + 8i + 1. kIsWhole: all of them are below `cols`, and pairs aligned.
template <bool kIsWhole, typename T>
TEMPER_DEVICE void load_columns(const T* row, uint32_t first, uint32_t cols, float y[16]) {
#pragma unroll
  for (uint32_t i = 0; i < 8; ++i) {
    const uint32_t column = first + 8 * i;
    if constexpr (!kIsWhole) {
      y[2 * i] = column < cols ? widened(row[column]) : 0.0f;
      y[2 * i + 1] = column + 1 < cols ? widened(row[column + 1]) : 0.0f;
    } else if constexpr (sizeof(T) == 4) {
      const Words2 pair = *reinterpret_cast<const Words2*>(row + column);
      y[2 * i] = float_of(pair.w[0]), y[2 * i + 1] = float_of(pair.w[1]);
    } else {
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(row + column);
      y[2 * i] = widened(T{uint16_t(pair)}), y[2 * i + 1] = widened(T{uint16_t(pair >> 16)});
    }
  }
}

template <bool kIsWhole>
TEMPER_DEVICE void store_columns(float* row, uint32_t first, uint32_t cols, bool active, const float out[16]) {
  if (!active) return;
#pragma unroll
  for (uint32_t i = 0; i < 8; ++i) {
    const uint32_t column = first + 8 * i;
    if constexpr (kIsWhole) {
      *reinterpret_cast<Words2*>(row + column) = Words2{{bits_of(out[2 * i]), bits_of(out[2 * i + 1])}};
    } else {
      if (column < cols) row[column] = out[2 * i];
      if (column + 1 < cols) row[column + 1] = out[2 * i + 1];
    }
  }
}

// The four lanes of a 64-column block hold 4-byte pairs; where all are whole, neighbours exchange half of them, so that
// each writes 8 bytes and the block whole sectors of 32. All lanes of a warp must call, `active` or not.
template <bool kIsWhole, typename T>
TEMPER_DEVICE void store_columns(T* row, uint32_t first, uint32_t cols, bool active, const float out[16]) {
  uint32_t pair[8];
#pragma unroll
  for (uint32_t i = 0; i < 8; ++i) pair[i] = narrowed_pair(row, out[2 * i], out[2 * i + 1]);
  if constexpr (kIsWhole) {
    const bool odd = threadIdx.x & 1;
    T* to = row + first + (odd ? 6 : 0);
#pragma unroll
    for (uint32_t m = 0; m < 4; ++m) {
      const uint32_t mine = odd ? pair[2 * m + 1] : pair[2 * m], other = odd ? pair[2 * m] : pair[2 * m + 1];
      const uint32_t received = __shfl_xor_sync(kFullWarp, other, 1);
      if (active) *reinterpret_cast<Words2*>(to + 16 * m) = Words2{{odd ? received : mine, odd ? mine : received}};
    }
  } else if (active) {
#pragma unroll
    for (uint32_t j = 0; j < 16; ++j) {
      const uint32_t column = first + j / 2 * 8 + j % 2;
      if (column < cols) row[column].bits = uint16_t(pair[j / 2] >> (16 * (j % 2)));
    }
  }
}

// error = round(y' + bias) - round(y + bias). A tensor's sums lie in kNoiseSlots places of kNoiseStride, to be added up: blocks
// that end at the same time shall not wait for each other.
enum NoiseSum { kNoise, kNoiseSquare, kCleanSquare, kCleanFourth, kNoisyElements, kNoiseSums };
constexpr uint32_t kNoiseSlots = 16, kNoiseStride = 8;

// The power of two at the greatest of 16 magnitudes: over it their squares and fourth powers stay in f32's range.
struct Unit {
  float value, inverse;

  TEMPER_DEVICE Unit of(const float x[16]) {
    float greatest = 0.0f;
#pragma unroll
    for (uint32_t j = 0; j < 16; ++j) greatest = fmaxf(greatest, magnitude(x[j]));
    constexpr uint32_t kOne = 1u << 23, kLeast = kOne, kGreatest = 253 * kOne;
    const uint32_t binade = bits_of(greatest) & kInfinityBits;
    const uint32_t bits = binade < kLeast ? kLeast : binade > kGreatest ? kGreatest : binade;
    return Unit{float_of(bits), float_of(254 * kOne - bits)};
  }
};

struct NoiseSums {
  double sum[kNoisyElements];
  uint32_t elements;

  // Of 16 columns, to the places of an f32, in f64 from then on: every element in f64 would cost more than its error.
  __device__ void add(const float clean[16], const float error[16]) {
    const Unit of_clean = Unit::of(clean), of_error = Unit::of(error);
    float of[kNoisyElements] = {};
#pragma unroll
    for (uint32_t j = 0; j < 16; ++j) {
      const float e = error[j] * of_error.inverse, y = clean[j] * of_clean.inverse, square = y * y;
      of[kNoise] += e;
      of[kNoiseSquare] = fmaf(e, e, of[kNoiseSquare]);
      of[kCleanSquare] += square;
      of[kCleanFourth] = fmaf(square, square, of[kCleanFourth]);
    }
    const double unit = of_error.value, clean_unit = of_clean.value, clean_square = clean_unit * clean_unit;
    sum[kNoise] += of[kNoise] * unit;
    sum[kNoiseSquare] += of[kNoiseSquare] * (unit * unit);
    sum[kCleanSquare] += of[kCleanSquare] * clean_square;
    sum[kCleanFourth] += of[kCleanFourth] * (clean_square * clean_square);
  }
};

template <bool kIsWhole, typename Out>
TEMPER_DEVICE void add_to_sums(const Out* dtype, uint32_t first, uint32_t cols, const float clean[16],
                               const float exact[16], const float noisy[16], NoiseSums& sums) {
  float y[16], error[16];
  uint32_t elements = 16;
#pragma unroll
  for (uint32_t j = 0; j < 16; j += 2) {
    float with[2] = {noisy[j], noisy[j + 1]}, without[2] = {exact[j], exact[j + 1]};
    round_pair(dtype, with[0], with[1]);
    round_pair(dtype, without[0], without[1]);
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      // The difference of two rounded values that lie near each other is exact in f32; else it has f32's places.
      y[j + i] = clean[j + i], error[j + i] = with[i] - without[i];
      if (!kIsWhole && first + j / 2 * 8 + i >= cols) y[j + i] = 0.0f, error[j + i] = 0.0f, --elements;
    }
  }
  sums.add(y, error);
  sums.elements += elements;
}

// This block's place in [kNoiseSlots, kNoiseStride].
TEMPER_DEVICE double* noise_slot(double* sums) { return sums + blockIdx.x % kNoiseSlots * kNoiseStride; }

// Adds the block's to to [kNoiseSlots, kNoiseStride]; scratch [kWarps_ kNoiseSums]. As add_block_sums.
template <uint32_t kWarps_>
TEMPER_DEVICE void add_noise_sums(const NoiseSums& sums, double* scratch, double* to) {
  const double values[kNoiseSums] = {sums.sum[kNoise], sums.sum[kNoiseSquare], sums.sum[kCleanSquare],
                                     sums.sum[kCleanFourth], double(sums.elements)};
  add_block_sums<kWarps_>(values, scratch, noise_slot(to));
}

// Adds the warp's to to [kNoiseSums] in its own shared memory. Every lane must call.
TEMPER_DEVICE void add_warp_noise_sums(const NoiseSums& sums, double* to) {
#pragma unroll
  for (uint32_t s = 0; s < kNoiseSums; ++s) {
    const double total = warp_total(s == kNoisyElements ? double(sums.elements) : sums.sum[s]);
    if (threadIdx.x % kWarpSize == s) to[s] += total;
  }
}

// What all columns of a matrix share.
struct ColumnsCall {
  uint64_t seed;
  uint32_t stream, law;
  float scale;
  const float* bias;  // [cols], or null
  bool accumulates;   // out += law(y), f32 alone and without bias
  bool is_measured;
};

// y becomes the output. first: this thread's first column, 64 block + 2q. kIsWhole: the block lies below `cols`, and out and
// bias are aligned to 8 bytes.
template <bool kIsWhole, typename Out>
TEMPER_DEVICE void finish_columns(const ColumnsCall& call, uint64_t key, Out* row, uint32_t first, uint32_t cols,
                                  bool active, float y[16], NoiseSums& sums) {
  float out[16];
  if (call.law == kNoError) {
#pragma unroll
    for (uint32_t j = 0; j < 16; ++j) out[j] = y[j];
  } else {
    normals_of_call(call.seed, call.stream, key, first / 64 * 4 + first % 8 / 2, out);
    apply_error_law(call.law, call.scale, y, out);
  }
  if (call.bias == nullptr) {
    if (call.is_measured && active) add_to_sums<kIsWhole>(row, first, cols, y, y, out, sums);
  } else {
    float exact[16];
    load_columns<kIsWhole>(call.bias, first, cols, exact);
#pragma unroll
    for (uint32_t j = 0; j < 16; ++j) {
      out[j] += exact[j];
      exact[j] += y[j];
    }
    if (call.is_measured && active) add_to_sums<kIsWhole>(row, first, cols, y, exact, out, sums);
  }
  if constexpr (sizeof(Out) == 4) {
    if (call.accumulates && active) {
      load_columns<kIsWhole>(row, first, cols, y);
#pragma unroll
      for (uint32_t j = 0; j < 16; ++j) out[j] = y[j] + out[j];
    }
  }
  store_columns<kIsWhole>(row, first, cols, active, out);
}
