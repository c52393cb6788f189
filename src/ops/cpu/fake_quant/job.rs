//! A matrix, a chunk of rows, a row: what has to be known before a row can be quantized, and which code does it.

use half::f16;
use rayon::prelude::*;

use super::element::{Element, Storage, Word};
use super::error_sums::row_sums;
use super::four_over_six::{self, Candidates};
use super::rounders::{E2m1HalfAway, E2m1Stochastic, E2m1TowardZero, E4m3, E4m3Divided, E4m3Stochastic};
use super::scales::{self, Scales};
use super::{FakeQuantStats, PARALLEL_ELEMENTS, Task, amaxes, chunk_elements, lanes, mxfp4, nvfp4, uniforms};
use crate::numerics::block_format::{RoundingDraw, TensorScale};
use crate::numerics::block_scale::tensor_scale;
use crate::numerics::format::{Family, Format, MxScaleRule, Rounding};
use crate::numerics::tensor_error::TensorErrorSums;
use crate::ops::cpu::path::Path;

/// What every chunk of a matrix shares.
#[derive(Clone, Copy)]
struct Job<'a> {
    path: Path,
    cols: usize,
    format: Format,
    /// `block_scale::tensor_scale` of the whole; None: every row has its own, or the format has none.
    tensor: Option<f32>,
    draw: Option<&'a RoundingDraw<'a>>,
    with_errors: bool,
}

/// What a chunk met.
#[derive(Clone, Copy, Default)]
struct Done {
    nonfinite_blocks: usize,
    saturated: usize,
    errors: TensorErrorSums,
}

/// `Task::run`.
pub(super) fn run<T: Element>(task: &Task, x: &[T], cols: usize, out: &mut [T]) -> (FakeQuantStats, TensorErrorSums) {
    let Task { path, format, scale, draw, with_errors } = *task;
    let path = path.or_below();
    let chunk = chunk_of(x.len(), cols, format);
    let mut job = Job { path, cols, format, tensor: None, draw, with_errors };
    let mut found = Vec::new();
    match scale {
        TensorScale::Tensor if format.has_tensor_scale() => {
            let amax;
            (found, amax) = job.all_amaxes(x, chunk);
            job.tensor = Some(tensor_scale(format, amax));
        }
        TensorScale::Amax(amax) => job.tensor = Some(tensor_scale(format, amax)),
        _ => {}
    }
    let amax_chunk = job.amaxes_of(chunk);
    let known = |number: usize| match found.is_empty() {
        true => None,
        false => Some(&found[number * amax_chunk..found.len().min((number + 1) * amax_chunk)]),
    };
    let chunks = x.par_chunks(chunk).zip(out.par_chunks_mut(chunk)).enumerate();
    let done: Vec<Done> =
        chunks.map(|(number, (x, out))| job.chunk(number * chunk / cols, x, known(number), out)).collect();
    job.summary(&done)
}

/// `run` of f16, through f32.
pub(super) fn run_widened(task: &Task, x: &[f16], cols: usize, out: &mut [f16]) -> (FakeQuantStats, TensorErrorSums) {
    let Task { path, format, scale, draw, with_errors } = *task;
    let path = path.or_below();
    let tensor = match scale {
        TensorScale::Tensor if format.has_tensor_scale() => Some(tensor_amax_widened(path, x, cols, format)),
        TensorScale::Amax(amax) => Some(amax),
        _ => None,
    };
    let tensor = tensor.map(|amax| tensor_scale(format, amax));
    let job = Job { path, cols, format, tensor, draw, with_errors: false };
    let chunk = chunk_of(x.len(), cols, format);
    let work = |(number, (x, out)): (usize, (&[f16], &mut [f16]))| {
        let (mut wide, mut y) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        f16::widen(x, &mut wide);
        let mut done = job.chunk(number * chunk / cols, &wide, None, &mut y);
        f16::narrow(&y, out);
        if with_errors {
            f16::widen(out, &mut y);
            for (x, y) in wide.chunks_exact(cols).zip(y.chunks_exact(cols)) {
                done.errors.merge(&row_sums(path, x, y));
            }
        }
        done
    };
    let done: Vec<Done> = x.par_chunks(chunk).zip(out.par_chunks_mut(chunk)).enumerate().map(work).collect();
    Job { with_errors, ..job }.summary(&done)
}

