//! Fake quantization on the CPU, bitwise equal to `numerics::block_format::fake_quant_scaled`: x [rows, cols] -> y.
//!
//! Codes are not stored. Rows run in parallel; mxfp4.rs (integers, one source for every instruction set), nvfp4_avx512.rs,
//! nvfp4_avx2.rs and fake_quant_portable.rs hold the work on rows.
#![allow(unsafe_code)]

use super::fake_quant_portable::{self, padded, read};
use super::mxfp4::mxfp4_rows;
use super::path::{Path, for_each_path};
#[cfg(target_arch = "x86_64")]
use super::{nvfp4_avx2, nvfp4_avx512};
use crate::numerics::block_format::{TensorScale, tensor_encode_scale};
use crate::numerics::format::Format;
use half::bf16;
use rayon::prelude::*;
use std::ops::{BitAnd, BitOr};

/// Below this many elements one thread is faster than waking others.
const PARALLEL_ELEMENTS: usize = 64 * 1024;
/// Elements of a chunk of rows (at least one row).
const CHUNK_ELEMENTS: usize = 32 * 1024;
pub(super) const INFINITY_BITS: u32 = 0x7F80_0000;

/// What quantization met on its way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FakeQuantStats {
    /// Blocks that held NaN or infinity and became NaN.
    pub nonfinite_blocks: usize,
    /// Elements whose scaled magnitude exceeded 6 before clamping.
    pub saturated: usize,
    /// nvfp4's G; 1 where the format has none, and with `TensorScale::Row`.
    pub tensor_encode_scale: f32,
}

/// y and what was met, for x [rows, cols] with one tensor amax.
///
/// # Panics
/// Where `x.len() != rows * cols`.
pub fn fake_quant_f32(x: &[f32], rows: usize, cols: usize, format: Format) -> (Vec<f32>, FakeQuantStats) {
    let mut out = vec![0.0; x.len()];
    let stats = fake_quant_f32_into(x, rows, cols, format, TensorScale::Tensor, &mut out);
    (out, stats)
}

/// `fake_quant_f32` of bf16 values; y is rounded to bf16.
///
/// # Panics
/// Where `x.len() != rows * cols`.
pub fn fake_quant_bf16(x: &[bf16], rows: usize, cols: usize, format: Format) -> (Vec<bf16>, FakeQuantStats) {
    let mut out = vec![bf16::ZERO; x.len()];
    let stats = fake_quant_bf16_into(x, rows, cols, format, TensorScale::Tensor, &mut out);
    (out, stats)
}

/// Fills `out` [rows, cols].
///
/// # Panics
/// Where lengths disagree.
pub fn fake_quant_f32_into(
    x: &[f32],
    rows: usize,
    cols: usize,
    format: Format,
    scale: TensorScale,
    out: &mut [f32],
) -> FakeQuantStats {
    fake_quant(Path::best(), x, rows, cols, format, scale, out)
}

/// `fake_quant_f32_into` by a chosen implementation, or the fastest below it that the CPU has.
pub fn fake_quant_f32_by(
    path: Path,
    x: &[f32],
    rows: usize,
    cols: usize,
    format: Format,
    scale: TensorScale,
    out: &mut [f32],
) -> FakeQuantStats {
    fake_quant(path, x, rows, cols, format, scale, out)
}

/// Fills `out` [rows, cols].
///
/// # Panics
/// Where lengths disagree.
pub fn fake_quant_bf16_into(
    x: &[bf16],
    rows: usize,
    cols: usize,
    format: Format,
    scale: TensorScale,
    out: &mut [bf16],
) -> FakeQuantStats {
    fake_quant(Path::best(), x, rows, cols, format, scale, out)
}

/// `fake_quant_bf16_into` by a chosen implementation, or the fastest below it that the CPU has.
pub fn fake_quant_bf16_by(
    path: Path,
    x: &[bf16],
    rows: usize,
    cols: usize,
    format: Format,
    scale: TensorScale,
    out: &mut [bf16],
) -> FakeQuantStats {
    fake_quant(path, x, rows, cols, format, scale, out)
}

/// Elements of whole rows that one thread takes at a time.
pub fn chunk_elements(cols: usize) -> usize {
    (CHUNK_ELEMENTS / cols).max(1) * cols
}

