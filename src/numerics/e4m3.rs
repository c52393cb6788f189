//! E4M3 (the "fn" variant: no infinity, one NaN per sign), the block scale of NVFP4 and the element of MXFP8 and FP8:
//! bias 7, 3 mantissa bits, maximum 448, subnormals down to 2^-9 (Micikevicius et al., "FP8 Formats for Deep Learning", 2022).

/// Largest finite value.
pub const MAX: f32 = 448.0;

/// The byte of NaN.
pub const NAN: u8 = 0x7F;

const SMALLEST_NORMAL: f32 = 1.0 / 64.0;

/// The byte of `x`, rounded to nearest, ties to even, clamped to +-448 *before* the rounding; NaN gives 0x7F.
pub fn encode(x: f32) -> u8 {
    if x.is_nan() {
        return NAN;
    }
    let a = x.abs().min(MAX);
    let magnitude = if a < SMALLEST_NORMAL {
        // A multiple of 2^-9; 8 of them are the smallest normal, whose byte is 8 as well.
        (a * 512.0).round_ties_even() as u8
    } else {
        let exponent = (a.to_bits() >> 23) as i32 - 127;
        let eighths = (a * exp2i(3 - exponent)).round_ties_even() as i32; // 8..=16
        // A carry to 16 moves into the exponent field by plain addition.
        ((exponent + 7) * 8 + eighths - 8) as u8
    };
    (x.is_sign_negative() as u8) << 7 | magnitude
}

/// The byte of `x` rounded stochastically by `u` in [0, 1): the largest magnitude not above |x| + u * step, step the
/// distance of |x|'s neighbours, at most 448. NaN gives 0x7F.
pub fn encode_stochastic(x: f32, u: f32) -> u8 {
    if x.is_nan() {
        return NAN;
    }
    let a = x.abs().min(MAX);
    let exponent = |v: f32| ((v.to_bits() >> 23) as i32 - 127).max(-6);
    let target = (a + u * exp2i(exponent(a) - 3)).min(MAX);
    // Down to a multiple of the step at `target`, which may be the next binade's.
    let step = exp2i(exponent(target) - 3);
    (x.is_sign_negative() as u8) << 7 | encode((target / step).floor() * step)
}

/// The value of a byte.
pub fn decode(byte: u8) -> f32 {
    let exponent = ((byte >> 3) & 15) as i32;
    let mantissa = (byte & 7) as f32;
    let magnitude = if byte & 0x7F == NAN {
        f32::NAN
    } else if exponent == 0 {
        mantissa / 512.0
    } else {
        (8.0 + mantissa) * exp2i(exponent - 10)
    };
    if byte & 0x80 != 0 { -magnitude } else { magnitude }
}

/// 2^e for the exponents of normal f32 values.
fn exp2i(e: i32) -> f32 {
    f32::from_bits(((e + 127) as u32) << 23)
}
