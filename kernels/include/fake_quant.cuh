// Fake quantization y = value(code) * decode of a batch of matrices, bit for bit src/numerics/block_format.rs: one body
// yields y, codes and scales, or any of them, so that what training sees is what is exported.
//
//   b = amax of a block, A = amax of the tensor or row over its finite blocks     scaled = x * encode or x / decode
//   code = round(scaled), saturating     y = value(code) * decode, rounded to the dtype of x
//
// A thread takes eight consecutive elements of a row (an octet) at a time; the lanes of a block find its amax by
// shuffles. Amaxes travel as the bits of a magnitude: ordered as integers, NaN and infinity above every finite value.
// A block that holds such a value becomes NaN and is counted.
#pragma once

#include "block_scale.cuh"
#include "error_sums.cuh"
#include "octets.cuh"
#include "philox.cuh"

// u of the eight elements from `column` (a multiple of 8) on, in [0, 1): kinds U16 and U8 of numerics.md section 4a.
TEMPER_DEVICE void uniforms_of_octet(uint32_t rounding, uint64_t seed, uint32_t stream, uint64_t key, uint32_t column,
                                     float u[8]) {
  const bool wide = rounding == kStochastic16;
  const uint32_t call = wide ? (column >> 3 | 2u << 29) : (column >> 4 | 1u << 29);
  const Words4 counter{{call, stream, uint32_t(key), uint32_t(key >> 32)}};
  const Words4 words = philox4x32_7(uint32_t(seed), uint32_t(seed >> 32), counter);
  if (wide) {
#pragma unroll
    for (int i = 0; i < 8; ++i) u[i] = float(words.x[i / 2] >> (16 * (i % 2)) & 0xffff) * (1.0f / 65536.0f);
  } else {
    const bool upper = column & 8;
    const uint32_t half[2] = {upper ? words.x[2] : words.x[0], upper ? words.x[3] : words.x[1]};
#pragma unroll
    for (int i = 0; i < 8; ++i) u[i] = float(half[i / 4] >> (8 * (i % 4)) & 0xff) * (1.0f / 256.0f);
  }
}

template <class Format>
TEMPER_DEVICE float scaled_by(const BlockScale& scale, float x) {
  return Format::kDivides ? x / scale.decode : x * scale.encode;
}

// The squared error of a block of 16 under a scale, to nearest; two lanes have an octet each. Differences in f32, squares
// in f64, summed in halves (i with i + 8, then 4, 2, 1), as the definition does; both lanes get the sum.
template <class Format>
TEMPER_DEVICE double squared_error(const float x[8], const BlockScale& scale) {
  double square[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float a = fminf(magnitude(scaled_by<Format>(scale, x[i])), Format::Grid::kMax);
    const double error = with_sign_of(round_nearest_even<typename Format::Grid>(a), x[i]) * scale.decode - x[i];
    square[i] = error * error;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) square[i] += __shfl_xor_sync(kFullWarp, square[i], 1);
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) square[i] += square[i + half];
  }
  return square[0];
}

// What a thread carries from octet to octet of one tensor. kBlockRows: rows that share a block scale; kIsWhole: the tensor's
// flag kWhole.
template <typename T, class Format, bool kErrors, uint32_t kBlockRows, bool kIsWhole>
struct Quantizer {
  using Grid = typename Format::Grid;
  const FakeQuantBatch& batch;
  const FakeQuantTensor& t;
  uint32_t nonfinite;
  ErrorSums errors;

  __device__ Quantizer(const FakeQuantBatch& batch_, uint32_t tensor)
      : batch(batch_), t(batch_.tensors[tensor]), nonfinite(0), errors{} {}

  __device__ TensorScale tensor_scale(const Place& place) const {
    if (t.amax == nullptr) return TensorScale{1.0f, 1.0f};
    const bool per_row = t.flags & kAmaxPerRow && place.inside;
    return Format::tensor(batch.rounding, t.amax[per_row ? t.row(place.at) : 0]);
  }