/// A storage dtype: read exactly into f32, rounded to nearest even on the way back. Also as bits: sign, 8 bits of
/// exponent, mantissa.
pub(super) trait Element: Copy + Send + Sync {
    /// bf16 if true, f32 if false; the vector code loads and stores by it.
    const IS_BF16: bool;
    const ZERO: Self;
    const NAN: Self;
    /// An unsigned integer of its size.
    type Word: Word;
    const MANTISSA_BITS: u32;
    /// All bits but the sign.
    const MAGNITUDE_BITS: u32 = (1 << (8 + Self::MANTISSA_BITS)) - 1;
    const INFINITY: u32 = 0xFF << Self::MANTISSA_BITS;
    fn read(self) -> f32;
    fn round(value: f32) -> Self;
    fn word(self) -> Self::Word;
    fn of_word(word: Self::Word) -> Self;
}

impl Element for f32 {
    const IS_BF16: bool = false;
    const ZERO: f32 = 0.0;
    const NAN: f32 = f32::NAN;
    type Word = u32;
    const MANTISSA_BITS: u32 = 23;
    #[inline(always)]
    fn read(self) -> f32 {
        self
    }
    #[inline(always)]
    fn round(value: f32) -> f32 {
        value
    }
    #[inline(always)]
    fn word(self) -> u32 {
        self.to_bits()
    }
    #[inline(always)]
    fn of_word(word: u32) -> f32 {
        f32::from_bits(word)
    }
}

