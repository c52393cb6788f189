//! The element of a format: which codec, and which rounding into it.

use super::format::{Family, Format, Rounding};
use super::{e2m1, e4m3, original};

impl Format {
    /// The code of a scaled value; `u` in [0, 1) is what stochastic rounding drew.
    pub fn encode_element(self, scaled: f32, u: f32) -> u8 {
        match (self.has_e4m3_elements(), self.rounding) {
            _ if self.family == Family::Nvfp4SingleLevel => original::encode_ties_toward_zero(scaled),
            (false, Rounding::NearestEven) => e2m1::encode(scaled),
            (false, Rounding::HalfAway) => original::encode_ties_away(scaled),
            (false, Rounding::Stochastic16 | Rounding::Stochastic8) => e2m1::encode_stochastic(scaled, u),
            (true, Rounding::Stochastic16 | Rounding::Stochastic8) => e4m3::encode_stochastic(scaled, u),
            // The grammar knows half_away for mxfp4 alone.
            (true, Rounding::NearestEven | Rounding::HalfAway) => e4m3::encode(scaled),
        }
    }

    /// The value of a code.
    pub fn decode_element(self, code: u8) -> f32 {
        if self.has_e4m3_elements() { e4m3::decode(code) } else { e2m1::decode(code) }
    }

    /// The largest magnitude of an element: larger ones saturate.
    pub fn element_max(self) -> f32 {
        if self.has_e4m3_elements() { e4m3::MAX } else { e2m1::MAX }
    }

    /// Whether an element is an E4M3 byte; otherwise it is an E2M1 code.
    pub fn has_e4m3_elements(self) -> bool {
        matches!(self.family, Family::Mxfp8 { .. } | Family::Fp8 { .. })
    }
}
