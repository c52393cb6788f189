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
#include "dtype.cuh"
#include "philox.cuh"
#include "reduce.cuh"

// The layout of these structs is the wire between src/ops/cuda/fake_quant.rs and the kernels.
struct FakeQuantTensor {
  const void* x;         // [rows, cols]
  void* y;               // [rows, cols] in the dtype of x, or null
  uint8_t* codes;        // [rows, ceil(cols / 2)] low nibble first; fp8, mxfp8: [rows, cols]; or null
  void* scales;          // [rows, blocks of a row] u8; fp8: [rows] f32; or null
  float* amax;           // nvfp4: [1], or [rows] with kAmaxPerRow; fp8:tensor: [1]; null where the format needs none
  void* of_rows;         // stochastic rounding: [rows] u64 keys, or null; fp8: [rows] f32, each row's amax
  uint64_t first_key;    // the key of row r is first_key + r where of_rows is null
  uint32_t rows, cols;
  uint32_t first_tile;   // of the tensor, among the blocks of the grid
  uint32_t stream;       // of stochastic rounding
  Divider by_row;        // divides by the octets of a row
  uint32_t flags, unused;
};

enum FakeQuantFlags : uint32_t {
  kWhole = 1,        // every row of every matrix is aligned to 16 bytes and ends with an octet
  kAmaxPerRow = 2,
};

struct FakeQuantBatch {
  uint32_t count, rule, rounding, unused;
  uint64_t seed;
  unsigned long long* nonfinite_blocks;  // [count], added to
  double* sums;                          // [count, kErrorSums], added to; read by the kernels *_errors alone
  FakeQuantTensor tensors[46];
};
static_assert(sizeof(FakeQuantBatch) <= 4096, "kernel arguments");

// Octets of a tile of the kernels that go by rows: each thread takes four.
constexpr uint32_t kTileOctets = 4 * kBlockThreads;

// The sums behind numerics::tensor_error, in f64; elements where x or y is not finite enter kNonfinite alone.
enum ErrorSum {
  kSquareX, kSquareY, kProduct, kSquareError, kRelative, kElements, kNonzero, kDeadzone, kSaturated, kNonfinite,
  kMaxError,  // a maximum, kept as the bits of a double
  kErrorSums
};

struct ErrorSums {
  double square_x, square_y, product, square_error, relative, max_error;
  uint32_t elements, nonzero, deadzone, saturated, nonfinite;

  __device__ void add(float x_, float y_, bool is_saturated) {
    saturated += is_saturated;
    if ((bits_of(x_) & kInfinityBits) == kInfinityBits || (bits_of(y_) & kInfinityBits) == kInfinityBits) {
      ++nonfinite;
      return;
    }
    const double x = x_, y = y_, error = fabs(y - x);
    square_x += x * x;
    square_y += y * y;
    product += x * y;
    square_error += error * error;
    relative += double(float(error) / (fabsf(x_) + 1e-10f));  // a term to the places of an f32
    ++elements;
    nonzero += x_ != 0.0f;
    deadzone += x_ != 0.0f && y_ == 0.0f;
    max_error = error > max_error ? error : max_error;
  }

