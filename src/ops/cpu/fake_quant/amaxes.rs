//! The amax of every block, as bits: as integers they order as the magnitudes do, with infinity and NaN above.

#![allow(unsafe_code)]

use super::element::{Element, Word};
#[cfg(target_arch = "x86_64")]
use super::{nvfp4_avx2, nvfp4_avx512};
use crate::numerics::format::Format;
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

/// The largest that is finite.
pub(super) fn largest_finite<T: Element>(amaxes: &[T::Word]) -> T::Word {
    let finite = |amax: T::Word| if amax < T::Word::of(T::INFINITY) { amax } else { T::Word::ZERO };
    amaxes.iter().fold(T::Word::ZERO, |largest, amax| largest.max(finite(*amax)))
}

fn of_row<T: Element>(path: Path, x: &[T], block: usize, amaxes: &mut [T::Word]) {
    #[cfg(target_arch = "x86_64")]
    if block == 16 {
        match path.or_below() {
            Path::Portable => {}
            // SAFETY: or_below gives a path only where the CPU has its instructions.
            Path::Avx2 => return unsafe { nvfp4_avx2::row_amaxes(x, amaxes) },
            // SAFETY: as above.
            Path::Avx512 => return unsafe { nvfp4_avx512::row_amaxes(x, amaxes) },
        }
    }
    of_blocks(path, x, block, amaxes);
}

for_each_path! {
    fn of_blocks<T: Element>(x: &[T], block: usize, amaxes: &mut [T::Word]) {
        // Blocks of 32 have a length that the compiler knows.
        if block == 32 {
            let (whole, tail) = x.as_chunks::<32>();
            for (block, amax) in whole.iter().zip(&mut *amaxes) {
                *amax = of_values(block);
            }
            if let (false, Some(last)) = (tail.is_empty(), amaxes.last_mut()) {
                *last = of_values(tail);
            }
            return;
        }
        for (block, amax) in x.chunks(block).zip(amaxes) {
            *amax = of_values(block);
        }
    }
}

#[inline(always)]
fn of_values<T: Element>(x: &[T]) -> T::Word {
    let mut largest = T::Word::ZERO;
    for value in x {
        largest = largest.max(value.word() & T::Word::of(T::MAGNITUDE_BITS));
    }
    largest
}
