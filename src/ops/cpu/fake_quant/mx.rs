//! MXFP4 and MXFP8 on the bits of x, in lanes as wide as x: bf16 -> bf16 (16 bits), f32 -> f32 (32 bits); blocks of 32.
//!
//! With B = the bits of 2^k and m = those of |x|, the order of magnitudes is the order of bits, and a scaled magnitude
//! a = |x| 2^-k lies below a bound c where m lies below the bits of c 2^k, which are B plus a constant. So where the
//! element is normal (a >= 1 in E2M1, a >= 2^-6 in E4M3), y is m rounded to the element's mantissa bits, at most its
//! largest value times 2^k: no element is widened and nothing is multiplied. Below, E2M1 has two values, 0 and 2^k / 2,
//! which comparisons find. Blocks with smaller elements of E4M3, which are rare, those with NaN or infinity, and those
//! whose bounds are not normal numbers take the general steps of lanes.rs.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use super::amaxes_x86;
use super::element::{Element, UNIT, Word};
use super::lanes::unit;
use super::rounders::{self, Rounder};
use super::scales::{mx_scales, rounds_up};
use crate::numerics::format::MxScaleRule;
use crate::ops::cpu::path::{Path, for_each_path};

const BLOCK: usize = UNIT;

/// A rounding of blocks.
pub(super) trait MxRounding {
    /// The exponent of the element's largest value, and its mantissa of 23 bits.
    const LARGEST: (u32, u32);
    /// The smallest exponent field of an amax for which every bound is a normal number by any rule.
    const LEAST_EXPONENT: u32;
    /// The general steps.
    type General: Rounder;
    /// y of a block of finite values, and 1 added to `above` where |x| exceeds the largest value times 2^k; or false, where
    /// the general steps have to be taken. `power`: the bits of 2^(k + exponent of the largest value).
    fn block<T: Element>(
        x: &[T; BLOCK],
        power: T::Word,
        uniforms: &[u16; BLOCK],
        out: &mut [T; BLOCK],
        above: &mut [T::Word; BLOCK],
    ) -> bool;
}

pub(super) struct E2m1<const HALF_AWAY: bool>;
pub(super) struct E2m1Stochastic;
pub(super) struct E4m3;
pub(super) struct E4m3Stochastic;

const E2M1: (u32, u32) = (2, 0x40_0000); // 6 = 1.5 * 2^2
const E4M3: (u32, u32) = (8, 0x60_0000); // 448 = 1.75 * 2^8

/// y of whole blocks, each under its amax, known or found on the way: the loop that writes is the one that reads memory
/// best. (Blocks with NaN or infinity, saturated elements.) `uniforms` [cols] in units of 2^-16, used where the rounding
/// draws.
pub(super) fn row<T: Element, R: MxRounding>(
    path: Path,
    x: &[T],
    known: Option<&[T::Word]>,
    rule: MxScaleRule,
    uniforms: &[u16],
    out: &mut [T],
) -> (usize, usize) {
    if let Some(known) = known {
        return blocks::<T, R, Known>(path, x, known, rule, uniforms, out);
    }
    #[cfg(target_arch = "x86_64")]
    if path.or_below() >= Path::Avx2 {
        return blocks::<T, R, FoundByAvx2>(path, x, &[], rule, uniforms, out);
    }
    blocks::<T, R, Found>(path, x, &[], rule, uniforms, out)
}

/// Where amaxes come from. Whether a loop over a block becomes vectors depends on what is around it, so there is code for it.
trait Amaxes {
    fn of_block<T: Element>(x: &[T; BLOCK], number: usize, known: &[T::Word]) -> T::Word;
}

struct Known;
struct Found;
/// For paths that have AVX2.
#[cfg(target_arch = "x86_64")]
struct FoundByAvx2;

impl Amaxes for Known {
    #[inline(always)]
    fn of_block<T: Element>(_: &[T; BLOCK], number: usize, known: &[T::Word]) -> T::Word {
        known[number]
    }
}

impl Amaxes for Found {
    #[inline(always)]
    fn of_block<T: Element>(x: &[T; BLOCK], _: usize, _: &[T::Word]) -> T::Word {
        x.iter().fold(T::Word::ZERO, |amax, x| amax.max(x.magnitude()))
    }
}

#[cfg(target_arch = "x86_64")]
impl Amaxes for FoundByAvx2 {
    #[inline(always)]
    fn of_block<T: Element>(x: &[T; BLOCK], _: usize, _: &[T::Word]) -> T::Word {
        // SAFETY: `row` alone names this type, where or_below says that the CPU has AVX2.
        unsafe { amaxes_x86::of_block(x) }
    }
}

