//! Matmul error and perturbation: equal to the definition bit for bit, sums as defined, threads without effect.

use crate::support::Random;
use half::bf16;
use temper::numerics::error_law::{ErrorLaw, NoiseSums};
use temper::numerics::generator::normal;
use temper::ops::cpu::matmul_error::{accumulate_f32, apply_bf16, apply_f32, apply_f32_by, perturb_f32};
use temper::ops::cpu::normals::Path;

const LAWS: [ErrorLaw; 3] = [ErrorLaw::RelativeGaussian, ErrorLaw::AbsoluteGaussian, ErrorLaw::SystematicBias];
const SHAPES: [(usize, usize); 9] =
    [(1, 1), (5, 3), (3, 63), (4, 64), (33, 65), (2, 200), (3, 5000), (70, 1000), (1, 70_001)];
const SCALE: f32 = 0.05;

struct Case {
    seed: u64,
    stream: u32,
    tokens: Vec<u64>,
    y: Vec<f32>,
    bias: Vec<f32>,
}

fn case(random: &mut Random, rows: usize, cols: usize) -> Case {
    Case {
        seed: random.next(),
        stream: random.next() as u32,
        tokens: (0..rows).map(|_| random.next()).collect(),
        y: (0..rows * cols).map(|_| random.nasty()).collect(),
        bias: (0..cols).map(|_| random.normal()).collect(),
    }
}

fn assert_close(ours: &NoiseSums, expected: &NoiseSums) {
    assert_eq!(ours.elements, expected.elements);
    for (a, b) in [
        (ours.error_sq, expected.error_sq),
        (ours.clean_sq, expected.clean_sq),
        (ours.clean_fourth, expected.clean_fourth),
    ] {
        assert!((a - b).abs() <= 1e-12 * b.abs(), "{a} {b}");
    }
}

#[test]
fn apply_equals_the_definition() {
    let mut random = Random(4);
    for (rows, cols) in SHAPES {
        for law in LAWS {
            for with_bias in [false, true] {
                check_apply(&case(&mut random, rows, cols), rows, cols, law, with_bias);
            }
        }
    }
}

fn check_apply(case: &Case, rows: usize, cols: usize, law: ErrorLaw, with_bias: bool) {
    let bias = with_bias.then_some(&case.bias[..]);
    let (mut wide, mut narrow) = (NoiseSums::default(), NoiseSums::default());
    let (mut expected, mut expected_bf16) = (Vec::new(), Vec::new());
    for (i, &y) in case.y.iter().enumerate() {
        let z = normal(case.seed, case.stream, case.tokens[i / cols], (i % cols) as u32);
        let (mut noisy, mut exact) = (law.apply(y, SCALE, z), y);
        if with_bias {
            noisy += case.bias[i % cols];
            exact += case.bias[i % cols];
        }
        expected.push(noisy.to_bits());
        expected_bf16.push(bf16::from_f32(noisy).to_bits());
        let rounded = bf16::from_f32(noisy).to_f64() - bf16::from_f32(exact).to_f64();
        for (sums, error) in [(&mut wide, noisy as f64 - exact as f64), (&mut narrow, rounded)] {
            sums.merge(&NoiseSums {
                error_sq: error * error,
                clean_sq: (y as f64).powi(2),
                clean_fourth: (y as f64).powi(4),
                elements: 1,
            });
        }
    }
    for path in Path::ALL {
        let (mut out, tokens) = (case.y.clone(), &case.tokens);
        let (seed, stream) = (case.seed, case.stream);
        let sums = apply_f32_by(path, law, SCALE, seed, stream, tokens, &mut out, cols, bias);
        let bits: Vec<u32> = out.iter().map(|v| v.to_bits()).collect();
        assert_eq!(bits, expected, "{path:?} {law:?} [{rows}, {cols}]");
        assert_close(&sums, &wide);
    }
    let mut out = vec![bf16::ZERO; case.y.len()];
    let sums = apply_bf16(law, SCALE, case.seed, case.stream, &case.tokens, &case.y, cols, bias, &mut out);
    assert_eq!(out.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), expected_bf16, "{law:?} [{rows}, {cols}]");
    assert_close(&sums, &narrow);
}

