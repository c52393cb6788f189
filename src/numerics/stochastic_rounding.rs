//! Stochastic rounding: t = |x| + u * step(|x|), then down to the element grid; u in [0, 1) from 16 random bits, or 8.
//!
//! |x| is the scaled magnitude, step(|x|) the distance of its two neighbours on the grid. Unbiased where nothing clips
//! and u is continuous: 16 bits leave a bias below 2^-16 of a step, 8 bits (`cvt.rs`, gfloat's StochasticFastest) one
//! below 2^-8. u of element (row, column) is the uniform of numerics.md section 4a under the row's key, kind U16 (or
//! U8) of n = column, purpose 5; a weight row's key is update number << 32 | row, an activation's its token key.

use super::format::Rounding;
use super::generator::{uniform_u8, uniform_u16};

/// Where the random bits of a matrix come from.
#[derive(Clone, Copy, Debug)]
pub struct RoundingDraw<'a> {
    pub seed: u64,
    /// `noise_key::stream` with purpose `StochasticRounding`.
    pub stream: u32,
    pub row_keys: &'a [u64], // [rows]
}

impl RoundingDraw<'_> {
    /// u of element (row, col); 0 for a rounding that draws nothing.
    pub fn uniform(&self, rounding: Rounding, row: usize, col: usize) -> f32 {
        let (key, n) = (self.row_keys[row], col as u32);
        match rounding {
            Rounding::Stochastic16 => uniform_u16(self.seed, self.stream, key, n) as f32 / 65_536.0,
            Rounding::Stochastic8 => uniform_u8(self.seed, self.stream, key, n) as f32 / 256.0,
            Rounding::NearestEven | Rounding::HalfAway => 0.0,
        }
    }
}
