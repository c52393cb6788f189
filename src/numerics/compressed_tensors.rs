//! NVFP4 as compressed-tensors computes it: another order of the same steps than block_scale.rs, and partly in the
//! tensor's own dtype. A = tensor amax, b = block amax, rn = rounding to that dtype (none in f32):
//!
//! G = rn(rn(1 / A) * 2688), 1 where that is not finite;  S = e4m3(min(G * rn(b / 6), 448)), 0.125 where that is 0;
//! code = e2m1(x / (S / G)), where a zero of either sign is code 0
//!
//! Source: compressed-tensors 0.20, `generate_gparam`, `calculate_qparams`, `quantize`, `cast_to_fp4`. bf16 with an f32 G
//! is promoted to f32, so only G's own steps and b / 6 are rounded to bf16.

use half::{bf16, f16};

use super::{e2m1, e4m3};

/// The dtype in which the scales are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleDtype {
    F32,
    Bf16,
    F16,
}

impl ScaleDtype {
    fn round(self, x: f32) -> f32 {
        match self {
            ScaleDtype::F32 => x,
            ScaleDtype::Bf16 => bf16::from_f32(x).to_f32(),
            ScaleDtype::F16 => f16::from_f32(x).to_f32(),
        }
    }

    fn smallest_normal(self) -> f32 {
        match self {
            ScaleDtype::F32 | ScaleDtype::Bf16 => f32::MIN_POSITIVE,
            ScaleDtype::F16 => f16::MIN_POSITIVE.to_f32(),
        }
    }
}

/// G from the tensor's amax.
pub fn tensor_encode_scale(amax: f32, dtype: ScaleDtype) -> f32 {
    let reciprocal = dtype.round(1.0 / amax.max(dtype.smallest_normal()));
    let scale = dtype.round(reciprocal * 2688.0);
    if scale.is_finite() { scale } else { 1.0 }
}

/// The E4M3 byte of S from the block's amax.
pub fn block_scale(block_amax: f32, encode_scale: f32, dtype: ScaleDtype) -> u8 {
    const EIGHTH: u8 = 0x20;
    let byte = e4m3::encode((encode_scale * dtype.round(block_amax / 6.0)).min(e4m3::MAX));
    if byte == 0 { EIGHTH } else { byte }
}

/// The E2M1 code of x in a block of scale `byte`.
pub fn code(x: f32, byte: u8, encode_scale: f32) -> u8 {
    let scaled = x / (e4m3::decode(byte) / encode_scale);
    if scaled == 0.0 { 0 } else { e2m1::encode(scaled) }
}

/// Codes [n], one a byte, and E4M3 bytes [n / 16] of the blocks of 16 in x [n].
pub fn quantize(x: &[f32], encode_scale: f32, dtype: ScaleDtype) -> (Vec<u8>, Vec<u8>) {
    let scales: Vec<u8> = x
        .chunks(16)
        .map(|block| block_scale(block.iter().fold(0.0, |a: f32, v| a.max(v.abs())), encode_scale, dtype))
        .collect();
    let coded =
        x.chunks(16).zip(&scales).flat_map(|(block, &byte)| block.iter().map(move |&x| code(x, byte, encode_scale)));
    (coded.collect(), scales)
}
