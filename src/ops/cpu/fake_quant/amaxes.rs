//! The amax of every block, as bits: as integers they order as the magnitudes do, with infinity and NaN above.

#![allow(unsafe_code)]

use super::element::{Element, Word};
#[cfg(target_arch = "x86_64")]
use super::{nvfp4_avx2, nvfp4_avx512};
use crate::numerics::format::Format;
use crate::ops::cpu::arrays::from_fn;
use crate::ops::cpu::path::{Path, for_each_path};

/// Of a band of x, rows that share their blocks, into `amaxes` [blocks of a row]. `scratch` is as long.
pub(super) fn of_band<T: Element>(
    path: Path,
    x: &[T],
    cols: usize,
    format: Format,
    scratch: &mut [T::Word],
    amaxes: &mut [T::Word],
) {
    let block = format.block_size(cols);
    for (row, x) in x.chunks_exact(cols).enumerate() {
        if row == 0 {
            of_row(path, x, block, amaxes);
            continue;
        }
        of_row(path, x, block, scratch);
        amaxes.iter_mut().zip(&*scratch).for_each(|(amax, other)| *amax = (*amax).max(*other));
    }
}

const LANES: usize = 32;

for_each_path! {
    /// The largest that is finite, and how many are not.
    pub(super) fn summary<T: Element>(amaxes: &[T::Word]) -> (T::Word, usize) {
        let (mut largest, mut nonfinite) = ([T::Word::ZERO; LANES], 0usize);
        // Counts leave their lanes, which hold 16 bits, in between.
        for part in amaxes.chunks(LANES << 15) {
            let mut counts = [T::Word::ZERO; LANES];
            let (groups, tail) = part.as_chunks::<LANES>();
            for group in groups {
                add_group::<T>(group, &mut largest, &mut counts);
            }
            let last = from_fn(|l| tail.get(l).copied().unwrap_or(T::Word::ZERO));
            add_group::<T>(&last, &mut largest, &mut counts);
            nonfinite = counts.iter().fold(nonfinite, |total, count| total.wrapping_add(count.to_usize()));
        }
        (largest.into_iter().fold(T::Word::ZERO, Ord::max), nonfinite)
    }
}

#[inline(always)]
fn add_group<T: Element>(group: &[T::Word; LANES], largest: &mut [T::Word; LANES], counts: &mut [T::Word; LANES]) {
    let infinity = T::Word::of(T::INFINITY);
    *largest = from_fn(|l| largest[l].max(if group[l] < infinity { group[l] } else { T::Word::ZERO }));
    *counts = from_fn(|l| counts[l].plus(if group[l] < infinity { T::Word::ZERO } else { T::Word::of(1) }));
}

fn of_row<T: Element>(path: Path, x: &[T], block: usize, amaxes: &mut [T::Word]) {
    match block {
        16 => of_sixteens(path, x, amaxes),
        32 => {
            // Pairs of blocks of 16, some at a time.
            const PAIRS: usize = 64;
            for (x, amaxes) in x.chunks(32 * PAIRS).zip(amaxes.chunks_mut(PAIRS)) {
                let mut halves = [T::Word::ZERO; 2 * PAIRS];
                of_sixteens(path, x, &mut halves[..x.len().div_ceil(16)]);
                amaxes.iter_mut().zip(halves.as_chunks::<2>().0).for_each(|(amax, [a, b])| *amax = (*a).max(*b));
            }
        }
        _ => x.chunks(block).zip(amaxes).for_each(|(block, amax)| *amax = of_values(path, block)),
    }
}

fn of_sixteens<T: Element>(path: Path, x: &[T], amaxes: &mut [T::Word]) {
    #[cfg(target_arch = "x86_64")]
    match path.or_below() {
        Path::Portable => {}
        // SAFETY: or_below gives a path only where the CPU has its instructions.
        Path::Avx2 => return unsafe { nvfp4_avx2::row_amaxes(x, amaxes) },
        // SAFETY: as above.
        Path::Avx512 => return unsafe { nvfp4_avx512::row_amaxes(x, amaxes) },
    }
    let _ = path;
    for (block, amax) in x.chunks(16).zip(amaxes) {
        *amax = of_values(Path::Portable, block);
    }
}

for_each_path! {
    fn of_values<T: Element>(x: &[T]) -> T::Word {
        let mut largest = T::Word::ZERO;
        for value in x {
            largest = largest.max(value.word() & T::Word::of(T::MAGNITUDE_BITS));
        }
        largest
    }
}
