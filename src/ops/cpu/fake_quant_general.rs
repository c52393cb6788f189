//! Fake quantization on the CPU of every format and storage dtype: the vector paths of fake_quant.rs where they exist,
//! else the definition (numerics/block_format.rs) on chunks of rows in parallel.
//!
//! x [rows, cols] in f32, bf16 or f16 -> y of the same dtype, rounded once from f32. In f16 a y above 65504 becomes
//! infinity.

use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

use super::fake_quant::{FakeQuantStats, Fast, fake_quant_bf16_into, fake_quant_f32_into};
use crate::numerics::block_format::{self, Quantized, RoundingDraw, TensorScale};
use crate::numerics::block_scale::tensor_scale;
use crate::numerics::format::{Family, Format};

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
    let work = |(chunk, (x, out)): (usize, (&[T], &mut [T]))| {
        let rows = x.len() / cols;
        let mut wide = vec![0.0; x.len()];
        T::widen(x, &mut wide);
        if Fast::of(format).is_some() {
            let mut y = vec![0.0; x.len()];
            let stats = fake_quant_f32_into(&wide, rows, cols, format, scale, &mut y);
            T::narrow(&y, out);
            return (stats.nonfinite_blocks, stats.saturated);
        }
        let draw = draw.map(|draw| RoundingDraw { row_keys: &draw.row_keys[chunk * chunk_rows..][..rows], ..*draw });
        let Quantized { dequantized, nonfinite_blocks, saturated, .. } =
            block_format::quantize(&wide, rows, cols, format, scale, draw.as_ref());
        T::narrow(&dequantized, out);
        (nonfinite_blocks, saturated)
    };
    let chunks = x.par_chunks(chunk_rows * cols).zip(out.par_chunks_mut(chunk_rows * cols)).enumerate();
    (stats.nonfinite_blocks, stats.saturated) = chunks.map(work).reduce(|| (0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
    stats
}

/// The largest magnitude of x [rows, cols] over blocks that hold neither NaN nor infinity; 0 if there is none.
pub fn tensor_amax<T: Storage>(x: &[T], cols: usize, format: Format) -> f32 {
    if x.is_empty() {
        return 0.0;
    }
    let chunk_amax = |x: &[T]| {
        let mut wide = vec![0.0; x.len()];
        T::widen(x, &mut wide);
        block_format::finite_amax(&wide, cols, format)
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
        x.convert_to_f32_slice(out);
    }
    fn narrow(x: &[f32], out: &mut [bf16]) {
        out.convert_from_f32_slice(x);
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
