//! A row in any format: elements scaled, rounded by one rounder, and scaled back, in loops over words that become vectors.

use super::element::{Element, UNIT};
use super::rounders::Rounder;
use super::scales::Scales;
use crate::ops::cpu::path::for_each_path;

for_each_path! {
    /// y of whole units whose blocks of 16 have the given scales, and how many elements saturated. `uniforms` [cols] in
    /// units of 2^-16, used where the rounder draws.
    pub(super) fn row<T: Element, R: Rounder>(x: &[T], scales: &Scales, uniforms: &[u16], out: &mut [T]) -> usize {
        let (units, out_units) = (x.as_chunks::<UNIT>().0, out.as_chunks_mut::<UNIT>().0);
        let scales = scales.encode.as_chunks::<2>().0.iter().zip(scales.decode.as_chunks::<2>().0);
        let mut saturated = [0u32; UNIT];
        for (((x, out), (encode, decode)), u) in units.iter().zip(out_units).zip(scales).zip(uniforms.as_chunks::<UNIT>().0) {
            *out = unit::<T, R>(x, *encode, *decode, u, &mut saturated);
        }
        saturated.iter().map(|lane| *lane as usize).sum()
    }
}

/// Two blocks; the lanes count what saturates.
#[inline(always)]
pub(super) fn unit<T: Element, R: Rounder>(
    x: &[T; UNIT],
    encode: [f32; 2],
    decode: [f32; 2],
    uniforms: &[u16; UNIT],
    saturated: &mut [u32; UNIT],
) -> [T; UNIT] {
    let mut words = T::words(x);
    let uniforms = T::uniform_words(uniforms);
    let (words_mut, uniforms) = (words.as_mut(), uniforms.as_ref());
    let half = words_mut.len() / 2;
    for i in 0..words_mut.len() {
        let (encode, decode) = if i < half { (encode[0], decode[0]) } else { (encode[1], decode[1]) };
        let mut count = saturated[i];
        words_mut[i] = T::map(words_mut[i], uniforms[i], |a, u| {
            let (value, above) = value::<R>(a, encode, u);
            count = count.wrapping_add(above as u32);
            value * decode
        });
        saturated[i] = count;
    }
    T::of_words(words)
}

/// A value of the element grid from a magnitude, and whether it saturates.
#[inline(always)]
pub(super) fn value<R: Rounder>(a: f32, encode: f32, uniform: u32) -> (f32, bool) {
    let scaled = if R::DIVIDES { a / encode } else { a * encode };
    let above = scaled > R::MAX;
    let clamped = if above { R::MAX } else { scaled };
    let u = if R::DRAWS { uniform as i32 as f32 } else { 0.0 };
    (R::round(clamped, u), above)
}
