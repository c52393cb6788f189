//! noise.cu against the error law and the generator's definition, bit for bit, and its sums: the error of a matrix product
//! and AQN.

use tch::{Kind, Tensor};
use temper::numerics::error_law::ErrorLaw;
use temper::numerics::generator;
use temper::ops::cuda::noise::{Destination, Law, Noisy, add_noise, new_sums, read_sums};
use temper::ops::matmul_error::RowKeys;

use crate::host::{ORDERS, Shim};
use crate::support::{Lcg, assert_bits, floats, rounded, tensor};

const LAWS: [ErrorLaw; 3] = [ErrorLaw::RelativeGaussian, ErrorLaw::AbsoluteGaussian, ErrorLaw::SystematicBias];
/// (dtype of y, dtype of the result).
const KINDS: [(Kind, Kind); 5] = [
    (Kind::Float, Kind::Float),
    (Kind::Float, Kind::BFloat16),
    (Kind::Float, Kind::Half),
    (Kind::BFloat16, Kind::BFloat16),
    (Kind::Half, Kind::Half),
];
/// (rows, cols): one element, pairs and quads of columns cut, several tiles.
const SHAPES: [(usize, usize); 8] = [(1, 1), (2, 7), (3, 64), (5, 65), (2, 130), (9, 200), (3, 68), (40, 1100)];
const SEED: u64 = 0x1234_5678_9ABC_DEF0;
const STREAM: u32 = 0x1400_0007;

struct Case {
    y: Tensor,    // [rows, cols]
    bias: Tensor, // f32 [cols]
    keys: RowKeys,
    scale: f32,
}

impl Case {
    fn new(rows: usize, cols: usize, kind: Kind) -> Case {
        let mut rng = Lcg((rows * 1000 + cols) as u64);
        let mut y: Vec<f32> = (0..rows * cols).map(|_| rng.value()).collect();
        y[0] = -0.0;
        if y.len() > 70 {
            y[65] = 0.0;
            y[66] = if kind == Kind::Half { 6e-8 } else { 1e-40 };
            y[67] = if kind == Kind::Half { 6e4 } else { 3e30 };
        }
        let bias: Vec<f32> = (0..cols).map(|_| rng.value() * 0.1).collect();
        let keys = RowKeys::new((0..rows as u64).map(|r| (r << 40) ^ 0xFFFF_0000_0000_0001).collect());
        Case { y: tensor(&y, rows, cols, kind), bias: Tensor::from_slice(&bias), keys, scale: 0.05 }
    }

    fn noisy<'a>(&'a self, into: Destination<'a>, bias: bool) -> Noisy<'a> {
        let bias = bias.then_some(&self.bias);
        Noisy { y: &self.y, into, bias, keys: &self.keys, scale: self.scale, stream: STREAM }
    }

    /// The result, rounded to the dtype, and the sums of what was added.
    fn definition(&self, law: ErrorLaw, bias: bool, kind: Kind) -> (Vec<f32>, [f64; 5]) {
        let (y, bias_values, cols) = (floats(&self.y), floats(&self.bias), self.y.size()[1] as usize);
        let (mut noisy, mut exact) = (Vec::new(), Vec::new());
        for (i, &y) in y.iter().enumerate() {
            let z = generator::normal(SEED, STREAM, self.keys.host()[i / cols], (i % cols) as u32);
            let value = law.apply(y, self.scale, z);
            noisy.push(if bias { value + bias_values[i % cols] } else { value });
            exact.push(if bias { y + bias_values[i % cols] } else { y });
        }
        let (noisy, exact) = (rounded(&noisy, kind), rounded(&exact, kind));
        let mut sums = [0.0; 5];
        for ((n, e), y) in noisy.iter().zip(&exact).zip(y) {
            let (error, square) = (f64::from(*n) - f64::from(*e), f64::from(y) * f64::from(y));
            for (sum, term) in sums.iter_mut().zip([error, error * error, square, square * square, 1.0]) {
                *sum += term;
            }
        }
        (noisy, sums)
    }
}

fn sums(matrices: usize) -> Tensor {
    new_sums(matrices as i64, tch::Device::Cpu).unwrap()
}

fn assert_sums(found: &[f64], expected: [f64; 5], what: &str) {
    assert_eq!(found[4], expected[4], "{what}: elements");
    // Sixteen at a time have the places of an f32. Errors cancel in their own sum.
    let size = [(expected[1] * expected[4]).sqrt(), expected[1], expected[2], expected[3]];
    let slack = size.map(|size| 5e-7 * size);
    for i in 0..4 {
        let same = found[i] == expected[i] || found[i].is_nan() && expected[i].is_nan();
        assert!(same || (found[i] - expected[i]).abs() <= slack[i], "{what}: sum {i}: {} {}", found[i], expected[i]);
    }
}

#[test]
fn outputs_are_the_definition_and_sums_are_of_rounded_outputs() {
    for (number, (rows, cols)) in SHAPES.into_iter().enumerate() {
        for (from, to) in KINDS {
            let case = Case::new(rows, cols, from);
            for (turn, law) in LAWS.into_iter().enumerate() {
                for bias in [false, true] {
                    let (expected, expected_sums) = case.definition(law, bias, to);
                    let (out, sums) = (tensor(&vec![f32::NAN; rows * cols], rows, cols, to), sums(1));
                    let shim = ORDERS[(number + turn + usize::from(bias)) % ORDERS.len()];
                    let what = format!("{law:?} {from:?} to {to:?} [{rows}, {cols}] bias {bias} {shim:?}");
                    let call = Law { law, seed: SEED, sums: Some(&sums) };
                    add_noise(&shim, &call, &[case.noisy(Destination::Store(&out), bias)]).unwrap();
                    assert_bits(&floats(&out), &expected, &what);
                    assert_sums(&read_sums(&sums).unwrap()[0], expected_sums, &what);
                }
            }
        }
    }
}