  // Quantizes an octet of a block of amax b (bits), and writes what is asked for. All lanes of a warp must call.
  __device__ void quantize(const Octet<T>& x, const Place& place, uint32_t b, const TensorScale& tensor) {
    const bool is_nonfinite = b >= kInfinityBits;
    const float amax = is_nonfinite ? 0.0f : float_of(b);
    BlockScale scale = Format::scale(batch.rule, amax, tensor);
    if constexpr (Format::kTwoCandidates) {
      float wide[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) wide[i] = is_nonfinite ? 0.0f : element(x, i);
      const BlockScale other = Format::other_scale(amax, tensor);
      if (squared_error<Format>(wide, other) < squared_error<Format>(wide, scale)) scale = other;
    }
    if (!place.inside) return;  // nothing below concerns other lanes
    if (is_nonfinite) scale.decode = not_a_number();
    float value[8], y[8];  // magnitudes of the grid; signed
    uint32_t saturated = 0;
    round_octet(x, place, scale, value, saturated);
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] = with_sign_of(value[i] * scale.decode, element(x, i));
    const Octet<T> out = narrowed_octet(static_cast<const T*>(nullptr), y);
    if (t.y != nullptr) store_at<T, kIsWhole>(t, static_cast<T*>(t.y), place, out);
    if (t.codes != nullptr) store_codes(x, place, is_nonfinite, value);
    if (is_nonfinite || t.scales != nullptr) finish_block(place, is_nonfinite, scale);
    if constexpr (kErrors) {
      const uint32_t columns = kIsWhole ? 8 : t.cols - t.column(place.at, t.row(place.at));
#pragma unroll
      for (uint32_t i = 0; i < 8; ++i) {
        if (i < columns) errors.add(element(x, i), element(out, i), !is_nonfinite && saturated >> i & 1);
      }
    }
  }

  // Every thread of the block must call; scratch [kErrorScratch] is shared memory, used for error sums alone.
  __device__ void finish(double* scratch) {
    const uint32_t tensor = uint32_t(&t - batch.tensors);
    if (__any_sync(kFullWarp, nonfinite != 0)) {
      const uint32_t total = warp_sum(nonfinite);
      if (threadIdx.x % kWarpSize == 0) atomicAdd(&batch.nonfinite_blocks[tensor], (unsigned long long)total);
    }
    if constexpr (kErrors) errors.finish(scratch, batch.sums + tensor * kErrorSums);
  }

 private:
  // Magnitudes to the grid; bit i of `saturated`: element i was scaled beyond it.
  __device__ void round_octet(const Octet<T>& x, const Place& place, const BlockScale& scale, float value[8],
                              uint32_t& saturated) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float a = magnitude(scaled_by<Format>(scale, element(x, i)));
      if (kErrors) saturated |= uint32_t(a > Grid::kMax) << i;
      value[i] = fminf(a, Grid::kMax);
    }
    if (batch.rounding == kNearestEven) {
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i] = round_nearest_even<Grid>(value[i]);
    } else if (is_stochastic(batch.rounding)) {
      const uint32_t row = t.row(place.at);
      const uint64_t* keys = static_cast<const uint64_t*>(t.of_rows);
      const uint64_t key = keys == nullptr ? t.first_key + row : keys[row];
      float u[8];
      uniforms_of_octet(batch.rounding, batch.seed, t.stream, key, t.column(place.at, row), u);
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i] = round_stochastic<Grid>(value[i], u[i]);
    } else if (batch.rounding == kHalfAway) {
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i] = round_half_away<Grid>(value[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i] = round_half_toward_zero<Grid>(value[i]);
    }
  }

  // A nibble (E2M1) or a byte (E4M3) each; that of NaN is the largest magnitude.
  __device__ void store_codes(const Octet<T>& x, const Place& place, bool is_nonfinite, const float value[8]) const {
    constexpr bool kNibbles = Grid::kMantissaBits == 1;
    constexpr uint32_t kBytes = kNibbles ? 4 : 8;  // of an octet
    const uint32_t row = kIsWhole ? 0 : t.row(place.at), column = kIsWhole ? 0 : t.column(place.at, row);
    Words2 packed = {{0, 0}};
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
      if (!kIsWhole && column + i >= t.cols) continue;
      const uint32_t sign = bits_of(element(x, i)) >> 31;
      if constexpr (kNibbles) {
        packed.w[0] |= (is_nonfinite ? 7 : sign << 3 | e2m1_index(value[i])) << (4 * i);
      } else {
        packed.w[i / 4] |= (is_nonfinite ? kE4m3Nan : sign << 7 | e4m3_index(value[i])) << (8 * (i % 4));
      }
    }
    if constexpr (kIsWhole) {
      uint8_t* to = t.codes + uint64_t(place.at) * kBytes;
      if constexpr (kNibbles) {
        *reinterpret_cast<uint32_t*>(to) = packed.w[0];
      } else {
        *reinterpret_cast<Words2*>(to) = packed;
      }
      return;
    }
    const uint32_t row_bytes = kNibbles ? (t.cols + 1) / 2 : t.cols, first = kNibbles ? column / 2 : column;
    uint8_t* to = t.codes + uint64_t(row) * row_bytes + first;
#pragma unroll
    for (uint32_t b = 0; b < kBytes; ++b) {
      if (first + b < row_bytes) to[b] = uint8_t(packed.w[b / 4] >> (8 * (b % 4)));
    }
  }

  // By the lane of the block's first octet: its scale, and whether it is finite.
  __device__ void finish_block(const Place& place, bool is_nonfinite, const BlockScale& scale) {
    if constexpr (Format::kBlock == 0) {
      const uint32_t row = t.row(place.at);
      if (t.column(place.at, row) != 0) return;
      nonfinite += is_nonfinite;
      if (t.scales == nullptr) return;
      static_cast<float*>(t.scales)[row] = scale.decode;
    } else {
      constexpr uint32_t kOctets = Format::kBlock / 8;
      if (place.at % kOctets != 0) return;
      if (is_nonfinite) nonfinite += t.row(place.at) % kBlockRows == 0;
      if (t.scales == nullptr) return;
      static_cast<uint8_t*>(t.scales)[place.at / kOctets] =
          uint8_t(is_nonfinite ? Format::kNonfiniteByte : scale.byte);
    }
  }
};

