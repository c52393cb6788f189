//! NVFP4 on the CPU in two steps: first the amax of every block, and of the tensor from these, then codes and values under
//! G. The portable steps are here, the others in nvfp4_avx512.rs and
//! nvfp4_avx2.rs.
#![allow(unsafe_code)]

use super::element::{Element, Word};
use super::fake_quant::Counts;
use super::fake_quant_portable;
use super::path::Path;
#[cfg(target_arch = "x86_64")]
use super::{nvfp4_avx2, nvfp4_avx512};
use crate::numerics::block_format::tensor_encode_scale;

const BLOCK: usize = 16;

/// Blocks of a row.
pub(super) fn blocks_per_row(cols: usize) -> usize {
    cols.div_ceil(BLOCK)
}

/// The first step for x [rows, cols]: the amax of every block, as bits, into `amaxes` [rows, blocks]. Returns the largest
/// of those that are finite, as bits of an f32.
pub(super) fn find_amaxes<T: Element>(path: Path, x: &[T], cols: usize, amaxes: &mut [T::Word]) -> u32 {
    for (x, amaxes) in x.chunks_exact(cols).zip(amaxes.chunks_exact_mut(blocks_per_row(cols))) {
        row_amaxes(path, x, amaxes);
    }
    T::of_word(largest_finite::<T>(amaxes)).read().to_bits()
}

/// The second step, under the tensor's G.
pub(super) fn rows_of_found<T: Element>(
    path: Path,
    x: &[T],
    cols: usize,
    amaxes: &[T::Word],
    g: f32,
    out: &mut [T],
) -> Counts {
    let mut counts = Counts::default();
    let rows = x.chunks_exact(cols).zip(amaxes.chunks_exact(blocks_per_row(cols)));
    for ((x, amaxes), out) in rows.zip(out.chunks_exact_mut(cols)) {
        row_under(path, x, amaxes, g, out, &mut counts);
    }
    counts
}

/// Both steps row by row, under the given G or, without one, each row under its own.
pub(super) fn rows<T: Element>(path: Path, x: &[T], cols: usize, g: Option<f32>, out: &mut [T]) -> Counts {
    let mut counts = Counts::default();
    let mut amaxes = vec![T::Word::ZERO; blocks_per_row(cols)];
    for (x, out) in x.chunks_exact(cols).zip(out.chunks_exact_mut(cols)) {
        row_amaxes(path, x, &mut amaxes);
        let g = g.unwrap_or_else(|| tensor_encode_scale(T::of_word(largest_finite::<T>(&amaxes)).read()));
        row_under(path, x, &amaxes, g, out, &mut counts);
    }
    counts
}

fn largest_finite<T: Element>(amaxes: &[T::Word]) -> T::Word {
    let finite = |amax: T::Word| if amax < T::Word::of(T::INFINITY) { amax } else { T::Word::ZERO };
    amaxes.iter().fold(T::Word::ZERO, |largest, amax| largest.max(finite(*amax)))
}

fn row_amaxes<T: Element>(path: Path, x: &[T], amaxes: &mut [T::Word]) {
    #[cfg(target_arch = "x86_64")]
    match path.or_below() {
        Path::Portable => {}
        // SAFETY: or_below gives a path only where the CPU has its instructions.
        Path::Avx2 => return unsafe { nvfp4_avx2::row_amaxes(x, amaxes) },
        // SAFETY: as above.
        Path::Avx512 => return unsafe { nvfp4_avx512::row_amaxes(x, amaxes) },
    }
    let _ = path;
    for (block, amax) in x.chunks(BLOCK).zip(amaxes) {
        let magnitudes = block.iter().map(|v| v.word() & T::Word::of(T::MAGNITUDE_BITS));
        *amax = magnitudes.max().unwrap_or(T::Word::ZERO);
    }
}

fn row_under<T: Element>(path: Path, x: &[T], amaxes: &[T::Word], g: f32, out: &mut [T], counts: &mut Counts) {
    #[cfg(target_arch = "x86_64")]
    match path.or_below() {
        Path::Portable => {}
        // SAFETY: or_below gives a path only where the CPU has its instructions.
        Path::Avx2 => return unsafe { nvfp4_avx2::row(x, amaxes, g, out, counts) },
        // SAFETY: as above.
        Path::Avx512 => return unsafe { nvfp4_avx512::row(x, amaxes, g, out, counts) },
    }
    let _ = (path, amaxes);
    fake_quant_portable::nvfp4_row(x, g, out, counts);
}
