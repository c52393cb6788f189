//! Fake quantization on the CPU of every format and storage dtype: the vector paths of fake_quant.rs where they exist,
//! else fake_quant_bands.rs, on chunks of rows in parallel.
//!
//! x [rows, cols] in f32, bf16 or f16 -> y of the same dtype, rounded once from f32. In f16 a y above 65504 becomes
//! infinity.

use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

use super::element;
use super::element_rounding::{E2m1Away, E2m1Nearest, E2m1Stochastic, E4m3Nearest, E4m3Stochastic};
use super::fake_quant::{Counts, FakeQuantStats, Fast, fake_quant_bf16_into, fake_quant_f32_into};
use super::fake_quant_bands::{Job, largest, quantize};
use super::path::Path;
use crate::numerics::block_format::{self, RoundingDraw, TensorScale};
use crate::numerics::block_scale::tensor_scale;
use crate::numerics::format::{Family, Format, Rounding};

/// Elements of a chunk of rows (at least one row of blocks).
const CHUNK_ELEMENTS: usize = 32 * 1024;

/// A storage dtype.
pub trait Storage: Copy + Send + Sync {
    /// Reads exactly.
    fn widen(x: &[Self], out: &mut [f32]);
    /// Rounds to nearest even.
    fn narrow(x: &[f32], out: &mut [Self]);
    /// The vector path of the dtype and format, if there is one.
    fn fast(
        x: &[Self],
        rows: usize,
        cols: usize,
        format: Format,
        scale: TensorScale,
        out: &mut [Self],
    ) -> Option<FakeQuantStats>;
}

/// Fills `out` [rows, cols] with y. `draw`: what a stochastic rounding draws from.
///
/// # Panics
/// As `block_format::quantize`, and where `out` has another length than x.
pub fn fake_quant_into<T: Storage>(
    x: &[T],
    rows: usize,
    cols: usize,
    format: Format,
    scale: TensorScale,
    draw: Option<&RoundingDraw>,
    out: &mut [T],
) -> FakeQuantStats {
    fake_quant_into_by(Path::best(), x, rows, cols, format, scale, draw, out)
}

/// `fake_quant_into` by a chosen implementation, or the fastest below it that the CPU has.
pub fn fake_quant_into_by<T: Storage>(
    path: Path,
    x: &[T],
    rows: usize,
    cols: usize,
    format: Format,
    scale: TensorScale,
    draw: Option<&RoundingDraw>,
    out: &mut [T],
) -> FakeQuantStats {
    assert_eq!(x.len(), rows * cols, "x holds [rows, cols]");
    assert_eq!(out.len(), x.len(), "out holds [rows, cols]");
    let mut stats = FakeQuantStats { nonfinite_blocks: 0, saturated: 0, tensor_encode_scale: 1.0 };
    if x.is_empty() {
        return stats;
    }
    let draw = draw.filter(|_| format.rounding.is_stochastic());
    if let Some(stats) = T::fast(x, rows, cols, format, scale, out) {
        return stats;
    }
    let scale = match scale {
        TensorScale::Tensor if format.has_tensor_scale() => TensorScale::Amax(tensor_amax(x, cols, format)),
        other => other,
    };
    if let (Family::Nvfp4 { .. }, TensorScale::Amax(amax)) = (format.family, scale) {
        stats.tensor_encode_scale = tensor_scale(format, amax);
    }
    let chunk_rows = chunk_rows(cols, format);
    let work = |wide: &mut Vec<f32>, (chunk, (x, out)): (usize, (&[T], &mut [T]))| {
        let rows = x.len() / cols;
        wide.resize(x.len(), 0.0);
        T::widen(x, wide);
        if Fast::of(format).is_some() {
            let mut y = vec![0.0; x.len()];
            let stats = fake_quant_f32_into(wide, rows, cols, format, scale, &mut y);
            T::narrow(&y, out);
            return Counts { nonfinite_blocks: stats.nonfinite_blocks, saturated: stats.saturated };
        }
        let draw = draw.map(|draw| RoundingDraw { row_keys: &draw.row_keys[chunk * chunk_rows..][..rows], ..*draw });
        let counts = bands(wide, &Job { format, cols, scale, draw: draw.as_ref(), path });
        T::narrow(wide, out);
        counts
    };
    let chunks = x.par_chunks(chunk_rows * cols).zip(out.par_chunks_mut(chunk_rows * cols)).enumerate();
    let counts = chunks.map_init(Vec::new, work).reduce(Counts::default, Counts::plus);
    FakeQuantStats { nonfinite_blocks: counts.nonfinite_blocks, saturated: counts.saturated, ..stats }
}