impl Element for bf16 {
    const IS_BF16: bool = true;
    const ZERO: bf16 = bf16::ZERO;
    const NAN: bf16 = bf16::NAN;
    type Word = u16;
    const MANTISSA_BITS: u32 = 7;
    #[inline(always)]
    fn read(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
    /// Finite values alone come here; NaN blocks are written as such.
    #[inline(always)]
    fn round(value: f32) -> bf16 {
        let bits = value.to_bits();
        bf16::from_bits((bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16) as u16)
    }
    #[inline(always)]
    fn word(self) -> u16 {
        self.to_bits()
    }
    #[inline(always)]
    fn of_word(word: u16) -> bf16 {
        bf16::from_bits(word)
    }
}

/// Arithmetic on bit patterns; sums and differences wrap.
pub(super) trait Word: Copy + Ord + BitAnd<Output = Self> + BitOr<Output = Self> {
    const ZERO: Self;
    /// The low bits.
    fn of(value: u32) -> Self;
    fn plus(self, other: Self) -> Self;
    fn minus(self, other: Self) -> Self;
    fn shifted_right(self, bits: u32) -> Self;
    fn to_usize(self) -> usize;
}

macro_rules! word {
    ($t:ty) => {
        impl Word for $t {
            const ZERO: $t = 0;
            #[inline(always)]
            fn of(value: u32) -> $t {
                value as $t
            }
            #[inline(always)]
            fn plus(self, other: $t) -> $t {
                self.wrapping_add(other)
            }
            #[inline(always)]
            fn minus(self, other: $t) -> $t {
                self.wrapping_sub(other)
            }
            #[inline(always)]
            fn shifted_right(self, bits: u32) -> $t {
                self.wrapping_shr(bits)
            }
            #[inline(always)]
            fn to_usize(self) -> usize {
                self as usize
            }
        }
    };
}
word!(u16);
word!(u32);

fn fake_quant<T: Element>(
    path: Path,
    x: &[T],
    rows: usize,
    cols: usize,
    format: Format,
    scale: TensorScale,
    out: &mut [T],
) -> FakeQuantStats {
    assert_eq!(x.len(), rows * cols, "x holds [rows, cols]");
    assert_eq!(out.len(), x.len(), "out holds [rows, cols]");
    let mut stats = FakeQuantStats { nonfinite_blocks: 0, saturated: 0, tensor_encode_scale: 1.0 };
    if x.is_empty() {
        return stats;
    }
    let chunk = chunk_elements(cols);
    let parallel = x.len() >= PARALLEL_ELEMENTS;
    if format == Format::Nvfp4 && scale != TensorScale::Row {
        let amax_bits = match scale {
            TensorScale::Amax(amax) => amax.to_bits(),
            _ if parallel => x.par_chunks(chunk).map(|x| finite_amax_bits(path, x, cols)).max().unwrap_or(0),
            _ => finite_amax_bits(path, x, cols),
        };
        stats.tensor_encode_scale = tensor_encode_scale(f32::from_bits(amax_bits));
    }
    let encode_scale = (scale != TensorScale::Row).then_some(stats.tensor_encode_scale);
    let work = |(x, out): (&[T], &mut [T])| quantize_rows(path, x, cols, format, encode_scale, out);
    let counts = if parallel {
        x.par_chunks(chunk).zip(out.par_chunks_mut(chunk)).map(work).reduce(Counts::default, Counts::plus)
    } else {
        x.chunks(chunk).zip(out.chunks_mut(chunk)).map(work).fold(Counts::default(), Counts::plus)
    };
    stats.nonfinite_blocks = counts.nonfinite_blocks;
    stats.saturated = counts.saturated;
    stats
}

#[derive(Clone, Copy, Default)]
pub(super) struct Counts {
    pub nonfinite_blocks: usize,
    pub saturated: usize,
}

impl Counts {
    fn plus(self, other: Counts) -> Counts {
        Counts {
            nonfinite_blocks: self.nonfinite_blocks + other.nonfinite_blocks,
            saturated: self.saturated + other.saturated,
        }
    }
}

/// Bits (as f32) of the largest magnitude over nvfp4 blocks without NaN or infinity.
pub(super) fn finite_amax_bits<T: Element>(path: Path, x: &[T], cols: usize) -> u32 {
    let bits = amax_bits(path, x);
    if bits < INFINITY_BITS {
        return bits;
    }
    // Block by block, to leave out those with NaN or infinity.
    let mut largest = 0;
    for block in x.chunks_exact(cols).flat_map(|row| row.chunks(16)) {
        let bits = fake_quant_portable::amax_bits(&read(&padded::<T, 16>(block)));
        largest = largest.max(if bits < INFINITY_BITS { bits } else { 0 });
    }
    largest
}

for_each_path! {
    /// Bits (as f32) of the largest magnitude of all, NaN and infinity included.
    fn amax_bits<T: Element>(x: &[T]) -> u32 {
        let mut largest = T::Word::ZERO;
        for value in x {
            largest = largest.max(value.word() & T::Word::of(T::MAGNITUDE_BITS));
        }
        T::of_word(largest).read().to_bits()
    }
}

/// Whole rows. `encode_scale` None: nvfp4 with a G of every row's own.
fn quantize_rows<T: Element>(
    path: Path,
    x: &[T],
    cols: usize,
    format: Format,
    encode_scale: Option<f32>,
    out: &mut [T],
) -> Counts {
    match format {
        Format::Mxfp4 { rule } => mxfp4_rows(path, x, cols, rule, out),
        Format::Nvfp4SingleLevel => single_level_rows(path, x, cols, out),
        Format::Nvfp4 => {
            let mut counts = Counts::default();
            for (x, out) in x.chunks_exact(cols).zip(out.chunks_exact_mut(cols)) {
                let row_amax = || f32::from_bits(finite_amax_bits(path, x, cols));
                let g = encode_scale.unwrap_or_else(|| tensor_encode_scale(row_amax()));
                nvfp4_row(path, x, g, out, &mut counts);
            }
            counts
        }
    }
}

fn nvfp4_row<T: Element>(path: Path, x: &[T], g: f32, out: &mut [T], counts: &mut Counts) {
    #[cfg(target_arch = "x86_64")]
    match path.or_below() {
        Path::Portable => {}
        // SAFETY: or_below gives a path only where the CPU has its instructions.
        Path::Avx2 => return unsafe { nvfp4_avx2::row(x, g, out, counts) },
        // SAFETY: as above.
        Path::Avx512 => return unsafe { nvfp4_avx512::row(x, g, out, counts) },
    }
    let _ = path;
    fake_quant_portable::nvfp4_row(x, g, out, counts);
}

for_each_path! {
    fn single_level_rows<T: Element>(x: &[T], cols: usize, out: &mut [T]) -> Counts {
        let mut counts = Counts::default();
        for (x, out) in x.chunks_exact(cols).zip(out.chunks_exact_mut(cols)) {
            fake_quant_portable::single_level_row(x, out, &mut counts);
        }
        counts
    }
}
