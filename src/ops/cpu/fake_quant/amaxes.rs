//! The amax of every block, as bits: as integers they order as the magnitudes do, with infinity and NaN above.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use super::amaxes_x86;
use super::element::{Element, Word};
use super::rows::{SEGMENT, STRIP, padded};
use crate::numerics::format::{Family, Format};
use crate::ops::cpu::path::{Path, for_each_path};

/// How many amaxes a band has: those of a row that is padded to whole strips.
pub(super) fn per_band(cols: usize, block: usize) -> usize {
    cols.next_multiple_of(STRIP) / block
}

/// Of a band of x: rows of `cols` that share their blocks. `amaxes` [per_band].
pub(super) fn of_band<T: Element>(path: Path, x: &[T], cols: usize, block: usize, amaxes: &mut [T::Word]) {
    amaxes.fill(T::Word::ZERO);
    for row in x.chunks_exact(cols) {
        for (x, amaxes) in row.chunks(SEGMENT).zip(amaxes.chunks_mut(SEGMENT / block)) {
            let mut of_row = [T::Word::ZERO; SEGMENT / 16];
            match x.len() % STRIP {
                0 => of_blocks(path, x, block, &mut of_row),
                _ => of_blocks(path, &padded(x), block, &mut of_row),
            };
            amaxes.iter_mut().zip(&of_row).for_each(|(amax, other)| *amax = (*amax).max(*other));
        }
    }
}

/// Of whole strips of 256 elements in blocks of 16 or 32; how many blocks hold NaN or infinity.
pub(super) fn of_blocks<T: Element>(path: Path, x: &[T], block: usize, amaxes: &mut [T::Word]) -> usize {
    #[cfg(target_arch = "x86_64")]
    match (path.or_below(), block) {
        (Path::Portable, _) => {}
        // SAFETY: or_below gives a path only where the CPU has its instructions.
        (_, 16) => return unsafe { amaxes_x86::of_blocks::<T, 16>(x, amaxes) },
        // SAFETY: as above.
        _ => return unsafe { amaxes_x86::of_blocks::<T, 32>(x, amaxes) },
    }
    let amaxes = &mut amaxes[..x.len() / block];
    x.chunks_exact(block).zip(&mut *amaxes).for_each(|(block, amax)| *amax = largest::<T>(path, block));
    nonfinite::<T>(amaxes)
}

/// How many amaxes are of blocks that hold NaN or infinity.
pub(super) fn nonfinite<T: Element>(amaxes: &[T::Word]) -> usize {
    amaxes.iter().filter(|amax| **amax >= T::Word::of(T::INFINITY)).count()
}

/// The largest magnitude of x [rows, cols] over blocks that hold neither NaN nor infinity; 0 if there is none.
pub(super) fn finite_amax<T: Element>(path: Path, x: &[T], cols: usize, format: Format) -> T {
    let amax = largest::<T>(path, x);
    if amax < T::Word::of(T::INFINITY) {
        return T::of_word(amax);
    }
    let block = format.block_size(cols);
    let mut amaxes = vec![T::Word::ZERO; per_band(cols, block).max(1)];
    let mut largest_finite = T::Word::ZERO;
    for band in x.chunks(cols * format.block_rows()) {
        match format.family {
            Family::Fp8 { .. } => amaxes[0] = largest::<T>(path, band),
            _ => of_band(path, band, cols, block, &mut amaxes),
        }
        largest_finite = largest_finite.max(finite::<T>(&amaxes));
    }
    T::of_word(largest_finite)
}

/// The largest that is of a block with neither NaN nor infinity.
pub(super) fn finite<T: Element>(amaxes: &[T::Word]) -> T::Word {
    amaxes.iter().copied().filter(|amax| *amax < T::Word::of(T::INFINITY)).fold(T::Word::ZERO, Ord::max)
}

for_each_path! {
    /// The largest magnitude.
    pub(super) fn largest<T: Element>(x: &[T]) -> T::Word {
        let mut largest = T::Word::ZERO;
        for value in x {
            largest = largest.max(value.magnitude());
        }
        largest
    }
}
