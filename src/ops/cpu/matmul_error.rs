//! The error of a matrix product on the CPU: y [rows, cols] f32 clean, z = normal(seed, stream, tokens[row], column),
//! out = round(law(y, s, z) + bias), one rounding to the output dtype; and AQN's perturbation of a weight.
//!
//! Work is cut into chunks of rows by shape alone, sums run in fixed lanes within a row and rows merge in order, so
//! neither values nor sums depend on the number of threads or on the instruction set.

use super::error_segment::{Lanes, Law, Output, Place, RowSums, segment};
use super::normals::{Path, fill_blocks};
use crate::numerics::error_law::{ErrorLaw, NoiseSums};
use crate::numerics::generator::COLUMN_BLOCK;
use half::bf16;
use rayon::prelude::*;

/// Below this many elements one thread is faster than waking others.
const PARALLEL_ELEMENTS: usize = 64 * 1024;
/// Elements of a chunk of rows (at least one row).
const CHUNK_ELEMENTS: usize = 32 * 1024;
/// 64-column units whose normals are made at a time: 8 KiB, within the first cache.
const SCRATCH_UNITS: usize = 32;

/// Sums of a perturbation d = out - w.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PerturbSums {
    pub elements: u64,
    /// Sum of d.
    pub sum: f64,
    /// Sum of d^2.
    pub sum_sq: f64,
}

/// Adds the error to y [rows, cols] f32 in place, then `bias` [cols]. `tokens` [rows] are the rows' keys.
///
/// # Panics
/// Where lengths disagree.
pub fn apply_f32(
    law: ErrorLaw,
    scale: f32,
    seed: u64,
    stream: u32,
    tokens: &[u64],
    y: &mut [f32],
    cols: usize,
    bias: Option<&[f32]>,
) -> NoiseSums {
    apply_f32_by(Path::best(), law, scale, seed, stream, tokens, y, cols, bias)
}

/// `apply_f32` by a chosen implementation, or the fastest below it that the CPU has.
pub fn apply_f32_by(
    path: Path,
    law: ErrorLaw,
    scale: f32,
    seed: u64,
    stream: u32,
    tokens: &[u64],
    y: &mut [f32],
    cols: usize,
    bias: Option<&[f32]>,
) -> NoiseSums {
    Draw { law, scale, seed, stream, tokens, cols, bias, place: Place::Same, path }.apply(&[], y).noise()
}

/// `apply_f32` from y [rows, cols] f32 to out [rows, cols] bf16.
///
/// # Panics
/// Where lengths disagree.
pub fn apply_bf16(
    law: ErrorLaw,
    scale: f32,
    seed: u64,
    stream: u32,
    tokens: &[u64],
    y: &[f32],
    cols: usize,
    bias: Option<&[f32]>,
    out: &mut [bf16],
) -> NoiseSums {
    Draw { law, scale, seed, stream, tokens, cols, bias, place: Place::Apart, path: Path::best() }.apply(y, out).noise()
}

/// into += law(y) for y, into [rows, cols] f32.
///
/// # Panics
/// Where lengths disagree.
pub fn accumulate_f32(
    law: ErrorLaw,
    scale: f32,
    seed: u64,
    stream: u32,
    tokens: &[u64],
    y: &[f32],
    cols: usize,
    into: &mut [f32],
) -> NoiseSums {
    let path = Path::best();
    Draw { law, scale, seed, stream, tokens, cols, bias: None, place: Place::Added, path }.apply(y, into).noise()
}

/// AQN: out = RN(w + RN(scale z)) for w, out [rows, cols] f32; `tokens` [rows] are the rows' keys.
///
/// # Panics
/// Where lengths disagree.
pub fn perturb_f32(
    w: &[f32],
    rows: usize,
    cols: usize,
    scale: f32,
    seed: u64,
    stream: u32,
    tokens: &[u64],
    out: &mut [f32],
) -> PerturbSums {
    assert_eq!(tokens.len(), rows, "one token key a row");
    let law = ErrorLaw::AbsoluteGaussian;
    let sums = Draw { law, scale, seed, stream, tokens, cols, bias: None, place: Place::Apart, path: Path::best() }
        .apply(w, out);
    PerturbSums { elements: sums.elements, sum: sums.row.error, sum_sq: sums.row.error_sq }
}

