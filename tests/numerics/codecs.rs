//! Every code, and every bf16 input against nearest search.

use temper::numerics::{e2m1, e4m3, e8m0, original};

#[test]
fn e2m1_codes_round_trip() {
    let values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    for code in 0..16u8 {
        let magnitude: f32 = values[(code & 7) as usize];
        let expected = if code & 8 != 0 { -magnitude } else { magnitude };
        assert_eq!(e2m1::decode(code).to_bits(), expected.to_bits());
        assert_eq!(e2m1::encode(expected), code);
    }
    assert_eq!(e2m1::encode(f32::NAN), 7);
    assert_eq!(e2m1::encode(-f32::NAN), 7);
    assert_eq!(e2m1::encode(f32::INFINITY), 7);
    assert_eq!(e2m1::encode(f32::NEG_INFINITY), 15);
}

#[test]
fn e4m3_codes_round_trip() {
    for byte in 0..=255u8 {
        let value = e4m3::decode(byte);
        if byte & 0x7F == 0x7F {
            assert!(value.is_nan());
        } else {
            assert_eq!(e4m3::encode(value), byte, "{value}");
        }
    }
    assert_eq!(e4m3::decode(0x7E), 448.0);
    assert_eq!(e4m3::decode(0x01), 1.0 / 512.0);
    assert_eq!(e4m3::encode(f32::NAN), 0x7F);
    assert_eq!([e4m3::encode(464.1), e4m3::encode(-1e9), e4m3::encode(f32::INFINITY)], [0x7E, 0xFE, 0x7E]);
}

#[test]
fn e8m0_bytes_are_powers_of_two() {
    for byte in 0..255u8 {
        assert_eq!(e8m0::decode(byte) as f64, 2f64.powi(byte as i32 - 127));
        assert_eq!(e8m0::encode(byte as i32 - 127), byte);
    }
    assert!(e8m0::decode(255).is_nan());
}

/// The code whose value is nearest; of two equally near, the one that `preferred` puts first.
fn nearest<K: Ord>(x: f64, codes: u8, decode: fn(u8) -> f32, preferred: impl Fn(u8) -> K) -> u8 {
    let distance = |code: u8| (decode(code) as f64 - x.abs()).abs();
    let order = |a: &u8, b: &u8| distance(*a).total_cmp(&distance(*b)).then(preferred(*a).cmp(&preferred(*b)));
    (0..codes).min_by(order).unwrap()
}

#[test]
fn all_bf16_inputs_round_to_the_nearest_code() {
    for bits in 0..=u16::MAX {
        let x = half::bf16::from_bits(bits).to_f32();
        if x.is_nan() {
            assert_eq!([e2m1::encode(x), original::encode_ties_away(x), e4m3::encode(x)], [7, 7, 0x7F]);
            continue;
        }
        let sign = x.is_sign_negative() as u8;
        let clamped = x.clamp(-1e4, 1e4) as f64;
        let e2m1_code = |preferred: fn(u8) -> u8| sign << 3 | nearest(clamped, 8, e2m1::decode, preferred);
        assert_eq!(e2m1::encode(x), e2m1_code(|code| code & 1), "{x}");
        assert_eq!(original::encode_ties_away(x), e2m1_code(|code| 7 - code), "{x} away from zero");
        assert_eq!(original::encode_ties_toward_zero(x), e2m1_code(|code| code), "{x} toward zero");
        assert_eq!(e4m3::encode(x), sign << 7 | nearest(clamped, 0x7F, e4m3::decode, |code| code & 1), "{x}");
    }
}

#[test]
fn f32_neighbours_of_every_e4m3_tie() {
    for byte in 0..0x7Eu8 {
        let tie = (e4m3::decode(byte) + e4m3::decode(byte + 1)) / 2.0;
        assert_eq!(e4m3::encode(tie), byte + (byte & 1), "tie {tie}");
        assert_eq!(e4m3::encode(tie.next_down()), byte);
        assert_eq!(e4m3::encode(tie.next_up()), byte + 1);
    }
}