/// Over blocks without NaN or infinity.
pub(super) fn tensor_amax<T: Element>(path: Path, x: &[T], cols: usize, format: Format) -> f32 {
    let job = Job { path, cols, format, tensor: None, draw: None, with_errors: false };
    let of_chunk = |x: &[T]| {
        let mut found = vec![T::Word::ZERO; job.amaxes_of(x.len())];
        job.find_amaxes(x, &mut found)
    };
    x.par_chunks(chunk_of(x.len(), cols, format)).map(of_chunk).reduce(|| 0.0, f32::max)
}

/// `tensor_amax` of f16.
pub(super) fn tensor_amax_widened(path: Path, x: &[f16], cols: usize, format: Format) -> f32 {
    let of_chunk = |x: &[f16]| {
        let mut wide = vec![0.0; x.len()];
        f16::widen(x, &mut wide);
        tensor_amax(path, &wide, cols, format)
    };
    x.par_chunks(chunk_elements(cols, format)).map(of_chunk).reduce(|| 0.0, f32::max)
}

/// One chunk where waking threads would take longer.
fn chunk_of(elements: usize, cols: usize, format: Format) -> usize {
    if elements < PARALLEL_ELEMENTS { elements } else { chunk_elements(cols, format) }
}

/// What a chunk works with, made once for all its rows.
struct Scratch<T: Element> {
    amaxes: Vec<T::Word>,
    of_row: Vec<T::Word>,
    uniforms: Vec<u16>,
    scales: Scales,
    candidates: Candidates,
}

