//! The kernels' codecs against the Rust definition on dense inputs, and against NVIDIA's cuda_fp4.h, cuda_fp8.h and
//! cuda_bf16.h.

use temper::numerics::{e2m1, e4m3};

use crate::host;

/// Every bf16 value, and its two f32 neighbours: every tie of the small formats is among them.
fn inputs() -> impl Iterator<Item = f32> {
    (0..=0xFFFFu32).flat_map(|high| [high << 16, (high << 16) | 1, (high << 16).wrapping_sub(1)]).map(f32::from_bits)
}

#[test]
fn e2m1_is_the_definition_and_nvidias() {
    for x in inputs() {
        let code = host::e2m1_encode(x);
        assert_eq!(code, u32::from(e2m1::encode(x)), "{x:e}");
        if host::oracle_available() && !x.is_nan() {
            assert_eq!(code, host::oracle_e2m1(x) & 15, "cuda_fp4.h of {x:e}");
        }
    }
    for code in 0..16 {
        assert_eq!(host::e2m1_decode(code).to_bits(), e2m1::decode(code as u8).to_bits(), "code {code}");
    }
}

#[test]
fn e4m3_is_the_definition_and_nvidias() {
    for x in inputs() {
        let byte = host::e4m3_encode(x);
        assert_eq!(byte, u32::from(e4m3::encode(x)), "{x:e}");
        if host::oracle_available() && !x.is_nan() {
            assert_eq!(byte, host::oracle_e4m3(x) & 255, "cuda_fp8.h of {x:e}");
        }
    }
    for byte in 0..256 {
        let (found, expected) = (host::e4m3_decode(byte), e4m3::decode(byte as u8));
        assert!(found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan()), "byte {byte}");
    }
}

#[test]
fn bf16_rounds_to_nearest_even() {
    for x in inputs() {
        let (found, expected) = (half::bf16::from_bits(host::to_bf16(x)), half::bf16::from_f32(x));
        assert!(found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan()), "{x:e}");
        if host::oracle_available() && !x.is_nan() {
            assert_eq!(found.to_bits(), host::oracle_bf16(x), "cuda_bf16.h of {x:e}");
        }
    }
}

#[test]
fn f16_rounds_to_nearest_even_and_reads_exactly() {
    let ties = (0..=0xFFFFu32).map(|bits| half::f16::from_bits(bits as u16).to_f32());
    let near =
        |x: f32| [x, f32::from_bits(x.to_bits() ^ 0x1000), f32::from_bits((x.to_bits() ^ 0x1000).wrapping_add(1))];
    for x in inputs().chain(ties.flat_map(near)) {
        let (found, expected) = (half::f16::from_bits(host::to_f16(x)), half::f16::from_f32(x));
        assert!(found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan()), "{x:e}");
    }
    for bits in 0..=u16::MAX {
        let (found, expected) = (host::from_f16(bits), half::f16::from_bits(bits).to_f32());
        assert!(found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan()), "{bits:04x}");
    }
}

#[test]
fn the_oracle_is_there_or_its_absence_is_said() {
    if !host::oracle_available() {
        println!("skipped: built without CUDA's headers, so the codecs were compared with the Rust definition only");
    }
}