  // Every thread must call; scratch [kWarps] is shared memory.
  __device__ void finish(double* scratch, double* sums) const {
    add_block(square_x, scratch, &sums[kSquareX]);
    add_block(square_y, scratch, &sums[kSquareY]);
    add_block(product, scratch, &sums[kProduct]);
    add_block(square_error, scratch, &sums[kSquareError]);
    add_block(relative, scratch, &sums[kRelative]);
    add_block(elements, scratch, &sums[kElements]);
    add_block(nonzero, scratch, &sums[kNonzero]);
    add_block(deadzone, scratch, &sums[kDeadzone]);
    add_block(saturated, scratch, &sums[kSaturated]);
    add_block(nonfinite, scratch, &sums[kNonfinite]);
    if (max_error > 0.0) {
      unsigned long long bits;  // of magnitudes: ordered as they are
      memcpy(&bits, &max_error, 8);
      atomicMax(reinterpret_cast<unsigned long long*>(&sums[kMaxError]), bits);
    }
  }
};

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
TEMPER_DEVICE double squared_error(const Octet<float>& x, const BlockScale& scale) {
  double square[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float value = element(x, i);
    const float a = fminf(magnitude(scaled_by<Format>(scale, value)), Format::Grid::kMax);
    const double error = with_sign_of(round_nearest_even<typename Format::Grid>(a), value) * scale.decode - value;
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

// Where an octet lies.
struct Place {
  uint32_t row, column;
  bool inside;
};

// What a thread carries from octet to octet of one tensor. kBlockRows: rows that share a block scale.
template <typename T, class Format, bool kErrors, uint32_t kBlockRows>
struct Quantizer {
  const FakeQuantBatch& batch;
  const FakeQuantTensor& t;
  uint32_t nonfinite;
  ErrorSums errors;

  __device__ Quantizer(const FakeQuantBatch& batch_, uint32_t tensor)
      : batch(batch_), t(batch_.tensors[tensor]), nonfinite(0), errors{} {}

  __device__ Octet<T> load(const Place& place) const {
    if (!place.inside) return zero_octet<T>();
    return load_octet(static_cast<const T*>(t.x) + uint64_t(place.row) * t.cols, place.column, t.cols, t.flags & kWhole);
  }

  // What scale() wants of the tensor: G in nvfp4.
  __device__ float tensor_scale(const Place& place) const {
    if (t.amax == nullptr) return 1.0f;
    const bool per_row = t.flags & kAmaxPerRow;
    return Format::tensor_scale(batch.rounding, t.amax[per_row && place.inside ? place.row : 0]);
  }

  // Quantizes an octet of a block of amax b (bits), and writes what is asked for. All lanes of a warp must call.
  __device__ void quantize(const Octet<T>& x, const Place& place, uint32_t b, float tensor) {
    const bool is_nonfinite = b >= kInfinityBits;
    const float amax = is_nonfinite ? 0.0f : float_of(b);
    // The two-level formats know no rule, the others no rounding.
    constexpr bool kByRounding = Format::kBlock == 16;
    BlockScale scale = Format::scale(kByRounding ? batch.rounding : batch.rule, amax, tensor);
    if constexpr (Format::kTwoCandidates) {
      Octet<float> wide;
#pragma unroll
      for (int i = 0; i < 8; ++i) wide.vector[i / 4].w[i % 4] = bits_of(is_nonfinite ? 0.0f : element(x, i));
      const BlockScale other = Format::other_scale(amax, tensor);
      if (squared_error<Format>(wide, other) < squared_error<Format>(wide, scale)) scale = other;
    }
    if (!place.inside) return;  // nothing below concerns other lanes
    float value[8], y[8];  // magnitudes of the grid; signed
    uint32_t saturated = 0;
    round_octet(x, place, scale, value, saturated);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      y[i] = is_nonfinite ? not_a_number() : with_sign_of(value[i] * scale.decode, element(x, i));
    }
    const Octet<T> out = narrowed_octet(static_cast<const T*>(nullptr), y);
    if (t.y != nullptr) {
      store_octet(static_cast<T*>(t.y) + uint64_t(place.row) * t.cols, place.column, t.cols, t.flags & kWhole, out);
    }
    if (t.codes != nullptr) store_codes(x, place, is_nonfinite, value);
    const uint32_t into_block = Format::kBlock == 0 ? place.column : place.column % (Format::kBlock ? Format::kBlock : 1);
    if (into_block == 0) {
      nonfinite += is_nonfinite && place.row % kBlockRows == 0;
      if (t.scales != nullptr) store_scale(place, is_nonfinite, scale);
    }
    if constexpr (kErrors) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (place.column + i < t.cols) errors.add(element(x, i), element(out, i), !is_nonfinite && saturated >> i & 1);
      }
    }
  }

  // Every thread of the block must call; scratch [kWarps] is shared memory, used for error sums alone.
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
    using Grid = typename Format::Grid;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float a = magnitude(scaled_by<Format>(scale, element(x, i)));
      if (kErrors) saturated |= uint32_t(a > Grid::kMax) << i;
      value[i] = fminf(a, Grid::kMax);
    }
    if (is_stochastic(batch.rounding)) {
      const uint64_t* keys = static_cast<const uint64_t*>(t.of_rows);
      const uint64_t key = keys == nullptr ? t.first_key + place.row : keys[place.row];
      float u[8];
      uniforms_of_octet(batch.rounding, batch.seed, t.stream, key, place.column, u);
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i] = round_stochastic<Grid>(value[i], u[i]);
    } else if (batch.rounding == kNearestEven) {
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i] = round_nearest_even<Grid>(value[i]);
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
    constexpr bool kNibbles = Format::Grid::kMantissaBits == 1;
    constexpr uint32_t kBytes = kNibbles ? 4 : 8;
    Words2 packed = {{0, 0}};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (place.column + i >= t.cols) continue;
      const uint32_t sign = bits_of(element(x, i)) >> 31;
      if constexpr (kNibbles) {
        packed.w[0] |= (is_nonfinite ? 7 : sign << 3 | e2m1_index(value[i])) << (4 * i);
      } else {
        packed.w[i / 4] |= (is_nonfinite ? kE4m3Nan : sign << 7 | e4m3_index(value[i])) << (8 * (i % 4));
      }
    }
    const uint32_t row_bytes = kNibbles ? (t.cols + 1) / 2 : t.cols, first = kNibbles ? place.column / 2 : place.column;
    uint8_t* to = t.codes + uint64_t(place.row) * row_bytes + first;
    if (t.flags & kWhole) {
      if constexpr (kNibbles) {
        *reinterpret_cast<uint32_t*>(to) = packed.w[0];
      } else {
        *reinterpret_cast<Words2*>(to) = packed;
      }
      return;
    }
