//! The scales of a row's blocks from their amaxes: numerics/block_scale.rs in arithmetic that vectorises.

use super::element::{Element, Word};
use super::rounders::e4m3_nearest_even;
use crate::numerics::e4m3;
use crate::numerics::format::{Format, MxScaleRule};
use crate::numerics::original;
use crate::ops::cpu::path::for_each_path;

/// How the blocks of 16 of a segment are scaled: x * encode (or x / encode), value * decode. A block that holds NaN or
/// infinity has scales of NaN and becomes NaN.
pub(super) struct Scales {
    pub encode: Vec<f32>,
    pub decode: Vec<f32>,
}

impl Scales {
    pub fn new(blocks: usize) -> Scales {
        Scales { encode: vec![0.0; blocks], decode: vec![0.0; blocks] }
    }
}

/// How an E4M3 block scale follows from b: S = e4m3(min(times * (factor * b), 448)), under G.
#[derive(Clone, Copy)]
pub(super) struct Nvfp4Scale {
    pub factor: f32,
    pub times: f32,
    pub g: f32,
}

impl Nvfp4Scale {
    /// Of nvfp4 without 4over6, nearest or stochastic, under G.
    pub fn of(format: Format, g: f32) -> Nvfp4Scale {
        let sixth = if format.rounding.is_stochastic() { 17.0 / 96.0 } else { 1.0 / 6.0 };
        Nvfp4Scale { factor: g * sixth, times: 1.0, g }
    }

    /// (E, S * D); E = 0 where S = 0.
    #[inline(always)]
    pub fn scales(self, amax: f32) -> (f32, f32) {
        let target = self.times * (amax * self.factor);
        let s = e4m3_nearest_even(if target > e4m3::MAX { e4m3::MAX } else { target });
        let decode = s * (1.0 / self.g);
        let encode = 1.0 / decode;
        let encode = if encode > f32::MAX { f32::MAX } else { encode };
        (if s == 0.0 { 0.0 } else { encode }, decode)
    }
}

/// (2^-k, 2^k) of a block with amax b, whose exponent k lies `emax` below that of b, or one above it where adding
/// `rounds_up` to b's bits carries.
#[inline(always)]
pub(super) fn mx_scales(amax: f32, emax: u32, rounds_up: u32) -> (f32, f32) {
    // A byte of 0 stands for 2^-127, which is subnormal in f32.
    let power = |byte: u32| f32::from_bits(if byte == 0 { 1 << 22 } else { byte << 23 });
    let byte = (amax.to_bits().wrapping_add(rounds_up) >> 23).saturating_sub(emax);
    (power(254u32.wrapping_sub(byte)), power(byte))
}

/// The carry into the exponent is the rule: never; from mantissa 1.75 on; above the mantissa of the element's maximum.
#[inline(always)]
pub(super) fn rounds_up(rule: MxScaleRule, largest_mantissa: u32) -> u32 {
    match rule {
        MxScaleRule::Floor => 0,
        MxScaleRule::Even => 0x20_0000,
        MxScaleRule::Rceil => 0x7F_FFFF - largest_mantissa,
    }
}

for_each_path! {
    pub(super) fn nvfp4<T: Element>(of: Nvfp4Scale, amaxes: &[T::Word], scales: &mut Scales) {
        each::<T>(amaxes, scales, |amax| of.scales(amax));
    }
}

for_each_path! {
    pub(super) fn single_level<T: Element>(amaxes: &[T::Word], scales: &mut Scales) {
        each::<T>(amaxes, scales, |amax| {
            let (_, scale) = original::single_level_scale(amax);
            (scale, scale)
        });
    }
}

#[inline(always)]
pub(super) fn each<T: Element>(amaxes: &[T::Word], scales: &mut Scales, of: impl Fn(f32) -> (f32, f32)) {
    for ((amax, encode), decode) in amaxes.iter().zip(&mut scales.encode).zip(&mut scales.decode) {
        let finite = *amax < T::Word::of(T::INFINITY);
        let (e, d) = of(if finite { T::of_word(*amax).read() } else { 0.0 });
        (*encode, *decode) = if finite { (e, d) } else { (f32::NAN, f32::NAN) };
    }
}
