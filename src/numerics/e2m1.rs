//! E2M1, the 4-bit float of MXFP4 and NVFP4: code = sign << 3 | index into {0, .5, 1, 1.5, 2, 3, 4, 6}.
//!
//! Rounding is to nearest, ties to the even index; magnitudes above 6 saturate; NaN becomes +6. This is what PTX
//! `cvt.rn.satfinite.e2m1x2` does (OCP Microscaling Formats 1.0, section 5.3.3).

/// The eight magnitudes, by index.
pub const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// Largest magnitude.
pub const MAX: f32 = 6.0;

/// The code of `x`: sign << 3 | index. -0 and negative values that round to zero get code 8.
pub fn encode(x: f32) -> u8 {
    if x.is_nan() {
        return 7;
    }
    let a = x.abs();
    // Each bound is the midpoint of two neighbours; a tie goes to the even index, so the bound is inclusive
    // exactly where the lower index is odd.
    let index = (a > 0.25) as u8
        + (a >= 0.75) as u8
        + (a > 1.25) as u8
        + (a >= 1.75) as u8
        + (a > 2.5) as u8
        + (a >= 3.5) as u8
        + (a > 5.0) as u8;
    (x.is_sign_negative() as u8) << 3 | index
}

/// The code of `x` rounded stochastically by `u` in [0, 1): the largest magnitude not above |x| + u * step, step the
/// distance of |x|'s neighbours. NaN gives +6, as in `encode`.
pub fn encode_stochastic(x: f32, u: f32) -> u8 {
    if x.is_nan() {
        return 7;
    }
    let a = x.abs().min(MAX);
    let step = match a {
        a if a < 2.0 => 0.5,
        a if a < 4.0 => 1.0,
        _ => 2.0,
    };
    let target = a + u * step;
    let index = MAGNITUDES.iter().filter(|magnitude| **magnitude <= target).count() as u8 - 1;
    (x.is_sign_negative() as u8) << 3 | index
}

/// The value of a code (its low four bits).
pub fn decode(code: u8) -> f32 {
    let magnitude = MAGNITUDES[(code & 7) as usize];
    if code & 8 != 0 { -magnitude } else { magnitude }
}
