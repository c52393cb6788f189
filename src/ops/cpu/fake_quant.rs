//! Fake quantization on the CPU, bitwise equal to `numerics::block_format::fake_quant_scaled`: x [rows, cols] -> y.
//!
//! Codes are not stored. Rows run in parallel; mxfp4.rs, nvfp4.rs and fake_quant_portable.rs hold the work on
//! rows.
use super::element::{Element, Word};
use super::mxfp4::mxfp4_rows;
use super::path::{Path, for_each_path};
use super::{fake_quant_portable, nvfp4};
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

/// Elements of whole rows that one thread takes at a time.
pub fn chunk_elements(cols: usize) -> usize {
    (CHUNK_ELEMENTS / cols).max(1) * cols
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
    let chunk = if x.len() < PARALLEL_ELEMENTS { x.len() } else { chunk_elements(cols) };
    let counts = if format == Fast::Nvfp4 && scale == TensorScale::Tensor {
        let blocks = nvfp4::blocks_per_row(cols);
        let (mut amaxes, amax_chunk) = (vec![T::Word::ZERO; rows * blocks], chunk / cols * blocks);
        let find = |(x, amaxes): (&[T], &mut [T::Word])| nvfp4::find_amaxes(path, x, cols, amaxes);
        let amax_bits = x.par_chunks(chunk).zip(amaxes.par_chunks_mut(amax_chunk)).map(find).max().unwrap_or(0);
        let g = tensor_encode_scale(f32::from_bits(amax_bits));
        stats.tensor_encode_scale = g;
        let chunks = x.par_chunks(chunk).zip(amaxes.par_chunks(amax_chunk)).zip(out.par_chunks_mut(chunk));
        let work = chunks.map(|((x, amaxes), out)| nvfp4::rows_of_found(path, x, cols, amaxes, g, out));
        work.reduce(Counts::default, Counts::plus)
    } else {
        let g = match scale {
            TensorScale::Amax(amax) if format == Fast::Nvfp4 => Some(tensor_encode_scale(amax)),
            _ => None,
        };
        stats.tensor_encode_scale = g.unwrap_or(1.0);
        let work = |(x, out): (&[T], &mut [T])| match format {
            Fast::Mxfp4 { rule } => mxfp4_rows(path, x, cols, rule, out),
            Fast::Nvfp4 => nvfp4::rows(path, x, cols, g, out),
            Fast::Nvfp4SingleLevel => single_level_rows(path, x, cols, out),
        };
        x.par_chunks(chunk).zip(out.par_chunks_mut(chunk)).map(work).reduce(Counts::default, Counts::plus)
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
    pub(super) fn plus(self, other: Counts) -> Counts {
        Counts {
            nonfinite_blocks: self.nonfinite_blocks + other.nonfinite_blocks,
            saturated: self.saturated + other.saturated,
        }
    }
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