#pragma unroll
    for (uint32_t b = 0; b < kBytes; ++b) {
      if (first + b < row_bytes) to[b] = uint8_t(packed.w[b / 4] >> (8 * (b % 4)));
    }
  }

  __device__ void store_scale(const Place& place, bool is_nonfinite, const BlockScale& scale) const {
    if constexpr (Format::kBlock == 0) {
      static_cast<float*>(t.scales)[place.row] = is_nonfinite ? not_a_number() : scale.decode;
    } else {
      const uint32_t blocks = (t.cols + Format::kBlock - 1) / Format::kBlock;
      static_cast<uint8_t*>(t.scales)[uint64_t(place.row) * blocks + place.column / Format::kBlock] =
          uint8_t(is_nonfinite ? Format::kNonfiniteByte : scale.byte);
    }
  }
};

// Octet number `at` of a tensor, row by row; rows are filled up to whole blocks, so that a block's lanes share a row.
template <class Format>
TEMPER_DEVICE Place place_of(const FakeQuantTensor& t, uint32_t at) {
  constexpr uint32_t kOctets = Format::kBlock == 0 ? 1 : Format::kBlock / 8;  // of a block
  const uint32_t of_row = (t.cols + 8 * kOctets - 1) / (8 * kOctets) * kOctets;
  const uint32_t row = t.by_row.divide(at), column = (at - row * of_row) * 8;
  return Place{row, column, row < t.rows && column < t.cols};
}

// A block of threads takes a tile of kTileOctets octets. The next octet is on its way while one is worked on.
template <typename T, class Format, bool kErrors>
TEMPER_DEVICE void fake_quant_rows(const FakeQuantBatch& batch, double* scratch) {
  const uint32_t tensor = tensor_of_tile(batch.tensors, batch.count, blockIdx.x);
  Quantizer<T, Format, kErrors, 1> quantizer(batch, tensor);
  const FakeQuantTensor& t = quantizer.t;
  uint32_t at = (blockIdx.x - t.first_tile) * kTileOctets + threadIdx.x;
  Place place = place_of<Format>(t, at);
  Octet<T> next = quantizer.load(place);
  float g = quantizer.tensor_scale(place);
#pragma unroll 1
  for (uint32_t i = 0; i < kTileOctets; i += kBlockThreads) {
    const Octet<T> x = next;
    const Place here = place;
    at += kBlockThreads;
    place = place_of<Format>(t, at);
    if (i + kBlockThreads < kTileOctets) next = quantizer.load(place);
    uint32_t b;
    if constexpr (Format::kBlock == 0) {
      // Row and tensor amaxes are there; a row with NaN or infinity shows it in its own.
      const float of_row = here.inside ? static_cast<const float*>(t.of_rows)[here.row] : 0.0f;
      b = bits_of(t.amax != nullptr && bits_of(of_row) < kInfinityBits ? t.amax[0] : of_row);
    } else {
      b = group_max(octet_amax(x), 1, Format::kBlock / 8);
      if (t.flags & kAmaxPerRow) g = quantizer.tensor_scale(here);
    }
    quantizer.quantize(x, here, b, g);
  }
  quantizer.finish(scratch);
}