for_each_path! {
    fn blocks<T: Element, R: MxRounding, A: Amaxes>(
        x: &[T],
        known: &[T::Word],
        rule: MxScaleRule,
        uniforms: &[u16],
        out: &mut [T],
    ) -> (usize, usize) {
        let blocks = x.as_chunks::<BLOCK>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0);
        let (mut nonfinite, mut saturated, mut number) = (0usize, 0usize, 0usize);
        let mut lanes = [T::Word::ZERO; BLOCK];
        for ((x, out), u) in blocks.zip(uniforms.as_chunks::<BLOCK>().0) {
            let amax = A::of_block(x, number, known);
            number = number.wrapping_add(1);
            nonfinite = nonfinite.wrapping_add((amax >= T::Word::of(T::INFINITY)) as usize);
            saturated = saturated.wrapping_add(block::<T, R>(x, amax, rule, u, out, &mut lanes));
        }
        (nonfinite, saturated.wrapping_add(sum::<T>(&lanes)))
    }
}

#[inline(always)]
fn sum<T: Element>(lanes: &[T::Word; BLOCK]) -> usize {
    lanes.iter().fold(0, |total, lane| total.wrapping_add(lane.to_usize()))
}

/// Returns what saturated in a block that took the general steps; the lanes count the rest.
#[inline(always)]
fn block<T: Element, R: MxRounding>(
    x: &[T; BLOCK],
    amax: T::Word,
    rule: MxScaleRule,
    uniforms: &[u16; BLOCK],
    out: &mut [T; BLOCK],
    lanes: &mut [T::Word; BLOCK],
) -> usize {
    let (_, largest_mantissa) = R::LARGEST;
    if amax >= T::Word::of(R::LEAST_EXPONENT << T::MANTISSA_BITS) && amax < T::Word::of(T::INFINITY) {
        let carries = rounds_up(rule, largest_mantissa) >> (23 - T::MANTISSA_BITS);
        let power = amax.plus(T::Word::of(carries)) & T::Word::of(T::INFINITY);
        if R::block(x, power, uniforms, out, lanes) {
            return 0;
        }
    }
    any_block::<T, R>(x, amax, rule, uniforms, out)
}

/// `m` rounded to its upper `kept` mantissa bits: to nearest, ties to even or away from zero.
#[inline(always)]
fn rounded<T: Element>(m: T::Word, kept: u32, half_away: bool) -> T::Word {
    let dropped = T::MANTISSA_BITS - kept;
    let half = T::Word::of(1 << (dropped - 1));
    let up = if half_away { half } else { half.minus(T::Word::of(1)).plus(m.shifted_right(dropped) & T::Word::of(1)) };
    m.plus(up) & T::Word::of(T::MAGNITUDE_BITS << dropped)
}

/// `m` plus u units of what it has above its upper `kept` mantissa bits: exact, but that parts of 2^-16 of them are cut.
#[inline(always)]
fn raised<T: Element>(m: T::Word, kept: u32, uniform: u16) -> T::Word {
    let (uniform, dropped) = (u32::from(uniform), T::MANTISSA_BITS - kept);
    m.plus(T::Word::of(if dropped > 16 { uniform << (dropped - 16) } else { uniform >> (16 - dropped) }))
}

impl<const HALF_AWAY: bool> MxRounding for E2m1<HALF_AWAY> {
    const LARGEST: (u32, u32) = E2M1;
    const LEAST_EXPONENT: u32 = 5;
    type General = rounders::E2m1<HALF_AWAY>;

    /// y = 0 (a <= 1/4), 2^k / 2 (a < 3/4), 2^k (a < 1), 6 2^k (a > 6), else m rounded to one mantissa bit; half away,
    /// 1/4 goes up.
    #[inline(always)]
    fn block<T: Element>(
        x: &[T; BLOCK],
        power: T::Word,
        _: &[u16; BLOCK],
        out: &mut [T; BLOCK],
        above: &mut [T::Word; BLOCK],
    ) -> bool {
        let m = T::MANTISSA_BITS;
        let one = power.minus(T::Word::of(2 << m)); // 2^k
        let six = power.plus(T::Word::of(1 << (m - 1))); // 1.5 * 2^(k+2)
        let (three_quarters, half, quarter) =
            (one.minus(T::Word::of(1 << (m - 1))), one.minus(T::Word::of(1 << m)), one.minus(T::Word::of(2 << m)));
        let last_zero = if HALF_AWAY { quarter.minus(T::Word::of(1)) } else { quarter };
        for i in 0..BLOCK {
            let a = x[i].magnitude();
            above[i] = above[i].plus(if six.is_below(a) { T::Word::of(1) } else { T::Word::ZERO });
            let from_one = rounded::<T>(a, 1, HALF_AWAY).min(six).max(one);
            let below = if last_zero.is_below(a) { half } else { T::Word::ZERO };
            let y = if a.is_below(three_quarters) { below } else { from_one };
            out[i] = T::of_word(y | x[i].sign());
        }
        true
    }
}