#[test]
fn in_place_and_added() {
    let mut case = Case::new(7, 129, Kind::Float);
    let (expected, _) = case.definition(ErrorLaw::RelativeGaussian, false, Kind::Float);
    let law = Law { law: ErrorLaw::RelativeGaussian, seed: SEED, sums: None };
    let into = tensor(&vec![0.75; 7 * 129], 7, 129, Kind::Float);
    add_noise(&Shim(1), &law, &[case.noisy(Destination::Add(&into), false)]).unwrap();
    assert_bits(&floats(&into), &expected.iter().map(|v| 0.75 + v).collect::<Vec<_>>(), "added");
    assert!(add_noise(&Shim(1), &law, &[case.noisy(Destination::Add(&into), true)]).is_err(), "with a bias");

    let y = case.y.copy();
    case.y = y.shallow_clone();
    add_noise(&Shim(9), &law, &[case.noisy(Destination::Store(&y), false)]).unwrap();
    assert_bits(&floats(&y), &expected, "in place");
}

#[test]
fn aqn_on_many_norms_is_each_alone() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let weights: Vec<Tensor> = (0..70)
            .map(|i| {
                let (rows, cols) = if i == 50 { (6, 80) } else { (1, 16 + i) };
                let mut rng = Lcg(i as u64);
                tensor(&(0..rows * cols).map(|_| 1.0 + 0.01 * rng.value()).collect::<Vec<_>>(), rows, cols, kind)
            })
            .collect();
        let keys: Vec<RowKeys> = weights.iter().map(|w| RowKeys::consecutive(7 << 32, w.size()[0] as usize)).collect();
        let out: Vec<Tensor> = weights.iter().map(Tensor::empty_like).collect();
        let scale = |i: usize| 1e-2 / (1.0 + i as f32);
        let noisy: Vec<Noisy> = (0..weights.len())
            .map(|i| {
                let into = Destination::Store(&out[i]);
                Noisy { y: &weights[i], into, bias: None, keys: &keys[i], scale: scale(i), stream: i as u32 }
            })
            .collect();
        let sums = sums(weights.len());
        let law = Law { law: ErrorLaw::AbsoluteGaussian, seed: 42, sums: Some(&sums) };
        add_noise(&Shim(2), &law, &noisy).unwrap();
        for (i, w) in weights.iter().enumerate() {
            let cols = w.size()[1] as usize;
            let expected: Vec<f32> = floats(w)
                .iter()
                .enumerate()
                .map(|(at, w)| {
                    w + scale(i) * generator::normal(42, i as u32, 7 << 32 | (at / cols) as u64, (at % cols) as u32)
                })
                .collect();
            let expected = rounded(&expected, kind);
            assert_bits(&floats(&out[i]), &expected, &format!("weight {i} {kind:?}"));
            let added: f64 = expected.iter().zip(floats(w)).map(|(n, w)| (f64::from(*n) - f64::from(w)).powi(2)).sum();
            let found = read_sums(&sums).unwrap()[i][1];
            assert!((found - added).abs() <= 5e-7 * added, "weight {i} {kind:?}: {found} {added}");
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_neighbours() {
    let case = Case::new(6, 100, Kind::Float);
    let law = Law { law: ErrorLaw::RelativeGaussian, seed: 3, sums: None };
    let out = case.y.empty_like();
    add_noise(&Shim(2), &law, &[case.noisy(Destination::Store(&out), false)]).unwrap();
    for row in 0..6 {
        let (y, keys) = (case.y.narrow(0, row, 1), case.keys.narrow(row as usize, 1));
        let alone = y.empty_like();
        let into = Destination::Store(&alone);
        let noisy = Noisy { y: &y, into, bias: None, keys: &keys, scale: case.scale, stream: STREAM };
        add_noise(&Shim(0), &law, &[noisy]).unwrap();
        assert_bits(&floats(&alone), &floats(&out.narrow(0, row, 1)), &format!("row {row}"));
    }
}

#[test]
fn a_scale_of_zero_changes_nothing_and_measures_nothing() {
    let case = Case { scale: 0.0, ..Case::new(4, 70, Kind::Float) };
    let (out, sums) = (case.y.empty_like(), sums(1));
    let law = Law { law: ErrorLaw::RelativeGaussian, seed: 3, sums: Some(&sums) };
    add_noise(&Shim(1), &law, &[case.noisy(Destination::Store(&out), false)]).unwrap();
    assert_eq!(floats(&out), floats(&case.y));
    assert_eq!(read_sums(&sums).unwrap()[0][1], 0.0);
}

#[test]
fn the_measured_deviation_is_the_scale() {
    let mut rng = Lcg(5);
    let (rows, cols) = (40, 512);
    let y = tensor(&(0..rows * cols).map(|_| rng.value()).collect::<Vec<_>>(), rows, cols, Kind::Float);
    let (keys, out, sums) = (RowKeys::consecutive(0, rows), y.to_kind(Kind::BFloat16), sums(1));
    let law = Law { law: ErrorLaw::RelativeGaussian, seed: 11, sums: Some(&sums) };
    let noisy =
        Noisy { y: &y, into: Destination::Store(&out), bias: None, keys: &keys, scale: 0.05, stream: 0x1400_0000 };
    add_noise(&Shim(77), &law, &[noisy]).unwrap();
    let sums = read_sums(&sums).unwrap()[0];
    let measured = (sums[1] / sums[2]).sqrt();
    let standard_error = 0.05 * (sums[3] / 2.0).sqrt() / sums[2];
    assert!((measured - 0.05).abs() < 4.0 * standard_error, "{measured} +- {standard_error}");
}