impl Job<'_> {
    /// How many amaxes a share of whole bands has.
    fn amaxes_of(&self, elements: usize) -> usize {
        (elements / self.cols).div_ceil(self.format.block_rows()) * self.format.blocks_per_row(self.cols)
    }

    /// The amaxes of all blocks, and the largest that is finite.
    fn all_amaxes<T: Element>(&self, x: &[T], chunk: usize) -> (Vec<T::Word>, f32) {
        let mut found = vec![T::Word::ZERO; self.amaxes_of(x.len())];
        let chunks = x.par_chunks(chunk).zip(found.par_chunks_mut(self.amaxes_of(chunk)));
        let amax = chunks.map(|(x, found)| self.find_amaxes(x, found)).reduce(|| 0.0, f32::max);
        (found, amax)
    }

    fn find_amaxes<T: Element>(&self, x: &[T], found: &mut [T::Word]) -> f32 {
        let blocks = self.format.blocks_per_row(self.cols);
        let mut scratch = vec![T::Word::ZERO; blocks];
        for (band, amaxes) in x.chunks(self.band()).zip(found.chunks_mut(blocks)) {
            amaxes::of_band(self.path, band, self.cols, self.format, &mut scratch, amaxes);
        }
        T::of_word(amaxes::largest_finite::<T>(found)).read()
    }

    /// Elements of rows that share their blocks.
    fn band(&self) -> usize {
        self.format.block_rows() * self.cols
    }

    /// Whole bands of rows, the first of which is row `first_row` of the matrix.
    fn chunk<T: Element>(&self, first_row: usize, x: &[T], known: Option<&[T::Word]>, out: &mut [T]) -> Done {
        let mut done = Done::default();
        if let (Family::Mxfp4 { rule }, Rounding::NearestEven, false) =
            (self.format.family, self.format.rounding, self.format.two_d)
        {
            // The amax of a block is found on the way.
            for (x, out) in x.chunks_exact(self.cols).zip(out.chunks_exact_mut(self.cols)) {
                let (nonfinite_blocks, saturated) = mxfp4::row(self.path, x, rule, out);
                self.row_done(x, out, saturated, &mut done);
                done.nonfinite_blocks += nonfinite_blocks;
            }
            return done;
        }
        let mut scratch = self.scratch::<T>();
        let blocks = self.format.blocks_per_row(self.cols);
        for (number, (x, out)) in x.chunks(self.band()).zip(out.chunks_mut(self.band())).enumerate() {
            match known {
                Some(known) => scratch.amaxes.copy_from_slice(&known[number * blocks..][..blocks]),
                None => {
                    let Scratch { amaxes, of_row, .. } = &mut scratch;
                    amaxes::of_band(self.path, x, self.cols, self.format, of_row, amaxes);
                }
            }
            let infinity = T::Word::of(T::INFINITY);
            done.nonfinite_blocks += scratch.amaxes.iter().filter(|amax| **amax >= infinity).count();
            let largest = || T::of_word(amaxes::largest_finite::<T>(&scratch.amaxes)).read();
            let tensor = self.tensor.unwrap_or_else(|| tensor_scale(self.format, largest()));
            let first_row = first_row + number * self.format.block_rows();
            for (row, (x, out)) in x.chunks_exact(self.cols).zip(out.chunks_exact_mut(self.cols)).enumerate() {
                let saturated = self.row(first_row + row, x, tensor, &mut scratch, out);
                self.row_done(x, out, saturated, &mut done);
            }
        }
        done
    }

    fn scratch<T: Element>(&self) -> Scratch<T> {
        let blocks = self.format.blocks_per_row(self.cols);
        let four_over_six = self.format.family == Family::Nvfp4 { four_over_six: true };
        Scratch {
            amaxes: vec![T::Word::ZERO; blocks],
            of_row: vec![T::Word::ZERO; blocks],
            uniforms: vec![0; if self.draw.is_some() { self.cols } else { 0 }],
            scales: Scales::new(blocks),
            candidates: Candidates::new(if four_over_six { blocks } else { 0 }),
        }
    }

    fn row_done<T: Element>(&self, x: &[T], out: &[T], saturated: usize, done: &mut Done) {
        done.saturated += saturated;
        if self.with_errors {
            done.errors.merge(&row_sums(self.path, x, out));
        }
    }

    /// y of row `row`, whose amaxes are in the scratch; how many elements saturated.
    fn row<T: Element>(&self, row: usize, x: &[T], tensor: f32, scratch: &mut Scratch<T>, out: &mut [T]) -> usize {
        let (path, format) = (self.path, self.format);
        let Scratch { amaxes, uniforms, scales, candidates, .. } = scratch;
        if let Some(draw) = self.draw {
            uniforms::fill(path, draw, format.rounding, row, uniforms);
        }
        match (format.family, format.rounding) {
            (Family::Mxfp4 { rule }, Rounding::NearestEven) => return mxfp4::row_under(path, x, amaxes, rule, out),
            (Family::Nvfp4 { four_over_six: false }, Rounding::NearestEven) => {
                return nvfp4::row(path, x, amaxes, tensor, out);
            }
            (Family::Nvfp4 { four_over_six: true }, _) => {
                return four_over_six::row(path, x, amaxes, tensor, candidates, out);
            }
            (Family::Mxfp4 { rule: MxScaleRule::Rceil }, rounding) if rounding.is_stochastic() && T::IS_BF16 => {
                mxfp4::stochastic_row(path, x, amaxes, uniforms, out);
                return 0;
            }
            _ => {}
        }
        scales::fill::<T>(path, format, amaxes, tensor, scales);
        let block = format.block_size(self.cols);
        let stochastic = format.rounding.is_stochastic();
        match (format.family, format.rounding) {
            (Family::Fp8 { .. }, _) => lanes::row::<T, E4m3Divided>(path, x, block, scales, uniforms, out),
            (Family::Nvfp4SingleLevel, _) => lanes::row::<T, E2m1TowardZero>(path, x, block, scales, uniforms, out),
            (Family::Mxfp8 { .. }, _) if stochastic => {
                lanes::row::<T, E4m3Stochastic>(path, x, block, scales, uniforms, out)
            }
            (Family::Mxfp8 { .. }, _) => lanes::row::<T, E4m3>(path, x, block, scales, uniforms, out),
            _ if stochastic => lanes::row::<T, E2m1Stochastic>(path, x, block, scales, uniforms, out),
            // What is left of E2M1: nearest is done above.
            _ => lanes::row::<T, E2m1HalfAway>(path, x, block, scales, uniforms, out),
        }
    }

    fn summary(&self, done: &[Done]) -> (FakeQuantStats, TensorErrorSums) {
        let nvfp4 = matches!(self.format.family, Family::Nvfp4 { .. });
        let mut stats = FakeQuantStats {
            nonfinite_blocks: 0,
            saturated: 0,
            tensor_encode_scale: self.tensor.filter(|_| nvfp4).unwrap_or(1.0),
        };
        let mut errors = TensorErrorSums::default();
        for chunk in done {
            stats.nonfinite_blocks += chunk.nonfinite_blocks;
            stats.saturated += chunk.saturated;
            errors.merge(&chunk.errors);
        }
        if self.with_errors {
            errors.saturated = stats.saturated as u64;
        }
        (stats, errors)
    }
}