impl MxRounding for E2m1Stochastic {
    const LARGEST: (u32, u32) = E2M1;
    const LEAST_EXPONENT: u32 = 30;
    type General = rounders::E2m1Stochastic;

    /// Down from a + u step. Below 2^k the step is 2^k / 2 and the sum that of the definition, of which bf16 needs the
    /// upper half; from there the sum is one of bits.
    #[inline(always)]
    fn block<T: Element>(
        x: &[T; BLOCK],
        power: T::Word,
        uniforms: &[u16; BLOCK],
        out: &mut [T; BLOCK],
        _: &mut [T::Word; BLOCK],
    ) -> bool {
        let m = T::MANTISSA_BITS;
        let one = power.minus(T::Word::of(2 << m)); // 2^k
        let half = one.minus(T::Word::of(1 << m));
        let unit = T::of_word(half).read() * (1.0 / 65_536.0);
        let (mut small, u) = (T::words(x), T::uniform_words(uniforms));
        for (word, u) in small.as_mut().iter_mut().zip(u.as_ref()) {
            *word = T::map_and_cut(*word, *u, |a, u| a + u as i32 as f32 * unit);
        }
        let small = T::of_words(small);
        for i in 0..BLOCK {
            let a = x[i].magnitude();
            let (small, large) = (small[i].word(), raised::<T>(a, 1, uniforms[i]));
            let target = if a.is_below(one) { small } else { large };
            let below = if target.is_below(half) { T::Word::ZERO } else { half };
            let cut = target & T::Word::of(T::MAGNITUDE_BITS << (m - 1));
            let y = if target.is_below(one) { below } else { cut };
            out[i] = T::of_word(y | x[i].sign());
        }
        true
    }
}

/// Whether an element is not zero and less than 2^-6 2^k, `power` = the bits of 2^(k+8).
#[inline(always)]
fn has_subnormal_e4m3<T: Element>(x: &[T; BLOCK], power: T::Word) -> bool {
    let last = power.minus(T::Word::of((14 << T::MANTISSA_BITS) + 2));
    let mut subnormal = T::Word::ZERO;
    for value in x {
        // Zero becomes the largest.
        let less_one = value.magnitude().minus(T::Word::of(1));
        subnormal = subnormal | if less_one <= last { T::Word::of(1) } else { T::Word::ZERO };
    }
    subnormal != T::Word::ZERO
}

impl MxRounding for E4m3 {
    const LARGEST: (u32, u32) = E4M3;
    const LEAST_EXPONENT: u32 = 20;
    type General = rounders::E4m3;

    #[inline(always)]
    fn block<T: Element>(
        x: &[T; BLOCK],
        power: T::Word,
        _: &[u16; BLOCK],
        out: &mut [T; BLOCK],
        above: &mut [T::Word; BLOCK],
    ) -> bool {
        if has_subnormal_e4m3(x, power) {
            return false;
        }
        let largest = power.plus(T::Word::of(3 << (T::MANTISSA_BITS - 2)));
        for i in 0..BLOCK {
            let a = x[i].magnitude();
            above[i] = above[i].plus(if largest.is_below(a) { T::Word::of(1) } else { T::Word::ZERO });
            out[i] = T::of_word(rounded::<T>(a, 3, false).min(largest) | x[i].sign());
        }
        true
    }
}

impl MxRounding for E4m3Stochastic {
    const LARGEST: (u32, u32) = E4M3;
    const LEAST_EXPONENT: u32 = 20;
    type General = rounders::E4m3Stochastic;

    /// The rule rceil lets no element exceed the largest value, nor then a sum less than a step above it.
    #[inline(always)]
    fn block<T: Element>(
        x: &[T; BLOCK],
        power: T::Word,
        uniforms: &[u16; BLOCK],
        out: &mut [T; BLOCK],
        _: &mut [T::Word; BLOCK],
    ) -> bool {
        if has_subnormal_e4m3(x, power) {
            return false;
        }
        let kept = T::Word::of(T::MAGNITUDE_BITS << (T::MANTISSA_BITS - 3));
        for i in 0..BLOCK {
            let y = raised::<T>(x[i].magnitude(), 3, uniforms[i]) & kept;
            out[i] = T::of_word(y | x[i].sign());
        }
        true
    }
}

/// Any block, by the general steps; how many elements saturated.
#[cold]
fn any_block<T: Element, R: MxRounding>(
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
    let (exponent, mantissa) = R::LARGEST;
    let (encode, decode) = mx_scales(T::of_word(amax).read(), exponent, rounds_up(rule, mantissa));
    let mut saturated = [0; UNIT];
    *out = unit::<T, R::General>(x, [encode; 2], [decode; 2], uniforms, &mut saturated);
    saturated.iter().fold(0u32, |total, lane| total.wrapping_add(*lane)) as usize
}
