//! Stochastic rounding: the hardware's rule on the shared vectors, the grid's neighbours on every bf16 input, no bias,
//! and draws that belong to (update, row, column) alone.

use crate::support::{Random, floats, shared};
use rayon::prelude::*;
use safetensors::SafeTensors;
use temper::numerics::block_format::{RoundingDraw, TensorScale, quantize};
use temper::numerics::format::{Format, Rounding};
use temper::numerics::generator::{uniform_u8, uniform_u16};
use temper::numerics::noise_key::row_key;
use temper::numerics::{e2m1, e4m3};

const DRAWS: usize = 1_000_000;

#[test]
fn eight_bits_are_the_hardwares_rule() {
    let Some(path) = shared("vectors/sr_e2m1.safetensors") else { return };
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (x, bits) = (floats(&file, "x"), file.tensor("rbits").unwrap());
    for library in ["gfloat.StochasticFastest", "spec.sr8"] {
        for (i, theirs) in floats(&file, library).iter().enumerate() {
            let ours = e2m1::decode(e2m1::encode_stochastic(x[i], bits.data()[i] as f32 / 256.0));
            assert!(ours == *theirs, "{library}: {} with bits {}: ours {ours} theirs {theirs}", x[i], bits.data()[i]);
        }
    }
}

/// Of the two neighbours on the grid, the upper one where fraction + u >= 1, for every bf16 input and every u of 8 bits.
#[test]
fn all_bf16_inputs_round_to_a_neighbour() {
    type Codec = (fn(f32, f32) -> u8, fn(u8) -> f32, u8, u8);
    let codecs: [Codec; 2] =
        [(e2m1::encode_stochastic, e2m1::decode, 7, 8), (e4m3::encode_stochastic, e4m3::decode, 0x7E, 0x80)];
    for (encode, decode, largest, sign) in codecs {
        (0..=u16::MAX).into_par_iter().for_each(|bits| {
            let x = half::bf16::from_bits(bits).to_f32();
            if x.is_nan() {
                assert_eq!(encode(x, 0.5), if sign == 8 { 7 } else { e4m3::NAN });
                return;
            }
            let a = f64::from(x.abs()).min(f64::from(decode(largest)));
            let lower = (0..=largest).rev().find(|&code| f64::from(decode(code)) <= a).unwrap();
            let value = |code| f64::from(decode(code));
            let fraction = if lower == largest { 0.0 } else { (a - value(lower)) / (value(lower + 1) - value(lower)) };
            let sign = if x.is_sign_negative() { sign } else { 0 };
            for k in 0..256 {
                let code = lower + u8::from(fraction + f64::from(k) / 256.0 >= 1.0);
                assert_eq!(encode(x, k as f32 / 256.0), code | sign, "{x} with u = {k}/256");
            }
        });
    }
}

/// Mean error of `DRAWS` roundings of x, and the standard error that the two neighbours' distance `step` implies.
fn mean_error(x: f32, rounding: Rounding, stream: u32, round: impl Fn(f32, f32) -> f32 + Sync) -> f64 {
    const COLUMNS: usize = 1000;
    let row_keys: Vec<u64> = (0..DRAWS / COLUMNS).map(|row| row_key(3, row as u32)).collect();
    let draw = RoundingDraw { seed: 2026, stream, row_keys: &row_keys };
    let row_error = |row| -> f64 {
        (0..COLUMNS).map(|col| f64::from(round(x, draw.uniform(rounding, row, col))) - f64::from(x)).sum()
    };
    (0..row_keys.len()).into_par_iter().map(row_error).sum::<f64>() / DRAWS as f64
}

fn standard_error(x: f32, lower: f32, upper: f32) -> (f64, f64) {
    let step = f64::from(upper - lower);
    let fraction = f64::from(x.abs() - lower) / step;
    (step, step * (fraction * (1.0 - fraction) / DRAWS as f64).sqrt())
}

#[test]
fn sixteen_bits_are_unbiased_and_eight_nearly() {
    let e2m1_values = (0..=64).map(|i| (i as f32 * 0.094).min(6.0));
    let e4m3_values = (0..32).map(|i| 0.0007 * 1.53f32.powi(i)).filter(|v| *v <= 448.0);
    let round_e2m1 = |x: f32, u: f32| e2m1::decode(e2m1::encode_stochastic(x, u));
    let round_e4m3 = |x: f32, u: f32| e4m3::decode(e4m3::encode_stochastic(x, u));
    let (mut worst, mut worst_of_8, mut count) = (0f64, 0f64, 0);
    let values = e2m1_values.map(|x| (x, true)).chain(e4m3_values.map(|x| (x, false)));
    for (stream, (x, is_e2m1)) in values.enumerate() {
        let x = if stream % 2 == 0 { x } else { -x };
        let round = |x: f32, u: f32| if is_e2m1 { round_e2m1(x, u) } else { round_e4m3(x, u) };
        // u = 0 and the largest u give the two neighbours.
        let (step, error) = standard_error(x, round(x, 0.0).abs(), round(x, 65_535.0 / 65_536.0).abs());
        let mean = mean_error(x, Rounding::Stochastic16, stream as u32, round);
        if step == 0.0 {
            assert_eq!(mean, 0.0, "{x} is on the grid");
            continue;
        }
        assert!(mean.abs() <= 4.0 * error, "{x}: mean error {mean:e}, standard error {error:e}");
        worst = worst.max(mean.abs() / error);
        if stream % 8 == 0 {
            let mean = mean_error(x, Rounding::Stochastic8, stream as u32, round);
            assert!(mean.abs() <= step / 256.0 + 4.0 * error, "{x}: mean error {mean:e} by 8 bits");
            worst_of_8 = worst_of_8.max(mean.abs() / step);
        }
        count += 1;
    }
    println!(
        "{count} values, {DRAWS} draws each: largest mean error {worst:.2} standard errors; by 8 bits {worst_of_8:.5} of a step"
    );
    // A fraction below 1/256 is what 8 bits cannot see and 16 can.
    let x = 0.5 / 300.0;
    assert_eq!(mean_error(x, Rounding::Stochastic8, 0, round_e2m1), f64::from(-x));
    assert!(mean_error(x, Rounding::Stochastic16, 0, round_e2m1).abs() <= 4.0 * standard_error(x, 0.0, 0.5).1);
}