#[test]
fn values_and_sums_do_not_depend_on_the_number_of_threads() {
    let (rows, cols) = (300, 1000);
    let case = case(&mut Random(8), rows, cols);
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut y = case.y.clone();
            let law = ErrorLaw::RelativeGaussian;
            let sums = apply_f32(law, SCALE, case.seed, case.stream, &case.tokens, &mut y, cols, None);
            (y.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), sums)
        })
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn accumulation_is_the_law_and_then_a_sum() {
    let mut random = Random(9);
    for (rows, cols) in SHAPES {
        let case = case(&mut random, rows, cols);
        for law in LAWS {
            let mut noisy = case.y.clone();
            let expected_sums = apply_f32(law, SCALE, case.seed, case.stream, &case.tokens, &mut noisy, cols, None);
            let before: Vec<f32> = (0..rows * cols).map(|_| random.normal()).collect();
            let mut into = before.clone();
            let sums = accumulate_f32(law, SCALE, case.seed, case.stream, &case.tokens, &case.y, cols, &mut into);
            let expected: Vec<u32> = before.iter().zip(&noisy).map(|(b, n)| (b + n).to_bits()).collect();
            assert_eq!(into.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), expected, "{law:?} [{rows}, {cols}]");
            assert_eq!(sums, expected_sums);
        }
    }
}

#[test]
fn a_row_keeps_its_draw_in_another_batch() {
    let (rows, cols) = (9, 130);
    let case = case(&mut Random(12), rows, cols);
    let law = ErrorLaw::RelativeGaussian;
    let mut all = case.y.clone();
    apply_f32(law, SCALE, case.seed, case.stream, &case.tokens, &mut all, cols, None);
    for row in (0..rows).rev() {
        let mut alone = case.y[row * cols..][..cols].to_vec();
        apply_f32(law, SCALE, case.seed, case.stream, &case.tokens[row..=row], &mut alone, cols, None);
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&alone), bits(&all[row * cols..][..cols]));
    }
}

#[test]
fn relative_noise_measures_its_scale() {
    let mut random = Random(21);
    let (rows, cols) = (1000, 1000);
    let mut y: Vec<f32> = (0..rows * cols).map(|_| random.normal()).collect();
    let tokens: Vec<u64> = (0..rows as u64).collect();
    let sums = apply_f32(ErrorLaw::RelativeGaussian, SCALE, 1, 2, &tokens, &mut y, cols, None);
    let deviation = (sums.relative_std() - SCALE as f64) / sums.relative_std_error(SCALE as f64);
    println!("measured {:.6}, planned {SCALE} ({deviation:+.2} standard errors)", sums.relative_std());
    assert!(deviation.abs() < 4.0);
}

#[test]
fn perturb_rounds_the_product_and_then_the_sum() {
    let mut random = Random(30);
    for (rows, cols) in SHAPES {
        let case = case(&mut random, rows, cols);
        let mut out = vec![0.0; case.y.len()];
        let sums = perturb_f32(&case.y, rows, cols, 0.01, case.seed, case.stream, &case.tokens, &mut out);
        let (mut sum, mut sum_sq) = (0.0, 0.0);
        for (i, (&w, &ours)) in case.y.iter().zip(&out).enumerate() {
            let z = normal(case.seed, case.stream, case.tokens[i / cols], (i % cols) as u32);
            let step = 0.01f32 * z;
            assert_eq!(ours.to_bits(), (w + step).to_bits());
            let d = ours as f64 - w as f64;
            sum += d;
            sum_sq += d * d;
        }
        assert_eq!(sums.elements as usize, case.y.len());
        assert!((sums.sum - sum).abs() < 1e-9 && (sums.sum_sq - sum_sq).abs() < 1e-9 * sum_sq.max(1e-3));
    }
}
