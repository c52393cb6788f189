//! A matrix and its chunks of rows: what has to be known before a row can be quantized, and what is counted.

use half::f16;
use rayon::prelude::*;

use super::element::{Element, Storage, Word};
use super::error_sums::row_sums;
use super::rows::Rows;
use super::{FakeQuantStats, PARALLEL_ELEMENTS, Task, amaxes, chunk_elements, fp8};
use crate::numerics::block_format::{RoundingDraw, TensorScale};
use crate::numerics::block_scale::tensor_scale;
use crate::numerics::format::{Family, Format};
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
    let job = Job::new(task, cols);
    let chunk = chunk_of(x.len(), cols, task.format);
    // Of tiles that share a tensor amax; a chunk finds others itself, while it has them in the cache.
    let mut tiles = vec![T::Word::ZERO; if task.format.has_tensor_scale() { job.tiles_in(x.len()) } else { 0 }];
    let tile_chunks = tiles.par_chunks_mut(job.tiles_in(chunk).max(1));
    x.par_chunks(chunk).zip(tile_chunks).for_each(|(x, tiles)| job.find_tiles(x, tiles));
    let job = job.under(task.scale, || match task.format.two_d {
        true => T::of_word(amaxes::finite::<T>(&tiles)).read(),
        false => tensor_amax(job.path, x, cols, task.format),
    });
    let quantize = |(number, (x, out)): (usize, (&[T], &mut [T]))| {
        let (first_row, count) = (number * chunk / cols, job.tiles_in(x.len()));
        if !tiles.is_empty() {
            return job.chunk(first_row, x, &tiles[job.tiles_in(number * chunk)..][..count], out);
        }
        let mut own = vec![T::Word::ZERO; count];
        job.find_tiles(x, &mut own);
        job.chunk(first_row, x, &own, out)
    };
    let done: Vec<Done> = x.par_chunks(chunk).zip(out.par_chunks_mut(chunk)).enumerate().map(quantize).collect();
    job.summary(&done)
}

/// `run` of f16, through f32.
pub(super) fn run_widened(task: &Task, x: &[f16], cols: usize, out: &mut [f16]) -> (FakeQuantStats, TensorErrorSums) {
    let job = Job::new(task, cols);
    let job = job.under(task.scale, || tensor_amax_widened(job.path, x, cols, task.format));
    let without_errors = Job { with_errors: false, ..job };
    let chunk = chunk_of(x.len(), cols, task.format);
    let work = |(number, (x, out)): (usize, (&[f16], &mut [f16]))| {
        let (mut wide, mut y) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        f16::widen(x, &mut wide);
        let mut tiles = vec![0; job.tiles_in(x.len())];
        job.find_tiles(&wide, &mut tiles);
        let mut done = without_errors.chunk(number * chunk / cols, &wide, &tiles, &mut y);
        f16::narrow(&y, out);
        if job.with_errors {
            f16::widen(out, &mut y);
            for (x, y) in wide.chunks_exact(cols).zip(y.chunks_exact(cols)) {
                done.errors.merge(&row_sums(job.path, x, y));
            }
        }
        done
    };
    let done: Vec<Done> = x.par_chunks(chunk).zip(out.par_chunks_mut(chunk)).enumerate().map(work).collect();
    job.summary(&done)
}

/// Over blocks without NaN or infinity.
pub(super) fn tensor_amax<T: Element>(path: Path, x: &[T], cols: usize, format: Format) -> f32 {
    let of_chunk = |x: &[T]| amaxes::finite_amax(path, x, cols, format).read();
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

impl<'a> Job<'a> {
    fn new(task: &Task<'a>, cols: usize) -> Job<'a> {
        let Task { path, format, draw, with_errors, .. } = *task;
        Job { path: path.or_below(), cols, format, tensor: None, draw, with_errors }
    }

    /// With the tensor scale, where all rows share one.
    fn under(self, scale: TensorScale, tensor_amax: impl FnOnce() -> f32) -> Job<'a> {
        let amax = match scale {
            TensorScale::Tensor if self.format.has_tensor_scale() => Some(tensor_amax()),
            TensorScale::Amax(amax) => Some(amax),
            _ => None,
        };
        Job { tensor: amax.map(|amax| tensor_scale(self.format, amax)), ..self }
    }

    /// Amaxes of the tiles of a band; 1 where blocks are not tiles.
    fn per_band(&self) -> usize {
        if self.format.two_d { amaxes::per_band(self.cols, self.format.block_size(0)) } else { 1 }
    }

    /// Amaxes of the tiles in a share of whole bands.
    fn tiles_in(&self, elements: usize) -> usize {
        let bands = (elements / self.cols).div_ceil(self.format.block_rows());
        if self.format.two_d { bands * self.per_band() } else { 0 }
    }

    /// The amaxes of a chunk's tiles; none where blocks are not tiles.
    fn find_tiles<T: Element>(&self, x: &[T], tiles: &mut [T::Word]) {
        for (x, tiles) in x.chunks(self.cols * self.format.block_rows()).zip(tiles.chunks_mut(self.per_band())) {
            amaxes::of_band(self.path, x, self.cols, self.format.block_size(0), tiles);
        }
    }

    /// y of a chunk, which begins with row `first_row` of the matrix; `tiles`: the amaxes of its tiles.
    fn chunk<T: Element>(&self, first_row: usize, x: &[T], tiles: &[T::Word], out: &mut [T]) -> Done {
        let Job { path, cols, format, .. } = *self;
        let mut done = Done { nonfinite_blocks: amaxes::nonfinite::<T>(tiles), ..Done::default() };
        let mut rows = Rows::new(path, format, self.draw);
        for (row, (x, out)) in x.chunks_exact(cols).zip(out.chunks_exact_mut(cols)).enumerate() {
            let tensor = self.tensor.unwrap_or_else(|| {
                let own = format.has_tensor_scale();
                let amax = if own { amaxes::finite_amax(path, x, cols, format) } else { T::ZERO };
                tensor_scale(format, amax.read())
            });
            let (nonfinite_blocks, saturated) = match format.family {
                Family::Fp8 { per_tensor } => fp8::row(path, x, per_tensor.then_some(tensor), out),
                _ => {
                    let tiles = tiles.chunks(self.per_band()).nth(row / format.block_rows()).unwrap_or_default();
                    rows.quantize(first_row + row, x, tiles, tensor, out)
                }
            };
            done.nonfinite_blocks += nonfinite_blocks;
            done.saturated += saturated;
            if self.with_errors {
                done.errors.merge(&row_sums(path, x, out));
            }
        }
        done
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
