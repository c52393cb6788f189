//! NVFP4 as NVIDIA's ModelOpt computes it, whose tensor scale is stored as a divisor. A = tensor amax, b = block amax:
//!
//! D = A / 2688;  S = e4m3(max(b / (6 D), 2^-9)), 1 where b = 0;  code = e2m1(x / (S D)), where a zero of either sign is
//! code 0
//!
//! All in f32, whatever the tensor's dtype. Source: Model-Optimizer, `nvfp4_tensor.py` (get_weights_scaling_factor,
//! quantize, _cast_fp4).

use super::{e2m1, e4m3};

/// D, ModelOpt's weight_scale_2.
pub fn tensor_decode_scale(amax: f32) -> f32 {
    amax / 2688.0
}

/// The E4M3 byte of S from the block's amax.
pub fn block_scale(block_amax: f32, decode_scale: f32) -> u8 {
    const SMALLEST: f32 = 1.0 / 512.0;
    let scale = block_amax / (6.0 * decode_scale);
    e4m3::encode(if scale == 0.0 { 1.0 } else { scale.max(SMALLEST) })
}

/// Codes [n], one a byte, and E4M3 bytes [n / 16] of the blocks of 16 in x [n].
pub fn quantize(x: &[f32], decode_scale: f32) -> (Vec<u8>, Vec<u8>) {
    let (mut codes, mut scales) = (Vec::with_capacity(x.len()), Vec::with_capacity(x.len() / 16));
    for block in x.chunks(16) {
        let byte = block_scale(block.iter().fold(0.0, |a: f32, v| a.max(v.abs())), decode_scale);
        let divisor = e4m3::decode(byte) * decode_scale;
        scales.push(byte);
        codes.extend(block.iter().map(|&x| match x / divisor {
            0.0 => 0,
            scaled => e2m1::encode(scaled),
        }));
    }
    (codes, scales)
}
