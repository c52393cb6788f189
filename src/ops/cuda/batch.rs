//! What kernels share: several matrices in one launch, cut into tiles that are the blocks of the grid; names and alignment.

use std::ffi::c_void;

use tch::Kind;

use crate::{Error, Result};

/// n / d by multiplication: `Divider` of kernels/include/portable.cuh. n < 2^31.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Divider {
    multiplier: u32, // 0 stands for d = 1
    shift: u32,
}

impl Divider {
    /// d > 0. Granlund and Montgomery, "Division by Invariant Integers using Multiplication", 1994: with
    /// 2^(31 + l) / d rounded up, l = ceil(log2 d), the product's error stays below 1/d for n < 2^31.
    pub fn new(d: u32) -> Divider {
        if d <= 1 {
            return Divider::default();
        }
        let log = 32 - (d - 1).leading_zeros();
        let multiplier = (1u64 << (31 + log)).div_ceil(u64::from(d));
        Divider { multiplier: multiplier as u32, shift: log - 1 }
    }

    #[cfg(test)]
    fn divide(self, n: u32) -> u32 {
        if self.multiplier == 0 {
            return n;
        }
        ((u64::from(n) * u64::from(self.multiplier)) >> 32) as u32 >> self.shift
    }
}

/// Units of work (below 2^31, so that a `Divider` can tell their rows) cut into tiles of `tile` units.
///
/// # Errors
/// `Runtime` for a matrix that is too large.
pub fn tiles(name: &str, rows: usize, units_of_row: usize, tile: u32) -> Result<u32> {
    let units = rows as u64 * units_of_row as u64;
    if units + u64::from(tile) >= 1 << 31 {
        return Err(Error::Runtime(format!("{name}: {rows} rows of {units_of_row} units are too many for one launch")));
    }
    Ok((units as u32).div_ceil(tile))
}

/// How the names of the kernels of a dtype end.
///
/// # Errors
/// `Runtime` naming the tensor, where there are none.
pub fn dtype_suffix(name: &str, kind: Kind) -> Result<&'static str> {
    match kind {
        Kind::Float => Ok("f32"),
        Kind::BFloat16 => Ok("bf16"),
        Kind::Half => Ok("f16"),
        other => Err(Error::Runtime(format!("{name}: found dtype {other:?}, expected f32, bf16 or f16"))),
    }
}

/// Whether octets can be read at once: everything to 16 bytes. Null is.
pub fn are_aligned<const N: usize>(pointers: [*mut c_void; N]) -> bool {
    pointers.iter().all(|pointer| (*pointer as usize).is_multiple_of(16))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn division_is_exact_below_2_to_31() {
        let divisors = (1..2000).chain((0..31).flat_map(|k| [(1u32 << k).max(2) - 1, 1 << k, (1 << k) + 1]));
        for d in divisors.chain([i32::MAX as u32, i32::MAX as u32 - 1]) {
            let divider = Divider::new(d);
            let near = |n: u32| [n.saturating_sub(1), n, n + 1];
            let multiples = (0..31).map(|k| ((i32::MAX as u32 / d) >> k) * d);
            for n in multiples.flat_map(near).chain(near(i32::MAX as u32 - 1)).chain(0..3) {
                let n = n.min(i32::MAX as u32);
                assert_eq!(divider.divide(n), n / d, "{n} / {d}");
            }
        }
    }

    #[test]
    fn a_matrix_that_is_too_large_is_an_error() {
        assert_eq!(tiles("x", 3, 1000, 1024).ok(), Some(3));
        assert!(tiles("x", 1 << 20, 1 << 11, 1024).is_err());
    }
}
