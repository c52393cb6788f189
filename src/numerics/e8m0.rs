//! E8M0, the power-of-two block scale of the MX formats: byte e stands for 2^(e-127), byte 255 for NaN.

/// The byte of NaN.
pub const NAN: u8 = 255;

/// The byte of 2^k. `k` is within -127..=127.
pub fn encode(k: i32) -> u8 {
    (k.clamp(-127, 127) + 127) as u8
}

/// The value of a byte.
pub fn decode(byte: u8) -> f32 {
    if byte == NAN { f32::NAN } else { exp2(byte as i32 - 127) }
}

/// 2^k, exact, for -127 <= k <= 127; 2^-127 is subnormal in f32.
pub fn exp2(k: i32) -> f32 {
    if k == -127 { f32::from_bits(1 << 22) } else { f32::from_bits(((k + 127) as u32) << 23) }
}
