//! MXFP4 on the bits of x, in lanes as wide as x: bf16 -> bf16 (16 bits), f32 -> f32 (32 bits); blocks of 32.
//!
//! With B = the bits of 2^k and m = those of |x|, the order of magnitudes is the order of bits, and a scaled magnitude
//! a = |x| 2^-k lies below a bound c where m lies below the bits of c 2^k, which are B plus a constant. So, to nearest,
//! y = 0 (a <= 1/4), 2^k / 2 (a < 3/4), 2^k (a < 1), 6 2^k (a > 6), else m rounded to one mantissa bit, ties to even.
//! No element is widened and nothing is multiplied. All of this holds while 2^k / 4 is a normal number; other blocks,
//! and those with NaN or infinity, take the general steps of lanes.rs.

use std::array::from_fn;

use super::element::{Element, Word};
use super::lanes::{GROUP, group};
use super::rounders::{E2m1, E2m1Stochastic, Rounder};
use super::scales::{mx_scales, rounds_up};
use crate::numerics::format::MxScaleRule;
use crate::ops::cpu::path::for_each_path;

const BLOCK: usize = 32;
/// Blocks after which counts leave their lanes, which hold 16 bits.
const COUNTED_BLOCKS: usize = 1 << 14;

/// What a row met: (blocks with NaN or infinity, saturated elements).
type Met = (usize, usize);

for_each_path! {
    /// y of a row, to nearest, each block under its own amax.
    pub(super) fn row<T: Element>(x: &[T], rule: MxScaleRule, out: &mut [T]) -> Met {
        let (blocks, tail) = x.as_chunks::<BLOCK>();
        let (out_blocks, out_tail) = out.as_chunks_mut::<BLOCK>();
        let (mut nonfinite, mut saturated) = (0usize, 0usize);
        for (blocks, out) in blocks.chunks(COUNTED_BLOCKS).zip(out_blocks.chunks_mut(COUNTED_BLOCKS)) {
            let mut lanes = [T::Word::ZERO; BLOCK];
            for (x, out) in blocks.iter().zip(out) {
                let amax = amax(x);
                nonfinite = nonfinite.wrapping_add((amax >= T::Word::of(T::INFINITY)) as usize);
                saturated = saturated.wrapping_add(nearest_block(x, amax, rule, out, &mut lanes));
            }
            saturated = saturated.wrapping_add(lanes.iter().map(|lane| lane.to_usize()).sum());
        }
        if !tail.is_empty() {
            let x: [T; BLOCK] = from_fn(|i| tail.get(i).copied().unwrap_or(T::ZERO));
            let (mut y, mut lanes) = ([T::ZERO; BLOCK], [T::Word::ZERO; BLOCK]);
            let amax = amax(&x);
            nonfinite = nonfinite.wrapping_add((amax >= T::Word::of(T::INFINITY)) as usize);
            saturated = saturated.wrapping_add(nearest_block(&x, amax, rule, &mut y, &mut lanes));
            saturated = saturated.wrapping_add(lanes.iter().map(|lane| lane.to_usize()).sum());
            out_tail.copy_from_slice(&y[..out_tail.len()]);
        }
        (nonfinite, saturated)
    }
}

for_each_path! {
    /// y of a row, to nearest, of blocks of known amax; how many elements saturated.
    pub(super) fn row_under<T: Element>(x: &[T], amaxes: &[T::Word], rule: MxScaleRule, out: &mut [T]) -> usize {
        let mut saturated = 0usize;
        for ((x, amax), out) in x.chunks(BLOCK).zip(amaxes).zip(out.chunks_mut(BLOCK)) {
            let x: [T; BLOCK] = from_fn(|i| if i < x.len() { x[i] } else { T::ZERO });
            let (mut y, mut lanes) = ([T::ZERO; BLOCK], [T::Word::ZERO; BLOCK]);
            saturated = saturated.wrapping_add(nearest_block(&x, *amax, rule, &mut y, &mut lanes));
            saturated = saturated.wrapping_add(lanes.iter().map(|lane| lane.to_usize()).sum());
            out.copy_from_slice(&y[..out.len()]);
        }
        saturated
    }
}

for_each_path! {
    /// y of a bf16 row, rounded stochastically under the rule rceil, so that nothing saturates. `uniforms` [cols] in units
    /// of 2^-16.
    pub(super) fn stochastic_row<T: Element>(x: &[T], amaxes: &[T::Word], uniforms: &[u16], out: &mut [T]) {
        let blocks = x.chunks(BLOCK).zip(amaxes).zip(uniforms.chunks(BLOCK));
        for (((x, amax), u), out) in blocks.zip(out.chunks_mut(BLOCK)) {
            if let (Ok(x), Ok(u), Ok(out)) = (x.try_into(), u.try_into(), (&mut *out).try_into()) {
                stochastic_block(x, *amax, u, out);
                continue;
            }
            let padded: [T; BLOCK] = from_fn(|i| if i < x.len() { x[i] } else { T::ZERO });
            let u = from_fn(|i| if i < u.len() { u[i] } else { 0 });
            let mut y = [T::ZERO; BLOCK];
            stochastic_block(&padded, *amax, &u, &mut y);
            out.copy_from_slice(&y[..out.len()]);
        }
    }
}

#[inline(always)]
fn amax<T: Element>(x: &[T; BLOCK]) -> T::Word {
    let mut amax = T::Word::ZERO;
    for value in x {
        amax = amax.max(value.word() & T::Word::of(T::MAGNITUDE_BITS));
    }
    amax
}

