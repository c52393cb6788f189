//! The fast fake quantization equals the definition bit for bit, by every implementation, in every storage dtype; what it
//! counts and sums is the definition's too and depends neither on threads nor on instruction sets.

use crate::support::{FORMATS, Random};
use half::{bf16, f16};
use temper::numerics::block_format::{Quantized, RoundingDraw, TensorScale, quantize};
use temper::numerics::format::Format;
use temper::numerics::noise_key::row_key;
use temper::numerics::tensor_error::TensorErrorSums;
use temper::ops::cpu::fake_quant::{FakeQuantStats, Storage, Task, error_sums};
use temper::ops::cpu::path::Path;

const SHAPES: [(usize, usize); 19] = [
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
    (35, 70),
    (9, 200),
    (2, 256),
    (3, 392),
    (2, 1100),
    (5, 1536),
    (2, 3905),
    (33, 1700),
    (130, 513),
];

fn keys(rows: usize, update: u32) -> Vec<u64> {
    (0..rows as u32).map(|row| row_key(update, row)).collect()
}

fn formats() -> impl Iterator<Item = Format> {
    FORMATS.iter().map(|text| text.parse().unwrap())
}

/// Every format, scale, dtype and path.
fn check(x: &[f32], rows: usize, cols: usize, place: &str) {
    for format in formats() {
        for scale in [TensorScale::Tensor, TensorScale::Row, TensorScale::Amax(2.5)] {
            if (scale == TensorScale::Row && format.two_d)
                || (scale != TensorScale::Tensor && !format.has_tensor_scale())
            {
                continue;
            }
            let place = format!("{place} {format} {scale:?} [{rows}, {cols}]");
            check_storage::<f32>(x, rows, cols, format, scale, 0, &place);
            check_storage::<bf16>(x, rows, cols, format, scale, 0, &place);
            check_storage::<f16>(x, rows, cols, format, scale, 0, &place);
        }
    }
}

fn check_storage<T: Storage + Default>(
    x: &[f32],
    rows: usize,
    cols: usize,
    format: Format,
    scale: TensorScale,
    update: u32,
    place: &str,
) {
    let keys = keys(rows, update);
    let draw = RoundingDraw { seed: 7, stream: 5 << 28, row_keys: &keys };
    let mut stored = vec![T::default(); x.len()];
    T::narrow(x, &mut stored);
    let widened = |values: &[T]| {
        let mut wide = vec![0.0; values.len()];
        T::widen(values, &mut wide);
        wide
    };
    let read = widened(&stored);
    let expected = quantize(&read, rows, cols, format, scale, Some(&draw));
    let mut rounded = stored.clone();
    T::narrow(&expected.dequantized, &mut rounded);
    let rounded = widened(&rounded);
    let expected_sums = TensorErrorSums::of(&read, &rounded, expected.saturated as u64);
    let mut first_sums = None;
    for path in Path::ALL {
        let place = format!("{path:?} {} {place}", std::any::type_name::<T>());
        let mut out = stored.clone();
        let task = Task { path, with_errors: true, ..Task::new(format, scale, Some(&draw)) };
        let (stats, sums) = task.run(&stored, rows, cols, &mut out);
        assert_stats(&stats, &expected, &place);
        for (i, (fast, slow)) in widened(&out).iter().zip(&rounded).enumerate() {
            let same = fast.to_bits() == slow.to_bits() || (fast.is_nan() && slow.is_nan());
            assert!(same, "{place} element {i} x {:e} found {fast:e} expected {slow:e}", read[i]);
        }
        assert_sums(&sums, &expected_sums, &place);
        assert_eq!(*first_sums.get_or_insert(sums), sums, "{place}");
    }
}

fn assert_stats(fast: &FakeQuantStats, slow: &Quantized, place: &str) {
    assert_eq!(fast.saturated, slow.saturated, "{place}");
    assert_eq!(fast.nonfinite_blocks, slow.nonfinite_blocks, "{place}");
    assert_eq!(fast.tensor_encode_scale, slow.tensor_encode_scale, "{place}");
}

