//! The tensor operation keeps dtype and bits: tch would read a slice of bf16 values as f16.

use half::bf16;
use tch::{Kind, Tensor};
use temper::numerics::block_format::{self, TensorScale};
use temper::numerics::format::Format;
use temper::ops::cpu::tensor::{bf16_slice, f32_slice};
use temper::ops::fake_quant::{amax, error_sums, fake_quant};

#[test]
fn f32_and_bf16_tensors_equal_the_definition() {
    let (rows, cols) = (5, 72);
    let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.013).collect();
    let x = Tensor::from_slice(&values).view([rows as i64, cols as i64]);
    let x16 = x.to_kind(Kind::BFloat16);
    let values16: Vec<f32> = bf16_slice(&x16).unwrap().iter().map(|v| v.to_f32()).collect();
    for format in ["mxfp4", "mxfp4:even", "mxfp4:rceil", "nvfp4", "nvfp4_single_level"] {
        let format: Format = format.parse().unwrap();
        let y = fake_quant(&x, format, TensorScale::Tensor, None).unwrap();
        let expected = block_format::fake_quant(&values, rows, cols, format).dequantized;
        assert_eq!(f32_slice(&y).unwrap(), expected, "{format} f32");

        let y = fake_quant(&x16, format, TensorScale::Tensor, None).unwrap();
        assert_eq!(y.kind(), Kind::BFloat16);
        let expected = block_format::fake_quant(&values16, rows, cols, format).dequantized;
        let expected: Vec<bf16> = expected.into_iter().map(bf16::from_f32).collect();
        assert_eq!(bf16_slice(&y).unwrap(), expected, "{format} bf16");
        let sqnr = error_sums(&x16, &y).unwrap().finish().sqnr_db;
        assert!((14.0..30.0).contains(&sqnr), "{format}: {sqnr} dB");
    }
    assert_eq!(amax(&x, "nvfp4".parse().unwrap()).unwrap(), values.iter().fold(0f32, |a, v| a.max(v.abs())));
}
