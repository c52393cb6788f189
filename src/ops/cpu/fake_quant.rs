//! Fake quantization on the CPU, bitwise equal to `numerics::block_format::fake_quant_scaled`: x [rows, cols] -> y.
//!
//! Codes are not stored: |x| * E is rounded on the E2M1 grid by adding and subtracting 1.5 * 2^23 steps, the step
//! (.5, 1 or 2) chosen by magnitude, which rounds ties to even multiples of the step as the codes do. Rows
//! run in parallel; fake_quant_portable.rs and fake_quant_avx2.rs hold the work on a row.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use super::fake_quant_avx2;
use super::fake_quant_portable::{self, padded, read};
use super::normals::Path;
use crate::numerics::block_format::{TensorScale, tensor_encode_scale};
use crate::numerics::format::{Family, Format, MxScaleRule, Rounding};
use half::bf16;
use rayon::prelude::*;

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
/// Where `x.len() != rows * cols`, and where the format has no vector path.
pub fn fake_quant_f32(x: &[f32], rows: usize, cols: usize, format: Format) -> (Vec<f32>, FakeQuantStats) {
    let mut out = vec![0.0; x.len()];
    let stats = fake_quant_f32_into(x, rows, cols, format, TensorScale::Tensor, &mut out);
    (out, stats)
}

/// `fake_quant_f32` of bf16 values; y is rounded to bf16.
///
/// # Panics
/// Where `x.len() != rows * cols`, and where the format has no vector path.
pub fn fake_quant_bf16(x: &[bf16], rows: usize, cols: usize, format: Format) -> (Vec<bf16>, FakeQuantStats) {
    let mut out = vec![bf16::ZERO; x.len()];
    let stats = fake_quant_bf16_into(x, rows, cols, format, TensorScale::Tensor, &mut out);
    (out, stats)
}

/// Fills `out` [rows, cols].
///
/// # Panics
/// Where lengths disagree, and where the format has no vector path.
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

/// `fake_quant_f32_into` by a chosen implementation; `Path::Avx2` falls back where the CPU lacks it.
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
/// Where lengths disagree, and where the format has no vector path.
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

/// The formats with vector code of their own; fake_quant_general.rs has the choice.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Fast {
    Mxfp4 { rule: MxScaleRule },
    Nvfp4,
    Nvfp4SingleLevel,
}

impl Fast {
    pub(super) fn of(format: Format) -> Option<Fast> {
        match (format.family, format.rounding, format.two_d) {
            (Family::Mxfp4 { rule }, Rounding::NearestEven, false) => Some(Fast::Mxfp4 { rule }),
            (Family::Nvfp4 { four_over_six: false }, Rounding::NearestEven, false) => Some(Fast::Nvfp4),
            (Family::Nvfp4SingleLevel, ..) => Some(Fast::Nvfp4SingleLevel),
            _ => None,
        }
    }
}

/// A storage dtype: read exactly into f32, rounded to nearest even on the way back.
pub(super) trait Element: Copy + Send + Sync {
    /// bf16 if true, f32 if false; fake_quant_avx2.rs loads and stores by it.
    const IS_BF16: bool;
    const ZERO: Self;
    const NAN: Self;
    fn read(self) -> f32;
    fn round(value: f32) -> Self;
}

impl Element for f32 {
    const IS_BF16: bool = false;
    const ZERO: f32 = 0.0;
    const NAN: f32 = f32::NAN;
    #[inline(always)]
    fn read(self) -> f32 {
        self
    }
    #[inline(always)]
    fn round(value: f32) -> f32 {
        value
    }
}

impl Element for bf16 {
    const IS_BF16: bool = true;
    const ZERO: bf16 = bf16::ZERO;
    const NAN: bf16 = bf16::NAN;
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
}

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
    let Some(format) = Fast::of(format) else { panic!("{format} has no vector path") };
    let mut stats = FakeQuantStats { nonfinite_blocks: 0, saturated: 0, tensor_encode_scale: 1.0 };
    if x.is_empty() {
        return stats;
    }
    let chunk = (CHUNK_ELEMENTS / cols).max(1) * cols;
    let parallel = x.len() >= PARALLEL_ELEMENTS;
    if format == Fast::Nvfp4 && scale != TensorScale::Row {
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

/// Bits of the largest magnitude over nvfp4 blocks without NaN or infinity.
pub(super) fn finite_amax_bits<T: Element>(path: Path, x: &[T], cols: usize) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if path == Path::Avx2 && std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has AVX2, as just detected.
        let bits = unsafe { fake_quant_avx2::amax_bits(x) };
        if bits < INFINITY_BITS {
            return bits;
        }
    }
    // Block by block, to leave out those with NaN or infinity.
    let mut largest = 0;
    for block in x.chunks_exact(cols).flat_map(|row| row.chunks(16)) {
        let bits = fake_quant_portable::amax_bits(&read(&padded::<T, 16>(block)));
        largest = largest.max(if bits < INFINITY_BITS { bits } else { 0 });
    }
    largest
}

/// Whole rows. `encode_scale` None: nvfp4 with a G of every row's own.
fn quantize_rows<T: Element>(
    path: Path,
    x: &[T],
    cols: usize,
    format: Fast,
    encode_scale: Option<f32>,
    out: &mut [T],
) -> Counts {
    #[cfg(target_arch = "x86_64")]
    if path == Path::Avx2 && std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has AVX2, as just detected.
        unsafe {
            match format {
                Fast::Mxfp4 { rule } => return fake_quant_avx2::mxfp4_rows(x, cols, rule, out),
                Fast::Nvfp4 => return fake_quant_avx2::nvfp4_rows(x, cols, encode_scale, out),
                Fast::Nvfp4SingleLevel => return single_level_avx2(x, cols, out),
            }
        }
    }
    let _ = path;
    fake_quant_portable::quantize_rows(x, cols, format, encode_scale, out)
}

/// The portable code, compiled with AVX2: this variant is not worth intrinsics.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn single_level_avx2<T: Element>(x: &[T], cols: usize, out: &mut [T]) -> Counts {
    fake_quant_portable::quantize_rows(x, cols, Fast::Nvfp4SingleLevel, None, out)
}