fn assert_sums(found: &TensorErrorSums, expected: &TensorErrorSums, place: &str) {
    let counts = |s: &TensorErrorSums| [s.elements, s.nonzero, s.deadzone, s.saturated, s.nonfinite];
    assert_eq!(counts(found), counts(expected), "{place}");
    assert_eq!(found.max_abs_error, expected.max_abs_error, "{place}");
    let sums = |s: &TensorErrorSums| [s.x_sq, s.q_sq, s.x_q, s.error_sq, s.relative];
    for (found, expected) in sums(found).into_iter().zip(sums(expected)) {
        assert!((found - expected).abs() <= 1e-12 * expected.abs(), "{place} {found:e} {expected:e}");
    }
}

#[test]
fn on_ties_outliers_zeros_and_subnormals() {
    let mut random = Random(77);
    for (rows, cols) in SHAPES {
        let x: Vec<f32> = (0..rows * cols).map(|_| random.nasty()).collect();
        check(&x, rows, cols, "nasty");
    }
}

#[test]
fn on_any_bits() {
    let mut random = Random(78);
    for (rows, cols) in &SHAPES[..18] {
        let bits: Vec<f32> = (0..rows * cols).map(|_| f32::from_bits(random.next() as u32)).collect();
        check(&bits, *rows, *cols, "random bits");
        let finite: Vec<f32> = bits.iter().map(|v| if v.is_finite() { *v } else { 1.0 }).collect();
        check(&finite, *rows, *cols, "finite bits");
        let tiny: Vec<f32> = finite.iter().map(|v| v * 1e-38).collect();
        check(&tiny, *rows, *cols, "tiny");
        check(&vec![-0.0; rows * cols], *rows, *cols, "minus zero");
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

/// Every bf16 magnitude up to a block's amax, at several scales: with 16 random bits, 24 draws of each.
#[test]
fn every_bf16_magnitude_rounds_stochastically_as_defined() {
    let magnitudes: Vec<f32> = (0..=bf16::from_f32(6.0).to_bits()).map(|m| bf16::from_bits(m).to_f32()).collect();
    for (update, power) in [0, 0, 0, 0, 0, 0, -30, 30].into_iter().enumerate() {
        for amax in [6.0f32, 3.02, 5.0] {
            let mut x = Vec::new();
            for chunk in magnitudes.chunks(31) {
                x.push(amax);
                x.extend(
                    (0..31).map(|i| chunk.get(i).map_or(0.0, |m| m.min(amax) * if i % 2 == 0 { 1.0 } else { -1.0 })),
                );
            }
            let x: Vec<f32> = x.iter().map(|v| v * 2f32.powi(power)).collect();
            for format in ["mxfp4:sr", "mxfp4:sr8", "mxfp4:sr,2d"] {
                let place = format!("{format} amax {amax} 2^{power}");
                let update = update as u32;
                check_storage::<bf16>(
                    &x,
                    x.len() / 32,
                    32,
                    format.parse().unwrap(),
                    TensorScale::Tensor,
                    update,
                    &place,
                );
            }
        }
    }
}

#[test]
fn nothing_depends_on_the_number_of_threads() {
    let (rows, cols) = (260, 600);
    let mut random = Random(80);
    let x: Vec<f32> = (0..rows * cols).map(|_| random.nasty()).collect();
    let keys = keys(rows, 3);
    let draw = RoundingDraw { seed: 7, stream: 5 << 28, row_keys: &keys };
    let run = |threads: usize, format: Format| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut out = vec![0.0; x.len()];
            let task = Task { with_errors: true, ..Task::new(format, TensorScale::Tensor, Some(&draw)) };
            let (stats, sums) = task.run(&x, rows, cols, &mut out);
            let again = error_sums(&x, &out);
            (out.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), stats, sums, again)
        })
    };
    for format in formats() {
        assert_eq!(run(1, format), run(3, format), "{format}");
    }
}

#[test]
fn sums_of_two_tensors_are_the_definitions() {
    let mut random = Random(81);
    for length in [0, 1, 7, 8, 9, 1000, 100_003] {
        let x: Vec<f32> = (0..length).map(|_| random.nasty()).collect();
        let mut y: Vec<f32> = x.iter().map(|v| v * 1.01 + 0.001).collect();
        if length > 100 {
            (y[3], y[50], y[99]) = (f32::NAN, f32::INFINITY, 0.0);
        }
        assert_sums(&error_sums(&x, &y), &TensorErrorSums::of(&x, &y, 0), &format!("{length}"));
    }
}
