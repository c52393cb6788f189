//! The scale of a block from its largest magnitude b, and that of a tensor from its amax A (numerics.md section 2).
//!
//! mx     b = m * 2^e:  k = e - emax (+ 1 by rule), clamped to -127..127;  x * 2^-k;  value * 2^k
//! nvfp4  G = 2688 / A;  S = e4m3(min(b * (G * (1/6)), 448));  D = 1 / G;  x * E, E = min(1 / (S * D), f32 max);
//!        value * (S * D).  sr: G = (2688 * 16/17) / A and 17/96 for 1/6, so that no S rounded down lets b clip
//! nvfp4:4over6  G = 1536 / A;  S6 = e4m3(min(b * (G / 6), 448));  S4 = e4m3(min(1.5 * (b * (G / 6)), 448))
//! fp8    s = A / 448 (A of the row, or of the tensor);  x / s;  value * s
//!
//! All steps in f32, in the order written; constants are rounded to f32 once.

use super::format::{Family, Format, MxScaleRule};
use super::{e4m3, e8m0, original};

/// How a block's elements are scaled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockScale {
    /// What is stored: E8M0 (mx) or E4M3 (nvfp4); None in fp8, whose scale is an f32.
    pub byte: Option<u8>,
    pub encode: Encode,
    /// y = value(code) * decode.
    pub decode: f32,
}

/// From x to the scaled magnitude that is rounded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Encode {
    Times(f32),
    Over(f32),
}

impl Encode {
    pub fn apply(self, x: f32) -> f32 {
        match self {
            Encode::Times(factor) => x * factor,
            Encode::Over(scale) => x / scale,
        }
    }
}

/// The scale of a finite block with largest magnitude `b`, and for 4over6 the one to weigh it against (it wins where
/// its squared error is smaller). `tensor`: G for nvfp4, A for fp8:tensor, unused elsewhere.
pub fn block_scales(format: Format, b: f32, tensor: f32) -> (BlockScale, Option<BlockScale>) {
    match format.family {
        Family::Mxfp4 { rule } => (mx_scale(mx_exponent(b, rule)), None),
        Family::Mxfp8 { rule } => (mx_scale(mxfp8_exponent(b, rule)), None),
        Family::Nvfp4 { four_over_six: true } => {
            let target = b * (tensor / 6.0);
            let four = e4m3::encode((1.5 * target).min(e4m3::MAX));
            (nvfp4_scale(e4m3::encode(target.min(e4m3::MAX)), tensor), Some(nvfp4_scale(four, tensor)))
        }
        Family::Nvfp4 { four_over_six: false } if format.rounding.is_stochastic() => {
            (nvfp4_scale(e4m3::encode((b * (tensor * (17.0 / 96.0))).min(e4m3::MAX)), tensor), None)
        }
        Family::Nvfp4 { four_over_six: false } => (nvfp4_scale(nvfp4_block_scale(b, tensor), tensor), None),
        Family::Nvfp4SingleLevel => {
            let (byte, scale) = original::single_level_scale(b);
            (BlockScale { byte: Some(byte), encode: Encode::Over(scale), decode: scale }, None)
        }
        Family::Fp8 { per_tensor } => {
            let scale = fp8_scale(if per_tensor { tensor } else { b });
            (BlockScale { byte: None, encode: Encode::Over(scale), decode: scale }, None)
        }
    }
}

/// The byte of a block that holds NaN or infinity.
pub fn nonfinite_byte(format: Format) -> Option<u8> {
    match format.family {
        Family::Mxfp4 { .. } | Family::Mxfp8 { .. } => Some(e8m0::NAN),
        Family::Nvfp4 { .. } | Family::Nvfp4SingleLevel => Some(e4m3::NAN),
        Family::Fp8 { .. } => None,
    }
}

/// What `block_scales` wants of the tensor: G for nvfp4, A itself for fp8:tensor, 1 elsewhere.
pub fn tensor_scale(format: Format, amax: f32) -> f32 {
    match format.family {
        Family::Nvfp4 { four_over_six: true } => encode_scale(1536.0, amax),
        Family::Nvfp4 { .. } if format.rounding.is_stochastic() => encode_scale(43_008.0 / 17.0, amax),
        Family::Nvfp4 { .. } => tensor_encode_scale(amax),
        Family::Fp8 { per_tensor: true } => amax,
        _ => 1.0,
    }
}

/// G = 2688 / A, 2688 = 6 * 448: the multiplier that maps the tensor's amax to the largest block scale times the
/// largest code. Capped at the largest f32; 1 if A = 0.
pub fn tensor_encode_scale(amax: f32) -> f32 {
    encode_scale(2688.0, amax)
}

fn encode_scale(range: f32, amax: f32) -> f32 {
    if amax == 0.0 { 1.0 } else { (range / amax).min(f32::MAX) }
}

/// The E4M3 byte of an nvfp4 block's scale S, from its amax b and G.
pub fn nvfp4_block_scale(block_amax: f32, encode_scale: f32) -> u8 {
    e4m3::encode((block_amax * (encode_scale * (1.0 / 6.0))).min(e4m3::MAX))
}

/// S = 0 gives code 0 to every element; a factor of 0 does that and keeps the sign, so that -0 is kept.
fn nvfp4_scale(byte: u8, encode_scale: f32) -> BlockScale {
    let s = e4m3::decode(byte);
    let decode = s * (1.0 / encode_scale);
    let encode = if s == 0.0 { 0.0 } else { (1.0 / decode).min(f32::MAX) };
    BlockScale { byte: Some(byte), encode: Encode::Times(encode), decode }
}

/// The exponent k of an mxfp4 block's scale 2^k, from the bits of its amax. Zero and subnormal give -127.
pub fn mx_exponent(block_amax: f32, rule: MxScaleRule) -> i32 {
    shared_exponent(block_amax, rule, 2, 0x40_0000) // 6 = 1.5 * 2^2
}

/// `mx_exponent` of mxfp8.
pub fn mxfp8_exponent(block_amax: f32, rule: MxScaleRule) -> i32 {
    shared_exponent(block_amax, rule, 8, 0x60_0000) // 448 = 1.75 * 2^8
}

/// `emax` and `largest_mantissa` (bits): of the element's largest value.
fn shared_exponent(block_amax: f32, rule: MxScaleRule, emax: i32, largest_mantissa: u32) -> i32 {
    let bits = block_amax.to_bits();
    let (biased, mantissa) = ((bits >> 23) as i32, bits & 0x7F_FFFF);
    if biased == 0 {
        return -127;
    }
    let up = match rule {
        MxScaleRule::Floor => false,
        MxScaleRule::Even => mantissa >= 0x60_0000, // m >= 1.75
        MxScaleRule::Rceil => mantissa > largest_mantissa,
    };
    (biased - 127 - emax + up as i32).clamp(-127, 127)
}

fn mx_scale(k: i32) -> BlockScale {
    BlockScale { byte: Some(e8m0::encode(k)), encode: Encode::Times(e8m0::exp2(-k)), decode: e8m0::exp2(k) }
}

/// s = A / 448. 1 where that is 0: A = 0, or an A so small that the quotient rounds to it.
pub fn fp8_scale(amax: f32) -> f32 {
    let scale = amax / e4m3::MAX;
    if scale == 0.0 { 1.0 } else { scale }
}
