//! matmul_error.cu against the error law and the generator's definition, bit for bit, and its sums.

use half::bf16;
use temper::numerics::error_law::ErrorLaw;
use temper::numerics::generator;

use crate::host::{self, LAUNCHES, Noise};
use crate::support::{Lcg, assert_bits, assert_bits_bf16};

const LAWS: [(u32, ErrorLaw); 3] =
    [(0, ErrorLaw::RelativeGaussian), (1, ErrorLaw::AbsoluteGaussian), (2, ErrorLaw::SystematicBias)];

struct Case {
    y: Vec<f32>,      // [rows, cols]
    tokens: Vec<u64>, // [rows]
    bias: Vec<f32>,   // [cols]
    cols: usize,
}

fn case(rows: usize, cols: usize) -> Case {
    let mut rng = Lcg((rows * 1000 + cols) as u64);
    let mut y: Vec<f32> = (0..rows * cols).map(|_| rng.value()).collect();
    y[0] = -0.0;
    if y.len() > 70 {
        y[65] = 0.0;
        y[66] = 1e-40;
        y[67] = 3e30;
    }
    let tokens = (0..rows as u64).map(|r| (r << 40) ^ 0xFFFF_0000_0000_0001).collect();
    Case { y, tokens, bias: (0..cols).map(|_| rng.value() * 0.1).collect(), cols }
}

/// Noisy and clean with bias, before rounding to the output dtype.
fn definition(c: &Case, law: ErrorLaw, n: Noise, bias: bool) -> Vec<(f32, f32)> {
    let element = |(i, &y): (usize, &f32)| {
        let (row, column) = (i / c.cols, i % c.cols);
        let z = generator::normal(n.seed, n.stream, c.tokens[row], column as u32);
        let noisy = law.apply(y, n.scale, z);
        if bias { (noisy + c.bias[column], y + c.bias[column]) } else { (noisy, y) }
    };
    c.y.iter().enumerate().map(element).collect()
}

fn assert_sums(found: [f64; 4], expected: impl Iterator<Item = (f64, f64)>, what: &str) {
    let mut sums = [0.0; 4];
    for (error, clean) in expected {
        sums = [sums[0] + error * error, sums[1] + clean * clean, sums[2] + clean.powi(4), sums[3] + 1.0];
    }
    assert_eq!(found[3], sums[3], "{what}: elements");
    for i in 0..3 {
        assert!((found[i] - sums[i]).abs() <= 1e-12 * sums[i].abs(), "{what}: sum {i}: {} {}", found[i], sums[i]);
    }
}

#[test]
fn outputs_are_the_definition_and_sums_are_of_rounded_outputs() {
    for (rows, cols) in [(1, 1), (2, 7), (3, 64), (5, 65), (2, 130), (9, 200)] {
        let c = case(rows, cols);
        for (number, law) in LAWS {
            for bias in [false, true] {
                let noise = Noise { law: number, scale: 0.05, seed: 0x1234_5678_9ABC_DEF0, stream: 0x1400_0007 };
                let expected = definition(&c, law, noise, bias);
                let given = bias.then_some(&c.bias[..]);
                for launch in LAUNCHES {
                    let what = format!("{law:?} [{rows}, {cols}] bias {bias} {launch:?}");
                    let (out, sums) = host::matmul_error_f32(launch, noise, &c.y, &c.tokens, cols, given);
                    assert_bits(&out, &expected.iter().map(|e| e.0).collect::<Vec<_>>(), &what);
                    let errors = expected.iter().map(|e| f64::from(e.0) - f64::from(e.1));
                    assert_sums(sums, errors.zip(c.y.iter().map(|&y| f64::from(y))), &what);

                    let (out, sums) = host::matmul_error_bf16(launch, noise, &c.y, &c.tokens, cols, given);
                    assert_bits_bf16(&out, &expected.iter().map(|e| bf16::from_f32(e.0)).collect::<Vec<_>>(), &what);
                    let errors = expected.iter().map(|e| bf16::from_f32(e.0).to_f64() - bf16::from_f32(e.1).to_f64());
                    assert_sums(sums, errors.zip(c.y.iter().map(|&y| f64::from(y))), &what);
                }
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_neighbours() {
    let c = case(6, 100);
    let noise = Noise { law: 0, scale: 0.05, seed: 3, stream: 9 };
    let together = host::matmul_error_f32(LAUNCHES[2], noise, &c.y, &c.tokens, 100, None).0;
    for row in 0..6 {
        let part = row * 100..(row + 1) * 100;
        let alone = host::matmul_error_f32(LAUNCHES[0], noise, &c.y[part.clone()], &c.tokens[row..=row], 100, None).0;
        assert_bits(&alone, &together[part], &format!("row {row}"));
    }
}

#[test]
fn a_scale_of_zero_changes_nothing_and_measures_nothing() {
    let c = case(4, 70);
    let noise = Noise { law: 0, scale: 0.0, seed: 3, stream: 9 };
    let (out, sums) = host::matmul_error_f32(LAUNCHES[1], noise, &c.y, &c.tokens, 70, None);
    assert_eq!(out, c.y);
    assert_eq!(sums[0], 0.0);
}

#[test]
fn the_measured_deviation_is_the_scale() {
    let mut rng = Lcg(5);
    let (rows, cols) = (40, 512);
    let y: Vec<f32> = (0..rows * cols).map(|_| rng.value()).collect();
    let tokens: Vec<u64> = (0..rows as u64).collect();
    let noise = Noise { law: 0, scale: 0.05, seed: 11, stream: 0x1400_0000 };
    let sums = host::matmul_error_bf16(LAUNCHES[3], noise, &y, &tokens, cols, None).1;
    let measured = (sums[0] / sums[1]).sqrt();
    let standard_error = 0.05 * (sums[2] / 2.0).sqrt() / sums[1];
    assert!((measured - 0.05).abs() < 4.0 * standard_error, "{measured} +- {standard_error}");
}
