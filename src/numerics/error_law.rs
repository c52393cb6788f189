//! How an error of scale s enters a clean matrix product y, z ~ N(0, 1), in f32 (numerics.md section 4):
//!
//! relative_gaussian  y' = fma(|y|, RN(s z), y)
//! absolute_gaussian  y' = RN(y + RN(s z))
//! systematic_bias    y' = y + s sign(y), sign(0) = 0
//!
//! The bias is added afterwards and the result rounded once to the output dtype.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorLaw {
    #[default]
    RelativeGaussian,
    AbsoluteGaussian,
    SystematicBias,
}

impl ErrorLaw {
    /// y' of one element, the definition. `#[inline(always)]`: compiled with the fma target feature it is one
    /// instruction, elsewhere a (slow, equal) library call.
    #[inline(always)]
    pub fn apply(self, y: f32, s: f32, z: f32) -> f32 {
        match self {
            ErrorLaw::RelativeGaussian => y.abs().mul_add(s * z, y),
            ErrorLaw::AbsoluteGaussian => y + s * z,
            ErrorLaw::SystematicBias => y + s * if y == 0.0 { y } else { 1f32.copysign(y) },
        }
    }

    /// Whether the law draws normals.
    pub fn is_random(self) -> bool {
        self != ErrorLaw::SystematicBias
    }
}

/// What was measured where noise was added, over rounded outputs: error = round(y' + b) - round(y + b), clean = y.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct NoiseSums {
    /// Sum of error^2.
    pub error_sq: f64,
    /// Sum of y^2.
    pub clean_sq: f64,
    /// Sum of y^4, for the standard error of `relative_std`.
    pub clean_fourth: f64,
    pub elements: u64,
}

impl NoiseSums {
    /// From what a kernel adds up: error, error^2, y^2, y^4, elements.
    pub fn of_device([_, error_sq, clean_sq, clean_fourth, elements]: [f64; 5]) -> NoiseSums {
        NoiseSums { error_sq, clean_sq, clean_fourth, elements: elements as u64 }
    }

    /// Adds the sums of another part.
    pub fn merge(&mut self, other: &NoiseSums) {
        self.error_sq += other.error_sq;
        self.clean_sq += other.clean_sq;
        self.clean_fourth += other.clean_fourth;
        self.elements += other.elements;
    }

    /// The measured relative standard deviation sqrt(sum error^2 / sum y^2); 0 for a product that is all zero.
    pub fn relative_std(&self) -> f64 {
        if self.clean_sq > 0.0 { (self.error_sq / self.clean_sq).sqrt() } else { 0.0 }
    }

    /// Standard error of `relative_std` under relative noise of scale s: s sqrt(sum y^4 / 2) / sum y^2.
    pub fn relative_std_error(&self, s: f64) -> f64 {
        if self.clean_sq > 0.0 { s * (self.clean_fourth / 2.0).sqrt() / self.clean_sq } else { 0.0 }
    }
}
