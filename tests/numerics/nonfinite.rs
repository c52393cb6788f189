//! NaN and infinity: the block becomes NaN, is left out of the tensor amax and counted; zeros and signs are kept.

use crate::support::FORMATS;
use temper::numerics::block_format::{Quantized, RoundingDraw, TensorScale, fake_quant, quantize};
use temper::numerics::format::{Family, Format};
use temper::numerics::tensor_error::TensorErrorSums;

/// The definition on one row; stochastic formats draw from a fixed key.
fn row(x: &[f32], format: Format) -> Quantized {
    let draw = RoundingDraw { seed: 1, stream: 5 << 28, row_keys: &[7] };
    quantize(x, 1, x.len(), format, TensorScale::Tensor, Some(&draw))
}

#[test]
fn a_block_with_nan_or_infinity_becomes_nan() {
    for format in FORMATS.map(|text| text.parse::<Format>().unwrap()) {
        if let Family::Fp8 { .. } = format.family {
            continue; // its block is the row: below
        }
        let (size, mx) = (format.block_size(0), matches!(format.family, Family::Mxfp4 { .. } | Family::Mxfp8 { .. }));
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![1.0f32; 3 * size];
            x[size + 3] = poison;
            x[size + 4] = 1e30; // would dominate the tensor amax
            let q = row(&x, format);
            assert_eq!(q.nonfinite_blocks, 1);
            assert_eq!(q.block_scales[1], if mx { 255 } else { 0x7F });
            let (clean, poisoned): (Vec<_>, Vec<_>) =
                q.dequantized.iter().enumerate().partition(|(i, _)| i / size != 1);
            assert!(poisoned.iter().all(|(_, v)| v.is_nan()));
            let near =
                |v: f32| if format.rounding.is_stochastic() { (0.6..1.5).contains(&v) } else { (v - 1.0).abs() < 0.1 };
            assert!(clean.iter().all(|(_, v)| near(**v)), "{format} {clean:?}");
            if format == Format::NVFP4 {
                assert_eq!(q.tensor_encode_scale, 2688.0);
            }
            let sums = TensorErrorSums::of(&x, &q.dequantized, 0);
            assert_eq!((sums.nonfinite, sums.elements), (size as u64, 2 * size as u64));
        }
    }
}

#[test]
fn a_tile_with_nan_becomes_nan_and_its_neighbours_do_not() {
    for format in ["nvfp4:2d", "mxfp4:2d"] {
        let format: Format = format.parse().unwrap();
        let side = format.block_rows();
        let n = 2 * side + 3;
        let mut x = vec![1.0f32; n * n];
        x[(side + 2) * n + side + 5] = f32::NAN;
        x[side * n + side] = 1e30;
        let q = fake_quant(&x, n, n, format);
        assert_eq!(q.nonfinite_blocks, 1);
        for (i, y) in q.dequantized.iter().enumerate() {
            let poisoned = (i / n / side, i % n / side) == (1, 1);
            assert!(y.is_nan() == poisoned && (poisoned || (y - 1.0).abs() < 0.1), "{format} element {i}: {y}");
        }
    }
}

/// fp8 has no smaller block than the row: the row becomes NaN and is left out of A.
#[test]
fn an_fp8_row_with_nan_becomes_nan() {
    for format in ["fp8", "fp8:tensor"] {
        let x = [1.0, 2.0, f32::INFINITY, 1e30, 0.5, 3.0];
        let q = fake_quant(&x, 3, 2, format.parse().unwrap());
        assert_eq!(q.nonfinite_blocks, 1);
        assert!(q.fp8_scales[1].is_nan() && q.dequantized[2..4].iter().all(|v| v.is_nan()) && q.codes[2] == 0x7F);
        let amax = if format == "fp8" { [2.0, 3.0] } else { [3.0, 3.0] };
        assert_eq!([q.fp8_scales[0], q.fp8_scales[2]], amax.map(|a| a / 448.0));
        let finite: Vec<f32> = q.dequantized.iter().copied().filter(|v| v.is_finite()).collect();
        assert!(finite.iter().zip([1.0, 2.0, 0.5, 3.0]).all(|(y, x)| (y - x).abs() <= x / 16.0), "{finite:?}");
    }
}

#[test]
fn an_fp8_scale_that_would_vanish_is_one() {
    for x in [[0.0, -0.0], [1e-44, -0.0]] {
        let q = fake_quant(&x, 1, 2, "fp8".parse().unwrap());
        assert_eq!(q.fp8_scales, [1.0]);
        assert_eq!(q.dequantized.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), [0, 1 << 31]);
    }
}

#[test]
fn zeros_keep_their_sign_and_subnormals_take_scale_byte_zero() {
    for format in FORMATS.map(|text| text.parse::<Format>().unwrap()) {
        let q = row(&[0.0, -0.0], format);
        assert_eq!(q.dequantized.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), [0, 1 << 31], "{format}");
        assert_eq!(q.codes, [0, if format.has_e4m3_elements() { 0x80 } else { 8 }]);
        assert_eq!(q.tensor_encode_scale, 1.0);
    }
    let subnormal = f32::from_bits(0x7F_FFFF);
    let q = fake_quant(&[subnormal, 0.0], 1, 2, "mxfp4".parse().unwrap());
    assert_eq!(q.block_scales, [0]);
    assert_eq!(q.codes[0], 4); // just below 2 * 2^-127
}

#[test]
fn an_nvfp4_block_far_below_the_tensor_amax_has_scale_and_codes_zero() {
    let mut x = [1e-9f32; 32];
    x[..16].fill(1.0);
    x[17] = -1e-9;
    let q = fake_quant(&x, 1, 32, Format::NVFP4);
    assert_eq!(q.block_scales[1], 0);
    assert!(q.codes[16..].iter().all(|c| c & 7 == 0));
    assert!(q.dequantized[16..].iter().all(|v| *v == 0.0));
    assert!(q.dequantized[17].is_sign_negative());
}
