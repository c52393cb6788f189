//! The tensor operation keeps dtype and bits (tch would read a slice of bf16 values as f16), and says what it lacks.

use half::{bf16, f16};
use tch::{Kind, Tensor};
use temper::numerics::block_format::{self, RoundingDraw, TensorScale};
use temper::numerics::format::Format;
use temper::ops::cpu::tensor::{bf16_slice, f16_slice, f32_slice};
use temper::ops::fake_quant::{StochasticDraw, amax, error_sums, fake_quant};
use temper::ops::matmul_error::RowKeys;

const FORMATS: [&str; 13] = [
    "mxfp4",
    "mxfp4:even",
    "mxfp4:rceil",
    "mxfp4:half_away",
    "mxfp4:sr,2d",
    "mxfp8",
    "mxfp8:sr8",
    "nvfp4",
    "nvfp4:4over6",
    "nvfp4:sr",
    "nvfp4:2d",
    "fp8:tensor",
    "nvfp4_single_level",
];

#[test]
fn tensors_equal_the_definition_in_every_dtype() {
    let (rows, cols) = (5, 72);
    let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.013).collect();
    let x = Tensor::from_slice(&values).view([rows as i64, cols as i64]);
    let (x_bf16, x_f16) = (x.to_kind(Kind::BFloat16), x.to_kind(Kind::Half));
    let values_bf16: Vec<f32> = bf16_slice(&x_bf16).unwrap().iter().map(|v| v.to_f32()).collect();
    let values_f16: Vec<f32> = f16_slice(&x_f16).unwrap().iter().map(|v| v.to_f32()).collect();
    let keys: Vec<u64> = (0..rows as u64).map(|row| 3 << 40 | row).collect();
    let draw = StochasticDraw { seed: 5, stream: 5 << 28, keys: RowKeys::new(keys.clone()) };
    for format in FORMATS {
        let format: Format = format.parse().unwrap();
        let scale = TensorScale::Tensor;
        let definition = |values: &[f32]| {
            let draw = RoundingDraw { seed: 5, stream: 5 << 28, row_keys: &keys };
            block_format::quantize(values, rows, cols, format, scale, Some(&draw)).dequantized
        };
        let y = fake_quant(&x, format, scale, Some(&draw)).unwrap();
        assert_eq!(f32_slice(&y).unwrap(), definition(&values), "{format} f32");

        let y = fake_quant(&x_bf16, format, scale, Some(&draw)).unwrap();
        let expected: Vec<bf16> = definition(&values_bf16).into_iter().map(bf16::from_f32).collect();
        assert_eq!(bf16_slice(&y).unwrap(), expected, "{format} bf16");
        let sqnr = error_sums(&x_bf16, &y).unwrap().finish().sqnr_db;
        assert!((14.0..36.0).contains(&sqnr), "{format}: {sqnr} dB");

        let y = fake_quant(&x_f16, format, scale, Some(&draw)).unwrap();
        let expected: Vec<f16> = definition(&values_f16).into_iter().map(f16::from_f32).collect();
        assert_eq!(f16_slice(&y).unwrap(), expected, "{format} f16");
    }
    assert_eq!(amax(&x, "nvfp4".parse().unwrap()).unwrap(), values.iter().fold(0f32, |a, v| a.max(v.abs())));
}

#[test]
fn what_cannot_be_quantized_is_a_typed_error() {
    let x = Tensor::ones([4, 32], (Kind::Float, tch::Device::Cpu));
    let message = |x: &Tensor, format: &str, scale, draw: Option<&StochasticDraw>| {
        fake_quant(x, format.parse().unwrap(), scale, draw).unwrap_err().to_string()
    };
    let draw = StochasticDraw { seed: 0, stream: 0, keys: RowKeys::new(vec![1, 2, 3]) };
    assert_eq!(message(&x, "nvfp4:sr", TensorScale::Tensor, None), "fake_quant: nvfp4:sr: 0 row keys for 4 rows");
    assert_eq!(
        message(&x, "nvfp4:sr", TensorScale::Tensor, Some(&draw)),
        "fake_quant: nvfp4:sr: 3 row keys for 4 rows"
    );
    assert!(message(&x, "nvfp4:2d", TensorScale::Row, None).contains("nvfp4:2d has one tensor scale"));
    let whole = x.to_kind(Kind::Int64);
    assert!(message(&whole, "mxfp4", TensorScale::Tensor, None).contains("expected f32, bf16 or f16"));
    // mx tiles have no tensor scale to be taken per row.
    assert!(fake_quant(&x, "mxfp4:2d".parse().unwrap(), TensorScale::Row, None).is_ok());
}
