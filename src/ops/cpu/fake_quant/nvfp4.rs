//! NVFP4 to nearest, a row of blocks of known amax under G: the portable steps; nvfp4_avx512.rs and nvfp4_avx2.rs have the
//! others.
#![allow(unsafe_code)]

use std::array::from_fn;

use super::element::{Element, Word};
use super::lanes::{GROUP, group};
use super::rounders::E2m1;
use super::scales::Nvfp4Scale;
#[cfg(target_arch = "x86_64")]
use super::{nvfp4_avx2, nvfp4_avx512};
use crate::ops::cpu::path::Path;

/// y of a row; how many elements saturated.
pub(super) fn row<T: Element>(path: Path, x: &[T], amaxes: &[T::Word], g: f32, out: &mut [T]) -> usize {
    #[cfg(target_arch = "x86_64")]
    match path.or_below() {
        Path::Portable => {}
        // SAFETY: or_below gives a path only where the CPU has its instructions.
        Path::Avx2 => return unsafe { nvfp4_avx2::row(x, amaxes, g, out) },
        // SAFETY: as above.
        Path::Avx512 => return unsafe { nvfp4_avx512::row(x, amaxes, g, out) },
    }
    let _ = path;
    portable_row(x, amaxes, g, out)
}

/// Of any blocks, also those with NaN or infinity, which the vector code leaves aside.
pub(super) fn portable_row<T: Element>(x: &[T], amaxes: &[T::Word], g: f32, out: &mut [T]) -> usize {
    let scale = Nvfp4Scale { factor: g * (1.0 / 6.0), times: 1.0, g };
    let mut saturated = [0; GROUP];
    for ((x, amax), out) in x.chunks(GROUP).zip(amaxes).zip(out.chunks_mut(GROUP)) {
        if *amax >= T::Word::of(T::INFINITY) {
            out.fill(T::NAN);
            continue;
        }
        let x: [T; GROUP] = from_fn(|i| x.get(i).copied().unwrap_or(T::ZERO));
        let y = group::<T, E2m1>(&x, scale.scales(T::of_word(*amax).read()), &[0; GROUP], &mut saturated);
        out.copy_from_slice(&y[..out.len()]);
    }
    saturated.iter().map(|lane| *lane as usize).sum()
}
