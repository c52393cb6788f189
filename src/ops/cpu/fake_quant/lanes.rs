//! A row in any format: groups of 16 elements scaled, rounded by one rounder, and scaled back.

use std::array::from_fn;

use super::element::Element;
use super::rounders::Rounder;
use super::scales::Scales;
use crate::ops::cpu::path::for_each_path;

pub(super) const GROUP: usize = 16;

for_each_path! {
    /// y of a row whose blocks of `block` elements have the given scales, and how many elements saturated. `uniforms`
    /// [cols] where the rounder draws, in units of 2^-16.
    pub(super) fn row<T: Element, R: Rounder>(
        x: &[T],
        block: usize,
        scales: &Scales,
        uniforms: &[u16],
        out: &mut [T],
    ) -> usize {
        row_of_groups::<T, R>(x, block, scales, uniforms, out)
    }
}

/// `row`, to be compiled with its caller.
#[inline(always)]
pub(super) fn row_of_groups<T: Element, R: Rounder>(
    x: &[T],
    block: usize,
    scales: &Scales,
    uniforms: &[u16],
    out: &mut [T],
) -> usize {
    let mut saturated = [0u32; GROUP];
    for (index, (x, out)) in x.chunks(block).zip(out.chunks_mut(block)).enumerate() {
        let scale = (scales.encode[index], scales.decode[index]);
        if scale.1.is_nan() {
            out.fill(T::NAN);
            continue;
        }
        let uniforms = if R::DRAWS { &uniforms[index * block..][..x.len()] } else { &[] };
        let (groups, tail) = x.as_chunks::<GROUP>();
        let (out_groups, out_tail) = out.as_chunks_mut::<GROUP>();
        let (u_groups, u_tail) = uniforms.as_chunks::<GROUP>();
        for (i, (x, out)) in groups.iter().zip(out_groups).enumerate() {
            let u = if R::DRAWS { u_groups[i] } else { [0; GROUP] };
            *out = group::<T, R>(x, scale, &u, &mut saturated);
        }
        if !tail.is_empty() {
            let x = from_fn(|i| tail.get(i).copied().unwrap_or(T::ZERO));
            let u = from_fn(|i| u_tail.get(i).copied().unwrap_or(0));
            let y = group::<T, R>(&x, scale, &u, &mut saturated);
            out_tail.copy_from_slice(&y[..out_tail.len()]);
        }
    }
    saturated.iter().map(|lane| *lane as usize).sum()
}

/// A group under (encode, decode).
#[inline(always)]
pub(super) fn group<T: Element, R: Rounder>(
    x: &[T; GROUP],
    (encode, decode): (f32, f32),
    uniforms: &[u16; GROUP],
    saturated: &mut [u32; GROUP],
) -> [T; GROUP] {
    let x: [f32; GROUP] = from_fn(|i| x[i].read());
    let values = values::<R>(&x, encode, uniforms, saturated);
    from_fn(|i| T::round(values[i] * decode))
}

/// The values of the element grid, with the signs of x.
#[inline(always)]
pub(super) fn values<R: Rounder>(
    x: &[f32; GROUP],
    encode: f32,
    uniforms: &[u16; GROUP],
    saturated: &mut [u32; GROUP],
) -> [f32; GROUP] {
    let scaled: [f32; GROUP] = from_fn(|i| if R::DIVIDES { x[i] / encode } else { x[i] * encode });
    let magnitudes: [f32; GROUP] = from_fn(|i| scaled[i].abs());
    *saturated = from_fn(|i| saturated[i].wrapping_add((magnitudes[i] > R::MAX) as u32));
    let clamped: [f32; GROUP] = from_fn(|i| if magnitudes[i] > R::MAX { R::MAX } else { magnitudes[i] });
    let u: [f32; GROUP] = from_fn(|i| if R::DRAWS { f32::from(uniforms[i]) * (1.0 / 65_536.0) } else { 0.0 });
    from_fn(|i| R::round(clamped[i], u[i]).copysign(x[i]))
}
