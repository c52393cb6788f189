//! 4-bit matrices as checkpoints store them, and the values that a reader gets from them.
//!
//! codes [rows, cols / 2] u8: byte j = code(2j) | code(2j + 1) << 4;  block scales [rows, cols / block] u8.
//! mxfp4   block 32, scale E8M0:  w = value(code) * 2^(byte - 127), exact
//! nvfp4   block 16, scale E4M3 S, under one f32 of the tensor:
//!         G stored (compressed-tensors, weight_global_scale):  w = value(code) * (S / G)
//!         1/G stored as D (ModelOpt, weight_scale_2):          w = value(code) * (S * D)
//!
//! In f32, in the order written; the reader rounds w once. The stored scales are used as stored. Fake quantization
//! (block_format.rs) multiplies by S * (1/G) instead: its f32 values may differ in the last place.

use super::format::{Family, Format};
use super::{e2m1, e4m3, e8m0};

/// Which of the two layouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PackedKind {
    Nvfp4,
    Mxfp4,
}

impl PackedKind {
    /// The layout that holds the codes and scales of `format` exactly; None where there is none (8-bit elements, or the
    /// original's variant without a tensor scale).
    pub fn of(format: Format) -> Option<PackedKind> {
        match format.family {
            Family::Nvfp4 { .. } => Some(PackedKind::Nvfp4),
            Family::Mxfp4 { .. } => Some(PackedKind::Mxfp4),
            Family::Mxfp8 { .. } | Family::Fp8 { .. } | Family::Nvfp4SingleLevel => None,
        }
    }

    /// Elements that share a block scale.
    pub fn block_size(self) -> usize {
        match self {
            PackedKind::Nvfp4 => 16,
            PackedKind::Mxfp4 => 32,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            PackedKind::Nvfp4 => "nvfp4",
            PackedKind::Mxfp4 => "mxfp4",
        }
    }
}

/// What turns a block's byte into the factor of its values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum StoredScale {
    /// E8M0 bytes alone.
    PowerOfTwo,
    /// E4M3 bytes over G.
    OverEncode(f32),
    /// E4M3 bytes times D = 1/G.
    TimesDecode(f32),
}

impl StoredScale {
    pub fn factor(self, byte: u8) -> f32 {
        match self {
            StoredScale::PowerOfTwo => e8m0::decode(byte),
            StoredScale::OverEncode(encode_scale) => e4m3::decode(byte) / encode_scale,
            StoredScale::TimesDecode(decode_scale) => e4m3::decode(byte) * decode_scale,
        }
    }
}

impl StoredScale {
    /// G; 1 where there is none.
    pub fn encode_scale(self) -> f32 {
        match self {
            StoredScale::PowerOfTwo => 1.0,
            StoredScale::OverEncode(encode_scale) => encode_scale,
            StoredScale::TimesDecode(decode_scale) => 1.0 / decode_scale,
        }
    }

    /// D = 1/G; 1 where there is none.
    pub fn decode_scale(self) -> f32 {
        match self {
            StoredScale::TimesDecode(decode_scale) => decode_scale,
            other => 1.0 / other.encode_scale(),
        }
    }

    /// Whether both name the same tensor scale, each as it is stored.
    pub fn agrees(self, stored: StoredScale) -> bool {
        match stored {
            StoredScale::PowerOfTwo => true,
            StoredScale::OverEncode(stored) => stored == self.encode_scale(),
            StoredScale::TimesDecode(stored) => stored == self.decode_scale(),
        }
    }
}

/// Two codes a byte, the first in the low half. `codes` holds an even number.
pub fn pack_codes(codes: &[u8]) -> Vec<u8> {
    codes.as_chunks::<2>().0.iter().map(|[low, high]| (low & 15) | high << 4).collect()
}

/// The values of whole rows of blocks: `codes` two a byte, a byte of `scales` for every `block` values of `out`.
pub fn dequantize(codes: &[u8], scales: &[u8], scale: StoredScale, block: usize, out: &mut [f32]) {
    let values: [f32; 16] = std::array::from_fn(|code| e2m1::decode(code as u8));
    let factors: [f32; 256] = std::array::from_fn(|byte| scale.factor(byte as u8));
    for ((out, codes), &byte) in out.chunks_mut(block).zip(codes.chunks(block / 2)).zip(scales) {
        let factor = factors[byte as usize];
        for (pair, &byte) in out.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
            *pair = [values[(byte & 15) as usize] * factor, values[(byte >> 4) as usize] * factor];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_of_codes_comes_back() {
        let codes: Vec<u8> = (0..=255u8).flat_map(|byte| [byte & 15, byte >> 4]).collect();
        let packed = pack_codes(&codes);
        assert!(packed.iter().enumerate().all(|(i, &byte)| byte as usize == i));
        let mut values = vec![0.0; 512];
        dequantize(&packed, &[0x38; 32], StoredScale::OverEncode(4.0), 16, &mut values);
        for (&value, &code) in values.iter().zip(&codes) {
            assert_eq!(value.to_bits(), (e2m1::decode(code) * 0.25).to_bits());
        }
    }
}