// Option 2d: one scale per square tile of kBlock rows and columns. A block of threads takes kBlock rows and
// 8 * (kBlockThreads / kBlock) columns, a thread one octet; a tile's lanes are spread over all warps.
template <class Format>
struct SquareTiles {
  static constexpr uint32_t kAcross = kBlockThreads / Format::kBlock;    // octets of a row
  static constexpr uint32_t kTileLanes = Format::kBlock / 8;            // octets of a tile's row
  static constexpr uint32_t kTiles = kAcross / kTileLanes;              // side by side
  static constexpr uint32_t kScratch = kWarps * kTiles;

  TEMPER_DEVICE Place place(const FakeQuantTensor& t) {
    const uint32_t across = (t.cols + 8 * kAcross - 1) / (8 * kAcross), tile = blockIdx.x - t.first_tile;
    const uint32_t row = tile / across * Format::kBlock + threadIdx.x / kAcross;
    const uint32_t column = (tile % across * kAcross + threadIdx.x % kAcross) * 8;
    return Place{row, column, row < t.rows && column < t.cols};
  }

  // The amax of a thread's tile. scratch [kScratch] is shared memory; every thread must call, once.
  TEMPER_DEVICE uint32_t amax(uint32_t of_octet, uint32_t* scratch) {
    const uint32_t warp = threadIdx.x / kWarpSize, tile = threadIdx.x % kAcross / kTileLanes;
    uint32_t b = group_max(of_octet, 1, kTileLanes);  // of a row of the tile
    b = group_max(b, kAcross, kWarpSize);             // of its rows in this warp
    if (threadIdx.x % kWarpSize < kAcross) scratch[warp * kTiles + tile] = b;
    __syncthreads();
#pragma unroll
    for (uint32_t w = 0; w < kWarps; ++w) b = scratch[w * kTiles + tile] > b ? scratch[w * kTiles + tile] : b;
    return b;
  }
};

template <typename T, class Format, bool kErrors>
TEMPER_DEVICE void fake_quant_tiles(const FakeQuantBatch& batch, uint32_t* amaxes, double* scratch) {
  using Tiles = SquareTiles<Format>;
  const uint32_t tensor = tensor_of_tile(batch.tensors, batch.count, blockIdx.x);
  Quantizer<T, Format, kErrors, Format::kBlock> quantizer(batch, tensor);
  const Place place = Tiles::place(quantizer.t);
  const Octet<T> x = quantizer.load(place);
  quantizer.quantize(x, place, Tiles::amax(octet_amax(x), amaxes), quantizer.tensor_scale(place));
  quantizer.finish(scratch);
}

#define TEMPER_FAKE_QUANT_ROWS(name, Format, T)                                            \
  TEMPER_KERNEL(name, FakeQuantBatch, Format::kResident) {                                  \
    fake_quant_rows<T, Format, false>(args, nullptr);                                       \
  }                                                                                         \
  TEMPER_KERNEL(name##_errors, FakeQuantBatch, 2) {                                         \
    __shared__ double scratch[kWarps];                                                      \
    fake_quant_rows<T, Format, true>(args, scratch);                                        \
  }

#define TEMPER_FAKE_QUANT_TILES(name, Format, T)                                            \
  TEMPER_KERNEL(name, FakeQuantBatch, Format::kResident) {                                  \
    __shared__ uint32_t amaxes[SquareTiles<Format>::kScratch];                              \
    fake_quant_tiles<T, Format, false>(args, amaxes, nullptr);                              \
  }                                                                                         \
  TEMPER_KERNEL(name##_errors, FakeQuantBatch, 2) {                                         \
    __shared__ uint32_t amaxes[SquareTiles<Format>::kScratch];                              \
    __shared__ double scratch[kWarps];                                                      \
    fake_quant_tiles<T, Format, true>(args, amaxes, scratch);                               \
  }