struct Sums {
    row: RowSums,
    elements: u64,
}

impl Sums {
    fn noise(self) -> NoiseSums {
        let RowSums { error_sq, clean_sq, clean_fourth, .. } = self.row;
        NoiseSums { error_sq, clean_sq, clean_fourth, elements: self.elements }
    }
}

/// What is drawn for a matrix [tokens, cols], and the law by which it enters.
struct Draw<'a> {
    law: ErrorLaw,
    scale: f32,
    seed: u64,
    stream: u32,
    tokens: &'a [u64],
    cols: usize,
    bias: Option<&'a [f32]>,
    place: Place,
    path: Path,
}

impl Draw<'_> {
    /// `clean` is empty in place: the clean values stand in `out`.
    fn apply<T: Output>(&self, clean: &[f32], out: &mut [T]) -> Sums {
        let (rows, cols) = (self.tokens.len(), self.cols);
        assert_eq!(out.len(), rows * cols, "out holds [rows, cols], one token key a row");
        let clean_len = if self.place == Place::Same { 0 } else { out.len() };
        assert_eq!(clean.len(), clean_len, "y holds [rows, cols]");
        assert!(self.bias.is_none_or(|b| b.len() == cols), "bias holds [cols]");
        let elements = out.len() as u64;
        if elements == 0 {
            return Sums { row: RowSums::default(), elements };
        }
        let chunk_rows = (CHUNK_ELEMENTS / cols).max(1);
        let work = |(chunk, out): (usize, &mut [T])| {
            let first_row = chunk * chunk_rows;
            let clean = if clean.is_empty() { clean } else { &clean[first_row * cols..][..out.len()] };
            self.apply_rows(first_row, clean, out)
        };
        let row_sums: Vec<Vec<RowSums>> = if out.len() >= PARALLEL_ELEMENTS {
            out.par_chunks_mut(chunk_rows * cols).enumerate().map(work).collect()
        } else {
            out.chunks_mut(chunk_rows * cols).enumerate().map(work).collect()
        };
        let mut total = RowSums::default();
        for sums in row_sums.iter().flatten() {
            total.error += sums.error;
            total.error_sq += sums.error_sq;
            total.clean_sq += sums.clean_sq;
            total.clean_fourth += sums.clean_fourth;
        }
        Sums { row: total, elements }
    }

    /// A chunk of rows: normals for a batch of 64-column units (of one or several rows), then the law on each row's share.
    fn apply_rows<T: Output>(&self, first_row: usize, clean: &[f32], out: &mut [T]) -> Vec<RowSums> {
        let cols = self.cols;
        let row_units = cols.div_ceil(COLUMN_BLOCK);
        let units = out.len() / cols * row_units;
        let mut z = [0f32; SCRATCH_UNITS * COLUMN_BLOCK];
        let mut row_sums = Vec::with_capacity(out.len() / cols);
        let (mut lanes, path) = (Lanes::default(), self.path);
        let law = Law { law: self.law, scale: self.scale, has_bias: self.bias.is_some(), place: self.place };
        for batch in (0..units).step_by(SCRATCH_UNITS) {
            let batch_end = (batch + SCRATCH_UNITS).min(units);
            if self.law.is_random() {
                let key = |unit: usize| {
                    (self.tokens[first_row + (batch + unit) / row_units], ((batch + unit) % row_units) as u32)
                };
                fill_blocks(path, self.seed, self.stream, &key, &mut z[..(batch_end - batch) * COLUMN_BLOCK]);
            }
            let mut unit = batch;
            while unit < batch_end {
                let (row, row_unit) = (unit / row_units, unit % row_units);
                let share = (row_units - row_unit).min(batch_end - unit);
                let column = row_unit * COLUMN_BLOCK;
                let len = (share * COLUMN_BLOCK).min(cols - column);
                let out = &mut out[row * cols + column..][..len];
                let clean = if clean.is_empty() { clean } else { &clean[row * cols + column..][..len] };
                let bias = self.bias.map_or(&[][..], |b| &b[column..][..len]);
                let z = &z[(unit - batch) * COLUMN_BLOCK..][..len];
                segment(path, law, clean, z, bias, out, &mut lanes);
                unit += share;
                if unit % row_units == 0 {
                    row_sums.push(std::mem::take(&mut lanes).finish());
                }
            }
        }
        row_sums
    }
}
