//! The fast fake quantization equals the definition bit for bit, in f32 and bf16.

use crate::support::Random;
use half::bf16;
use temper::numerics::block_format::{Quantized, TensorScale, fake_quant_scaled};
use temper::numerics::format::Format;
use temper::ops::cpu::fake_quant::{FakeQuantStats, fake_quant_bf16_by, fake_quant_f32_by};
use temper::ops::cpu::normals::Path;

const FORMATS: [&str; 5] = ["mxfp4", "mxfp4:even", "mxfp4:rceil", "nvfp4", "nvfp4_single_level"];
const SHAPES: [(usize, usize); 14] = [
    (1, 1),
    (3, 15),
    (2, 16),
    (2, 17),
    (5, 31),
    (4, 32),
    (3, 33),
    (2, 63),
    (7, 64),
    (3, 65),
    (9, 200),
    (2, 256),
    (3, 392),
    (130, 513),
];

fn check(x: &[f32], rows: usize, cols: usize, place: &str) {
    let halves: Vec<bf16> = x.iter().map(|v| bf16::from_f32(*v)).collect();
    let widened: Vec<f32> = halves.iter().map(|v| v.to_f32()).collect();
    for format in FORMATS.map(|f| f.parse::<Format>().unwrap()) {
        for scale in [TensorScale::Tensor, TensorScale::Row, TensorScale::Amax(2.5)] {
            let place = format!("{place} {format} {scale:?} [{rows}, {cols}]");
            let expected = fake_quant_scaled(x, rows, cols, format, scale);
            for path in Path::ALL {
                let mut out = vec![0.0; x.len()];
                let stats = fake_quant_f32_by(path, x, rows, cols, format, scale, &mut out);
                assert_stats(&stats, &expected, &place);
                for (i, (fast, slow)) in out.iter().zip(&expected.dequantized).enumerate() {
                    let same = fast.to_bits() == slow.to_bits();
                    assert!(same, "{path:?} {place} element {i} x {} {fast} {slow}", x[i]);
                }
            }
            let expected = fake_quant_scaled(&widened, rows, cols, format, scale);
            for path in Path::ALL {
                let mut out = vec![bf16::ZERO; x.len()];
                let stats = fake_quant_bf16_by(path, &halves, rows, cols, format, scale, &mut out);
                assert_stats(&stats, &expected, &place);
                for (i, (fast, slow)) in out.iter().zip(&expected.dequantized).enumerate() {
                    let same = fast.to_bits() == bf16::from_f32(*slow).to_bits();
                    assert!(same, "{path:?} {place} bf16 element {i} x {} {fast} {slow}", widened[i]);
                }
            }
        }
    }
}

fn assert_stats(fast: &FakeQuantStats, slow: &Quantized, place: &str) {
    assert_eq!(fast.saturated, slow.saturated, "{place}");
    assert_eq!(fast.nonfinite_blocks, slow.nonfinite_blocks, "{place}");
    assert_eq!(fast.tensor_encode_scale, slow.tensor_encode_scale, "{place}");
}

#[test]
fn on_ties_outliers_zeros_and_subnormals() {
    let mut random = Random(77);
    for (rows, cols) in SHAPES {
        let x: Vec<f32> = (0..rows * cols).map(|_| random.nasty()).collect();
        check(&x, rows, cols, "nasty");
        let x: Vec<f32> = (0..rows * cols).map(|_| random.normal()).collect();
        check(&x, rows, cols, "normal");
    }
}

#[test]
fn on_any_bits() {
    let mut random = Random(78);
    for (rows, cols) in SHAPES {
        let bits: Vec<f32> = (0..rows * cols).map(|_| f32::from_bits(random.next() as u32)).collect();
        check(&bits, rows, cols, "random bits");
        let finite: Vec<f32> = bits.iter().map(|v| if v.is_finite() { *v } else { 1.0 }).collect();
        check(&finite, rows, cols, "finite bits");
        let tiny: Vec<f32> = finite.iter().map(|v| v * 1e-38).collect();
        check(&tiny, rows, cols, "tiny");
        check(&vec![-0.0; rows * cols], rows, cols, "minus zero");
    }
}

#[test]
fn on_every_scale_of_a_block() {
    // One block a row whose amax walks through all exponents and the mantissas where the rules switch.
    let mut x = Vec::new();
    for exponent in 0..255u32 {
        for mantissa in [0, 1, 0x3F_FFFF, 0x40_0000, 0x40_0001, 0x5F_FFFF, 0x60_0000, 0x7F_FFFF] {
            let amax = f32::from_bits(exponent << 23 | mantissa);
            let parts = [1.0, -1.0, 0.5, -0.25, 0.7, 1.0 / 3.0, -1.0 / 24.0, 1e-3];
            x.extend((0..32).map(|i| amax * parts[i % 8]));
        }
    }
    check(&x, x.len() / 32, 32, "scales");
}
