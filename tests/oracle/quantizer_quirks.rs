//! Where a library departs from the rule that it follows elsewhere: each by name and by the condition that detects it.
//! (Found by these comparisons with compressed-tensors 0.20.0 and torchao 0.18.0 on a CPU.)

use temper::numerics::format::{Family, Format};
use temper::numerics::{e4m3, e8m0};

/// What a comparison knows of a block.
pub struct Block<'a> {
    pub values: &'a [f32],
    /// The stored scale byte (E8M0 or E4M3), if the format has one.
    pub byte: Option<u8>,
    /// nvfp4's G.
    pub tensor_encode_scale: f32,
}

impl Block<'_> {
    fn amax(&self) -> f32 {
        self.values.iter().fold(0f32, |a, v| a.max(v.abs()))
    }

    fn mantissa(&self) -> u32 {
        self.amax().to_bits() & 0x7F_FFFF
    }
}

/// The quirk of `rule` that may show in the whole block.
pub fn of_block(rule: &str, format: Format, block: &Block) -> Option<&'static str> {
    let finite = block.values.iter().all(|v| v.is_finite());
    let (library, rule) = rule.split_once('.').unwrap();
    let mx = matches!(format.family, Family::Mxfp4 { .. } | Family::Mxfp8 { .. });
    match library {
        "torchao" if mx && block.values.iter().any(|v| v.is_infinite()) && !block.values.iter().any(|v| v.is_nan()) => {
            Some("an infinity is a large number, not a NaN block")
        }
        "compressed_tensors" if mx && !finite => Some("the scale of a NaN or infinite amax is arbitrary"),
        _ if !finite => None,
        "torchao" if mx && block.byte == Some(e8m0::encode(-127)) => {
            Some("scale byte 0 encodes by 2^-126 (rceil: by 1), not by 2^-127")
        }
        // log2 in f32 is an integer for quotients just above a power of two.
        "torchao" if rule == "mxfp4_rceil" && (0x40_0001..0x40_0100).contains(&block.mantissa()) => {
            Some("rceil takes log2 in f32, which drops an excess of a few ulps")
        }
        "torchao" if rule == "mxfp8_rceil" && (0x60_0001..0x60_0100).contains(&block.mantissa()) => {
            Some("rceil takes log2 in f32, which drops an excess of a few ulps")
        }
        "torchao" if rule == "mxfp8_even" && (0x60_0000..0x78_0000).contains(&block.mantissa()) => {
            Some("mxfp8 even goes up from 1.9375, numerics.md and compressed-tensors from 1.75")
        }
        "compressed_tensors" if mx && block.amax() >= 1.75 * 2f32.powi(127) => {
            Some("rounding amax up at the largest exponent gives an infinite scale")
        }
        "torchao" if rule.starts_with("fp8") && block.amax() == 0.0 => Some("a zero amax gives 0/0"),
        "compressed_tensors" if rule.starts_with("fp8") && block.amax() == 0.0 => {
            Some("a zero amax has scale epsilon, not 1 (values are 0 all the same)")
        }
        "torchao" if rule == "nvfp4" && block.byte.is_some_and(|byte| e4m3::decode(byte) <= 1.0 / 64.0) => {
            Some("block scales are not below 2^-6")
        }
        "compressed_tensors" if rule == "nvfp4" && block.byte == Some(0) => {
            Some("a zero block scale becomes an epsilon")
        }
        _ if rule == "nvfp4" && near_e4m3_tie(f64::from(block.amax()) * f64::from(block.tensor_encode_scale) / 6.0) => {
            Some("the block scale is within 2^-20 of a tie: another order of the f32 factors decides it")
        }
        _ => None,
    }
}

/// The quirk of `rule` that may show in one element of a block without quirk.
pub fn of_element(rule: &str, x: f32, block: &Block) -> Option<&'static str> {
    let s = e4m3::decode(block.byte?);
    let scaled = f64::from(x.abs()) * f64::from(block.tensor_encode_scale) / f64::from(s);
    let ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0];
    let tied = ties.iter().any(|tie| (scaled - tie).abs() <= tie * 2f64.powi(-20));
    (rule.ends_with(".nvfp4") && tied)
        .then_some("the element is within 2^-20 of a tie: another order of the f32 factors decides it")
}

fn near_e4m3_tie(value: f64) -> bool {
    let ties = (0..0x7E).map(|byte| f64::from(e4m3::decode(byte) + e4m3::decode(byte + 1)) / 2.0);
    ties.into_iter().any(|tie| (value - tie).abs() <= tie * 2f64.powi(-20))
}