/// The smallest exponent field of an amax for which 2^k / 4 is normal by any rule.
const NEAREST_EXPONENT: u32 = 5;
/// ... and for which a subnormal element is too small to be seen.
const STOCHASTIC_EXPONENT: u32 = 30;

/// Whether the amax has at least this exponent field, and nothing in the block is infinite or NaN.
#[inline(always)]
fn is_plain<T: Element>(amax: T::Word, exponent: u32) -> bool {
    amax >= T::Word::of(exponent << T::MANTISSA_BITS) && amax < T::Word::of(T::INFINITY)
}

/// The bits of 2^(k + 2) from the block's amax.
#[inline(always)]
fn power_of<T: Element>(amax: T::Word, rule: MxScaleRule) -> T::Word {
    let carries = rounds_up(rule, 0x40_0000) >> (23 - T::MANTISSA_BITS);
    amax.plus(T::Word::of(carries)) & T::Word::of(T::INFINITY)
}

/// Returns what saturated in a block that is not plain; the lanes count the rest.
#[inline(always)]
fn nearest_block<T: Element>(
    x: &[T; BLOCK],
    amax: T::Word,
    rule: MxScaleRule,
    out: &mut [T; BLOCK],
    saturated: &mut [T::Word; BLOCK],
) -> usize {
    if !is_plain::<T>(amax, NEAREST_EXPONENT) {
        return any_block::<T, E2m1>(x, amax, rule, &[0; BLOCK], out);
    }
    let m = T::MANTISSA_BITS;
    let power = power_of::<T>(amax, rule);
    let one = power.minus(T::Word::of(2 << m)); // 2^k
    let six = power.plus(T::Word::of(1 << (m - 1))); // 1.5 * 2^(k+2)
    let (three_quarters, half, quarter) =
        (one.minus(T::Word::of(1 << (m - 1))), one.minus(T::Word::of(1 << m)), one.minus(T::Word::of(2 << m)));
    for i in 0..BLOCK {
        let a = x[i].word() & T::Word::of(T::MAGNITUDE_BITS);
        saturated[i] = saturated[i].plus(if a > six { T::Word::of(1) } else { T::Word::ZERO });
        let odd = a.shifted_right(m - 1) & T::Word::of(1);
        let rounded = a.plus(T::Word::of((1 << (m - 2)) - 1)).plus(odd) & T::Word::of(T::MAGNITUDE_BITS << (m - 1));
        let from_one = rounded.min(six).max(one);
        let below = if a > quarter { half } else { T::Word::ZERO };
        let y = if a >= three_quarters { from_one } else { below };
        out[i] = T::of_word(y | (x[i].word() & T::Word::of(T::MAGNITUDE_BITS + 1)));
    }
    0
}

/// Up from the neighbour below where the fraction of the step, in units of 2^-16 and cut, plus u carries. With the 8 bits
/// of a bf16's significand that is exactly a + u step reaching the neighbour above, also where f32 rounds that sum.
#[inline(always)]
fn stochastic_block<T: Element>(x: &[T; BLOCK], amax: T::Word, uniforms: &[u16; BLOCK], out: &mut [T; BLOCK]) {
    if !T::IS_BF16 || !is_plain::<T>(amax, STOCHASTIC_EXPONENT) {
        any_block::<T, E2m1Stochastic>(x, amax, MxScaleRule::Rceil, uniforms, out);
        return;
    }
    let one = (power_of::<T>(amax, MxScaleRule::Rceil).to_usize() as u16).wrapping_sub(2 << 7); // 2^k
    let half = one.wrapping_sub(1 << 7);
    for i in 0..BLOCK {
        let bits = x[i].word().to_usize() as u16;
        let a = bits & 0x7FFF;
        // Binades below 2^k; from 25 on nothing of the significand is left.
        let binades = one.max(a & 0x7F80).wrapping_sub(a & 0x7F80).min(25 << 7) >> 7;
        let significand = a & 0x7F | 0x80;
        let large = significand.wrapping_shl(10u16.wrapping_sub(binades) as u32);
        let small = significand.wrapping_shr(binades.wrapping_sub(10) as u32);
        let fraction = if binades <= 10 { large } else { small };
        let cut = a & !0x3F;
        let (below, above) = if binades == 1 { (half, one) } else { (0, half) };
        let (below, above) = if binades == 0 { (cut, cut.wrapping_add(0x40)) } else { (below, above) };
        let y = if fraction > !uniforms[i] { above } else { below };
        out[i] = T::of_word(T::Word::of(u32::from(y | bits & 0x8000)));
    }
}

/// Any block, by the general steps; how many elements saturated.
#[cold]
fn any_block<T: Element, R: Rounder>(
    x: &[T; BLOCK],
    amax: T::Word,
    rule: MxScaleRule,
    uniforms: &[u16; BLOCK],
    out: &mut [T; BLOCK],
) -> usize {
    if amax >= T::Word::of(T::INFINITY) {
        *out = [T::NAN; BLOCK];
        return 0;
    }
    let scales = mx_scales(T::of_word(amax).read(), 2, rounds_up(rule, 0x40_0000));
    let mut saturated = [0; GROUP];
    let (x, _) = x.as_chunks::<GROUP>();
    let (u, _) = uniforms.as_chunks::<GROUP>();
    let (out, _) = out.as_chunks_mut::<GROUP>();
    for ((x, u), out) in x.iter().zip(u).zip(out) {
        *out = group::<T, R>(x, scales, u, &mut saturated);
    }
    saturated.iter().fold(0u32, |total, lane| total.wrapping_add(*lane)) as usize
}
