//! NaN and infinity: the block becomes NaN, is left out of the tensor amax and counted; zeros and signs are kept.

use temper::numerics::block_format::fake_quant;
use temper::numerics::format::Format;
use temper::numerics::tensor_error::TensorErrorSums;

#[test]
fn a_block_with_nan_or_infinity_becomes_nan() {
    for (format, byte) in [("mxfp4", 255), ("nvfp4", 0x7F), ("nvfp4_single_level", 0x7F)] {
        let format: Format = format.parse().unwrap();
        let size = format.block_size(0);
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![1.0f32; 3 * size];
            x[size + 3] = poison;
            x[size + 4] = 1e30; // would dominate the tensor amax
            let q = fake_quant(&x, 1, 3 * size, format);
            assert_eq!(q.nonfinite_blocks, 1);
            assert_eq!(q.block_scales[1], byte);
            let (clean, poisoned): (Vec<_>, Vec<_>) =
                q.dequantized.iter().enumerate().partition(|(i, _)| i / size != 1);
            assert!(poisoned.iter().all(|(_, v)| v.is_nan()));
            assert!(clean.iter().all(|(_, v)| (**v - 1.0).abs() < 0.1), "{clean:?}");
            if format == Format::NVFP4 {
                assert_eq!(q.tensor_encode_scale, 2688.0);
            }
            let sums = TensorErrorSums::of(&x, &q.dequantized, 0);
            assert_eq!((sums.nonfinite, sums.elements), (size as u64, 2 * size as u64));
        }
    }
}

#[test]
fn zeros_keep_their_sign_and_subnormals_take_scale_byte_zero() {
    for format in ["mxfp4", "mxfp4:even", "mxfp4:rceil", "nvfp4", "nvfp4_single_level"] {
        let format: Format = format.parse().unwrap();
        let q = fake_quant(&[0.0, -0.0], 1, 2, format);
        assert_eq!(q.dequantized.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), [0, 1 << 31], "{format}");
        assert_eq!(q.codes, [0, 8]);
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
