//! Fake quantization on the CPU, bitwise equal to `numerics::block_format::quantize`: x [rows, cols] -> y, rounded once to
//! the dtype of x (f32, bf16 or f16; in f16 a y above 65504 becomes infinity).
//!
//! Chunks of whole rows of blocks run in parallel, cut by shape alone; what they count and sum merges in order, so
//! nothing depends on the number of threads. job.rs finds what a matrix and its tiles share, then takes a chunk row by row;
//! rows.rs takes a row by segments: amaxes.rs, uniforms.rs, then the format's own code. The mx formats work on bits
//! (mx.rs), nvfp4 on codes in vectors (nvfp4*.rs) after 4over6 has chosen (four_over_six.rs), fp8 on whole rows (fp8.rs);
//! what is rare, and the rest, takes the general steps of lanes.rs: scales.rs, one of rounders.rs, values.

mod amaxes;
#[cfg(target_arch = "x86_64")]
mod amaxes_x86;
mod element;
mod error_sums;
#[cfg(target_arch = "x86_64")]
mod error_sums_x86;
mod four_over_six;
mod fp8;
mod job;
mod lanes;
mod mx;
mod nvfp4;
#[cfg(target_arch = "x86_64")]
mod nvfp4_avx2;
#[cfg(target_arch = "x86_64")]
mod nvfp4_avx512;
mod rounders;
mod rows;
mod scales;
mod uniforms;
#[cfg(target_arch = "x86_64")]
mod uniforms_x86;

pub use element::Storage;
pub use error_sums::error_sums;

use super::path::Path;
use crate::numerics::block_format::{RoundingDraw, TensorScale};
use crate::numerics::format::Format;
use crate::numerics::tensor_error::TensorErrorSums;

/// Elements of a chunk of rows (at least one row of blocks).
const CHUNK_ELEMENTS: usize = 32 * 1024;
/// Below this many elements one thread is faster than waking others.
const PARALLEL_ELEMENTS: usize = 64 * 1024;

/// What quantization met on its way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FakeQuantStats {
    /// Blocks that held NaN or infinity and became NaN.
    pub nonfinite_blocks: usize,
    /// Elements whose scaled magnitude exceeded the element's maximum before clamping.
    pub saturated: usize,
    /// nvfp4's G; 1 where the format has none, and with `TensorScale::Row`.
    pub tensor_encode_scale: f32,
}

/// How a matrix is quantized.
#[derive(Clone, Copy)]
pub struct Task<'a> {
    /// The implementation, or the fastest below it that the CPU has.
    pub path: Path,
    pub format: Format,
    /// What the tensor amax of nvfp4 and fp8:tensor is taken over.
    pub scale: TensorScale,
    /// What a stochastic rounding draws from, with a key for every row.
    pub draw: Option<&'a RoundingDraw<'a>>,
    /// Whether the sums of the error metrics are wanted.
    pub with_errors: bool,
}

impl<'a> Task<'a> {
    /// By the fastest implementation, without error sums.
    pub fn new(format: Format, scale: TensorScale, draw: Option<&'a RoundingDraw<'a>>) -> Task<'a> {
        Task { path: Path::best(), format, scale, draw, with_errors: false }
    }

    /// Fills `out` [rows, cols]. The sums are those of out against x, all zero where they are not wanted.
    ///
    /// # Panics
    /// As `block_format::quantize`, and where `out` has another length than x.
    pub fn run<T: Storage>(
        &self,
        x: &[T],
        rows: usize,
        cols: usize,
        out: &mut [T],
    ) -> (FakeQuantStats, TensorErrorSums) {
        assert_eq!(x.len(), rows * cols, "x holds [rows, cols]");
        assert_eq!(out.len(), x.len(), "out holds [rows, cols]");
        let row_scales = self.format.has_tensor_scale() && self.scale == TensorScale::Row;
        assert!(!(row_scales && self.format.two_d), "a tile has one tensor scale");
        let draw = self.draw.filter(|_| self.format.rounding.is_stochastic());
        assert!(draw.is_some() || !self.format.rounding.is_stochastic(), "{} needs a draw", self.format);
        assert!(draw.is_none_or(|draw| draw.row_keys.len() == rows), "a key for every row");
        if x.is_empty() {
            let stats = FakeQuantStats { nonfinite_blocks: 0, saturated: 0, tensor_encode_scale: 1.0 };
            return (stats, TensorErrorSums::default());
        }
        T::run(&Task { draw, ..*self }, x, cols, out)
    }
}

/// `Task::run` without error sums.
///
/// # Panics
/// As `Task::run`.
pub fn fake_quant_into<T: Storage>(
    x: &[T],
    rows: usize,
    cols: usize,
    format: Format,
    scale: TensorScale,
    draw: Option<&RoundingDraw>,
    out: &mut [T],
) -> FakeQuantStats {
    Task::new(format, scale, draw).run(x, rows, cols, out).0
}

/// The largest magnitude of x [rows, cols] over blocks that hold neither NaN nor infinity; 0 if there is none.
pub fn tensor_amax<T: Storage>(x: &[T], cols: usize, format: Format) -> f32 {
    if x.is_empty() { 0.0 } else { T::tensor_amax(Path::best(), x, cols, format) }
}

/// Elements of the chunk of rows that one thread takes at a time.
pub fn chunk_elements(cols: usize, format: Format) -> usize {
    let rows = format.block_rows();
    cols * (CHUNK_ELEMENTS / cols).next_multiple_of(rows).max(rows)
}
