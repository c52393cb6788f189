//! The defective variants of the Python system that temper replaces, kept only to reproduce its figures.
//!
//! `nvfp4_single_level`, blocks of 16: no tensor scale; the block scale amax / 6 is rounded to 3 mantissa bits, with
//! no subnormals (never below 2^-6, so small weights lose their low codes), a carry clamped to mantissa 1.875 and an
//! exponent of at most 8; E2M1 ties go toward zero.
//!
//! `half_away`: the tie rule of its MXFP4, away from zero. What it called 2-D were blocks of 1024 consecutive values;
//! the option `2d` is a true tile.

/// The scale of a block with amax `b`, and its byte (exponent + 7) << 3 | mantissa. Byte 0x7F is 480 here: this
/// variant has no NaN of its own.
pub fn single_level_scale(b: f32) -> (u8, f32) {
    let target = b / 6.0;
    let exponent = ((target.to_bits() >> 23) as i32 - 127).clamp(-6, 8);
    let power = f32::from_bits(((exponent + 127) as u32) << 23);
    let eighths = (target / power * 8.0).round_ties_even().clamp(8.0, 15.0);
    (((exponent + 7) as u8) << 3 | (eighths as u8 - 8), eighths * 0.125 * power)
}

/// E2M1 with every tie toward zero.
pub fn encode_ties_toward_zero(x: f32) -> u8 {
    let a = x.abs();
    let index = MIDPOINTS.iter().filter(|&&midpoint| a > midpoint).count() as u8;
    (x.is_sign_negative() as u8) << 3 | index
}

/// E2M1 with every tie away from zero; magnitudes above 6 saturate, NaN becomes +6.
pub fn encode_ties_away(x: f32) -> u8 {
    if x.is_nan() {
        return 7;
    }
    let a = x.abs();
    let index = MIDPOINTS.iter().filter(|&&midpoint| a >= midpoint).count() as u8;
    (x.is_sign_negative() as u8) << 3 | index
}

/// Halfway between neighbouring magnitudes of E2M1.
const MIDPOINTS: [f32; 7] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0];