/// x [rows, cols] in place.
fn bands(x: &mut [f32], job: &Job) -> Counts {
    let run = match (job.format.has_e4m3_elements(), job.format.rounding) {
        (false, Rounding::NearestEven) => quantize::<E2m1Nearest>,
        (false, Rounding::HalfAway) => quantize::<E2m1Away>,
        (false, Rounding::Stochastic16 | Rounding::Stochastic8) => quantize::<E2m1Stochastic>,
        (true, Rounding::Stochastic16 | Rounding::Stochastic8) => quantize::<E4m3Stochastic>,
        // The grammar knows half_away for mxfp4 alone.
        (true, Rounding::NearestEven | Rounding::HalfAway) => quantize::<E4m3Nearest>,
    };
    run(job.path, x, job)
}

/// The largest magnitude of x [rows, cols] over blocks that hold neither NaN nor infinity; 0 if there is none.
pub fn tensor_amax<T: Storage>(x: &[T], cols: usize, format: Format) -> f32 {
    if x.is_empty() {
        return 0.0;
    }
    let chunk_amax = |x: &[T]| {
        let mut wide = vec![0.0; x.len()];
        T::widen(x, &mut wide);
        match f32::from_bits(largest(Path::best(), &wide)) {
            finite if finite < f32::INFINITY => finite,
            // Block by block, to leave out those with NaN or infinity.
            _ => block_format::finite_amax(&wide, cols, format),
        }
    };
    x.par_chunks(chunk_rows(cols, format) * cols).map(chunk_amax).reduce(|| 0.0, f32::max)
}

/// Whole rows of blocks.
fn chunk_rows(cols: usize, format: Format) -> usize {
    (CHUNK_ELEMENTS / cols).next_multiple_of(format.block_rows()).max(format.block_rows())
}

impl Storage for f32 {
    fn widen(x: &[f32], out: &mut [f32]) {
        out.copy_from_slice(x);
    }
    fn narrow(x: &[f32], out: &mut [f32]) {
        out.copy_from_slice(x);
    }
    fn fast(
        x: &[f32],
        rows: usize,
        cols: usize,
        format: Format,
        scale: TensorScale,
        out: &mut [f32],
    ) -> Option<FakeQuantStats> {
        Fast::of(format).map(|_| fake_quant_f32_into(x, rows, cols, format, scale, out))
    }
}

impl Storage for bf16 {
    fn widen(x: &[bf16], out: &mut [f32]) {
        element::widen(Path::best(), x, out);
    }
    fn narrow(x: &[f32], out: &mut [bf16]) {
        element::narrow(Path::best(), x, out);
    }
    fn fast(
        x: &[bf16],
        rows: usize,
        cols: usize,
        format: Format,
        scale: TensorScale,
        out: &mut [bf16],
    ) -> Option<FakeQuantStats> {
        Fast::of(format).map(|_| fake_quant_bf16_into(x, rows, cols, format, scale, out))
    }
}

impl Storage for f16 {
    fn widen(x: &[f16], out: &mut [f32]) {
        x.convert_to_f32_slice(out);
    }
    fn narrow(x: &[f32], out: &mut [f16]) {
        out.convert_from_f32_slice(x);
    }
    /// Its chunks are widened first.
    fn fast(_: &[f16], _: usize, _: usize, _: Format, _: TensorScale, _: &mut [f16]) -> Option<FakeQuantStats> {
        None
    }
}