// A block of threads takes a tile of octets_of_thread * kBlockThreads octets. Enough blocks live on a multiprocessor that one's
// loads hide behind others' arithmetic.
template <typename T, class Format, bool kErrors, bool kIsWhole>
TEMPER_DEVICE void fake_quant_tile(const FakeQuantBatch& batch, uint32_t tensor, double* scratch) {
  Quantizer<T, Format, kErrors, 1, kIsWhole> quantizer(batch, tensor);
  const FakeQuantTensor& t = quantizer.t;
  uint32_t at = (block_from_the_end() - t.first_tile) * batch.octets_of_thread * kBlockThreads + threadIdx.x;
  Place place = place_of<kIsWhole>(t, at);
  Octet<T> x = load_at<T, kIsWhole>(t, place);
  TensorScale scale = quantizer.tensor_scale(Place{0, false});
#pragma unroll 1
  for (uint32_t left = batch.octets_of_thread;;) {
    uint32_t b;
    if constexpr (Format::kBlock == 0) {
      // Row and tensor amaxes are there; a row with NaN or infinity shows it in its own.
      const float of_row = place.inside ? static_cast<const float*>(t.of_rows)[t.row(place.at)] : 0.0f;
      b = bits_of(t.amax != nullptr && bits_of(of_row) < kInfinityBits ? t.amax[0] : of_row);
    } else {
      b = group_max(octet_amax(x), 1, Format::kBlock / 8);
      if (t.flags & kAmaxPerRow) scale = quantizer.tensor_scale(place);
    }
    quantizer.quantize(x, place, b, scale);
    if (--left == 0) break;
    at += kBlockThreads;
    place = place_of<kIsWhole>(t, at);
    x = load_at<T, kIsWhole>(t, place);
  }
  quantizer.finish(scratch);
}

template <typename T, class Format, bool kErrors>
TEMPER_DEVICE void fake_quant_rows(const FakeQuantBatch& batch, double* scratch) {
  const uint32_t tensor = tensor_of_tile(batch.tensors, batch.count, block_from_the_end());
  if (batch.tensors[tensor].flags & kWhole) {
    fake_quant_tile<T, Format, kErrors, true>(batch, tensor, scratch);
  } else {
    fake_quant_tile<T, Format, kErrors, false>(batch, tensor, scratch);
  }
}

template <typename T, class Format, bool kErrors, bool kIsWhole>
TEMPER_DEVICE void fake_quant_square(const FakeQuantBatch& batch, uint32_t tensor, uint32_t* amaxes, double* scratch) {
  using Tiles = SquareTiles<Format::kBlock>;
  Quantizer<T, Format, kErrors, Format::kBlock, kIsWhole> quantizer(batch, tensor);
  const Place place = Tiles::place(quantizer.t, block_from_the_end());
  const Octet<T> x = load_at<T, kIsWhole>(quantizer.t, place);
  const uint32_t b = Tiles::amax(octet_amax(x), amaxes);
  quantizer.quantize(x, place, b, quantizer.tensor_scale(place));
  quantizer.finish(scratch);
}

template <typename T, class Format, bool kErrors>
TEMPER_DEVICE void fake_quant_squares(const FakeQuantBatch& batch, uint32_t* amaxes, double* scratch) {
  const uint32_t tensor = tensor_of_tile(batch.tensors, batch.count, block_from_the_end());
  if (batch.tensors[tensor].flags & kWhole) {
    fake_quant_square<T, Format, kErrors, true>(batch, tensor, amaxes, scratch);
  } else {
    fake_quant_square<T, Format, kErrors, false>(batch, tensor, amaxes, scratch);
  }
}

#define TEMPER_FAKE_QUANT_ROWS(name, Format, T)            \
  TEMPER_KERNEL(name, FakeQuantBatch, Format::kResident) {  \
    fake_quant_rows<T, Format, false>(args, nullptr);       \
  }                                                         \
  TEMPER_KERNEL(name##_errors, FakeQuantBatch, 2) {         \
    __shared__ double scratch[kErrorScratch];               \
    fake_quant_rows<T, Format, true>(args, scratch);        \
  }

#define TEMPER_FAKE_QUANT_TILES(name, Format, T)                      \
  TEMPER_KERNEL(name, FakeQuantBatch, Format::kResident) {            \
    __shared__ uint32_t amaxes[SquareTiles<Format::kBlock>::kScratch]; \
    fake_quant_squares<T, Format, false>(args, amaxes, nullptr);         \
  }                                                                    \
  TEMPER_KERNEL(name##_errors, FakeQuantBatch, 2) {                    \
    __shared__ uint32_t amaxes[SquareTiles<Format::kBlock>::kScratch]; \
    __shared__ double scratch[kErrorScratch];                          \
    fake_quant_squares<T, Format, true>(args, amaxes, scratch);          \
  }