/// Whole blocks, whose scales leave nothing to clip: the mean of y is x.
#[test]
fn blocks_are_unbiased() {
    let rows = 50_000;
    for format in ["nvfp4:sr", "mxfp4:sr", "mxfp8:sr"] {
        let format: Format = format.parse().unwrap();
        let mut random = Random(41);
        // Blocks whose amax lies all over a binade, so that block scales round up and down.
        let cols = 4 * format.block_size(0);
        let row: Vec<f32> =
            (0..cols).map(|i| random.normal() * (1.0 + (i / format.block_size(0)) as f32 * 0.23)).collect();
        let x: Vec<f32> = row.iter().copied().cycle().take(rows * cols).collect();
        let keys: Vec<u64> = (0..rows as u32).map(|row| row_key(0, row)).collect();
        let draw = RoundingDraw { seed: 9, stream: 5 << 28, row_keys: &keys };
        let q = quantize(&x, rows, cols, format, TensorScale::Amax(5.0), Some(&draw));
        assert_eq!(q.saturated, 0, "{format}");
        let mut worst = 0f64;
        for (col, &x) in row.iter().enumerate() {
            let errors = (0..rows).map(|row| f64::from(q.dequantized[row * cols + col]) - f64::from(x));
            let (sum, sum_sq) = errors.fold((0.0, 0.0), |(s, q), e| (s + e, q + e * e));
            let mean = sum / rows as f64;
            let error = ((sum_sq / rows as f64 - mean * mean).max(0.0) / rows as f64).sqrt();
            assert!(mean.abs() <= 4.0 * error + 1e-6 * f64::from(x.abs()), "{format} {x}: mean {mean:e} +- {error:e}");
            worst = worst.max(mean.abs() / error.max(1e-30));
        }
        println!("{format}: largest mean error of {cols} elements {worst:.2} standard errors");
    }
}

#[test]
fn an_elements_draw_is_the_uniform_of_its_row_key_and_column() {
    let mut random = Random(42);
    let (rows, cols) = (5, 40);
    let x: Vec<f32> = (0..rows * cols).map(|_| random.normal()).collect();
    let keys: Vec<u64> = (0..rows as u32).map(|row| row_key(17, row)).collect();
    let draw = RoundingDraw { seed: 0x1234_5678_9ABC, stream: 5 << 28 | 12, row_keys: &keys };
    for name in ["mxfp4:sr", "mxfp4:sr8"] {
        let format: Format = name.parse().unwrap();
        let q = quantize(&x, rows, cols, format, TensorScale::Tensor, Some(&draw));
        for (i, &x) in x.iter().enumerate() {
            let (row, col) = (i / cols, i % cols);
            let u = match format.rounding {
                Rounding::Stochastic8 => uniform_u8(draw.seed, draw.stream, keys[row], col as u32) as f32 / 256.0,
                _ => uniform_u16(draw.seed, draw.stream, keys[row], col as u32) as f32 / 65_536.0,
            };
            let k = i32::from(q.block_scales[row * 2 + col / 32]) - 127;
            assert_eq!(q.codes[i], e2m1::encode_stochastic(x * 2f32.powi(-k), u), "{name} row {row} column {col}");
        }
        // A row keeps its values in another batch, and gets others after another update.
        let alone = RoundingDraw { row_keys: &keys[3..4], ..draw };
        let row = quantize(&x[3 * cols..4 * cols], 1, cols, format, TensorScale::Tensor, Some(&alone));
        assert_eq!(row.codes, q.codes[3 * cols..4 * cols]);
        let later: Vec<u64> = (0..rows as u32).map(|row| row_key(18, row)).collect();
        let draw = RoundingDraw { row_keys: &later, ..draw };
        assert_ne!(quantize(&x, rows, cols, format, TensorScale::Tensor, Some(&draw)).codes, q.codes, "{name}");
    }
}

#[test]
#[should_panic(expected = "mxfp4:sr needs a draw")]
fn a_stochastic_format_needs_a_draw() {
    quantize(&[1.0], 1, 1, "mxfp4:sr".parse().unwrap(), TensorScale::Tensor, None);
}
