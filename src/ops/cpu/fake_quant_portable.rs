//! The portable side of fake_quant.rs: the definition's arithmetic without codes, a block at a time.
//!
//! |x| * E is rounded on the E2M1 grid by adding and subtracting 1.5 * 2^23 steps, the step (.5, 1 or 2) chosen by
//! magnitude, which rounds ties to even multiples of the step as the codes do.

use super::element::Element;
use super::element_rounding::round_e4m3;
use super::fake_quant::{Counts, INFINITY_BITS};
use crate::numerics::block_format::mx_exponent;
use crate::numerics::format::MxScaleRule;
use crate::numerics::{e4m3, e8m0, original};

/// A row of nvfp4 blocks under G.
#[inline(always)]
pub(super) fn nvfp4_row<T: Element>(x: &[T], g: f32, out: &mut [T], counts: &mut Counts) {
    let inverse = 1.0 / g;
    quantize_row::<T, 16>(x, out, counts, |x, amax| {
        let (encode, decode) = block_scales_nvfp4(amax, g, inverse);
        round_scaled(x, encode, decode)
    });
}

/// A row of nvfp4_single_level blocks.
#[inline(always)]
pub(super) fn single_level_row<T: Element>(x: &[T], out: &mut [T], counts: &mut Counts) {
    quantize_row::<T, 16>(x, out, counts, |x, amax| {
        let (_, scale) = original::single_level_scale(amax);
        round_toward_zero_ties(x, scale)
    });
}

/// Any mxfp4 block: those that mxfp4.rs leaves aside.
#[cold]
pub(super) fn mxfp4_block<T: Element>(x: &[T; 32], rule: MxScaleRule, out: &mut [T; 32], counts: &mut Counts) {
    *out = quantize_block(x, counts, &|x, amax| {
        let (encode, decode) = block_scales_mxfp4(amax, rule);
        round_scaled(x, encode, decode)
    });
}

/// (2^-k, 2^k).
#[inline(always)]
fn block_scales_mxfp4(amax: f32, rule: MxScaleRule) -> (f32, f32) {
    let k = mx_exponent(amax, rule);
    (e8m0::exp2(-k), e8m0::exp2(k))
}

/// (E, S * D), E = 0 where S = 0, from a block's amax, G and D = 1 / G.
#[inline(always)]
fn block_scales_nvfp4(amax: f32, g: f32, inverse: f32) -> (f32, f32) {
    let s = round_e4m3((amax * (g * (1.0 / 6.0))).min(e4m3::MAX));
    let decode = s * inverse;
    (if s == 0.0 { 0.0 } else { (1.0 / decode).min(f32::MAX) }, decode)
}

/// Quantizes a row block by block; `block` maps (x, amax) to (y, saturated elements).
#[inline(always)]
fn quantize_row<T: Element, const N: usize>(
    x: &[T],
    out: &mut [T],
    counts: &mut Counts,
    block: impl Fn(&[f32; N], f32) -> ([f32; N], u32),
) {
    let (blocks, tail) = x.as_chunks::<N>();
    let (out_blocks, out_tail) = out.as_chunks_mut::<N>();
    for (x, out) in blocks.iter().zip(out_blocks) {
        *out = quantize_block(x, counts, &block);
    }
    if !tail.is_empty() {
        let y = quantize_block(&padded::<T, N>(tail), counts, &block);
        out_tail.copy_from_slice(&y[..tail.len()]);
    }
}

#[inline(always)]
fn quantize_block<T: Element, const N: usize>(
    x: &[T; N],
    counts: &mut Counts,
    block: &impl Fn(&[f32; N], f32) -> ([f32; N], u32),
) -> [T; N] {
    let x = read(x);
    let bits = amax_bits(&x);
    if bits >= INFINITY_BITS {
        counts.nonfinite_blocks += 1;
        return [T::NAN; N];
    }
    let (y, saturated) = block(&x, f32::from_bits(bits));
    counts.saturated += saturated as usize;
    let mut out = [T::ZERO; N];
    for i in 0..N {
        out[i] = T::round(y[i]);
    }
    out
}

#[inline(always)]
pub(super) fn read<T: Element, const N: usize>(x: &[T; N]) -> [f32; N] {
    let mut values = [0.0; N];
    for i in 0..N {
        values[i] = x[i].read();
    }
    values
}

#[inline(always)]
pub(super) fn padded<T: Element, const N: usize>(tail: &[T]) -> [T; N] {
    let mut block = [T::ZERO; N];
    block[..tail.len()].copy_from_slice(tail);
    block
}

/// Bits of the largest magnitude: as integers they order as the magnitudes do, with infinity and NaN above.
#[inline(always)]
pub(super) fn amax_bits<const N: usize>(x: &[f32; N]) -> u32 {
    let mut largest = 0;
    for value in x {
        largest = largest.max(value.to_bits() & 0x7FFF_FFFF);
    }
    largest
}

/// y = e2m1(x * encode) * decode, and how many |x * encode| exceeded 6.
#[inline(always)]
fn round_scaled<const N: usize>(x: &[f32; N], encode: f32, decode: f32) -> ([f32; N], u32) {
    let (mut y, mut saturated) = ([0.0; N], 0u32);
    for i in 0..N {
        let magnitude = (x[i] * encode).abs();
        saturated = saturated.wrapping_add((magnitude > 6.0) as u32);
        let a = if magnitude > 6.0 { 6.0 } else { magnitude };
        // 1.5 * 2^23 times the grid's step at a.
        let steps = if a >= 4.0 {
            25_165_824.0
        } else if a >= 2.0 {
            12_582_912.0
        } else {
            6_291_456.0
        };
        let rounded = (a + steps) - steps;
        y[i] = rounded.copysign(x[i]) * decode;
    }
    (y, saturated)
}

/// y = e2m1(x / scale) * scale with ties toward zero (numerics/original.rs).
#[inline(always)]
fn round_toward_zero_ties<const N: usize>(x: &[f32; N], scale: f32) -> ([f32; N], u32) {
    let (mut y, mut saturated) = ([0.0; N], 0u32);
    for i in 0..N {
        let a = (x[i] / scale).abs();
        saturated = saturated.wrapping_add((a > 6.0) as u32);
        // The grid's increments over its midpoints: 4 halves, 2 ones, a two.
        let above = |bound: f32, step: f32| if a > bound { step } else { 0.0 };
        let halves = above(0.25, 0.5) + above(0.75, 0.5) + above(1.25, 0.5) + above(1.75, 0.5);
        let rounded = halves + above(2.5, 1.0) + above(3.5, 1.0) + above(5.0, 2.0);
        y[i] = rounded.copysign(x[i]) * scale;
    }
    (y, saturated)
}
