//! NVFP4 under known scales, to nearest or stochastically: vector code of its own, on codes, where the CPU has it.
#![allow(unsafe_code)]

use super::element::Element;
use super::lanes;
use super::rounders::{E2m1, E2m1Stochastic};
use super::scales::Scales;
#[cfg(target_arch = "x86_64")]
use super::{nvfp4_avx2, nvfp4_avx512};
use crate::ops::cpu::path::Path;

/// y of whole strips of 256 elements; how many of them saturated. `uniforms` [cols] in units of 2^-16, used where `DRAWS`.
pub(super) fn row<T: Element, const DRAWS: bool>(
    path: Path,
    x: &[T],
    scales: &Scales,
    uniforms: &[u16],
    out: &mut [T],
) -> usize {
    #[cfg(target_arch = "x86_64")]
    match path.or_below() {
        Path::Portable => {}
        // SAFETY: or_below gives a path only where the CPU has its instructions.
        Path::Avx2 => return unsafe { nvfp4_avx2::row::<T, DRAWS>(x, scales, uniforms, out) },
        // SAFETY: as above.
        Path::Avx512 => return unsafe { nvfp4_avx512::row::<T, DRAWS>(x, scales, uniforms, out) },
    }
    match DRAWS {
        true => lanes::row::<T, E2m1Stochastic>(path, x, scales, uniforms, out),
        false => lanes::row::<T, E2m1<false>>(path, x, scales, uniforms, out),
    }
}
