//! sample.cu against the inverse CDF in f64 and against the chain of torch's operations.

use tch::{Device, Kind, Tensor};
use temper::numerics::generator::uniform_f32;
use temper::ops::cuda::sampling::{sample, uniforms};
use temper::ops::sampling::{SamplingRule, definition, host_uniforms, sample as dispatched};

use crate::host::{ORDERS, Shim};
use crate::support::{Lcg, floats};

const RULE: SamplingRule = SamplingRule {
    greedy: false,
    temperature: 1.0,
    top_p: 1.0,
    top_k: 0,
    seed: 0x1234_5678_9ABC_DEF0,
    stream: 6 << 28,
};
/// (rows, vocab): one token, less than an octet, ragged, a tile, several tiles a lane.
const SHAPES: [(usize, usize); 7] = [(3, 1), (9, 5), (20, 130), (5, 1024), (6, 1032), (3, 5003), (2, 40_000)];

/// Logits between flat and peaked, row by row; some tokens impossible, the first and the last among them.
fn logits((rows, vocab): (usize, usize), seed: u64) -> Tensor {
    let mut rng = Lcg(seed);
    let value = |i: usize| {
        let (row, token) = (i / vocab, i % vocab);
        let width = [0.1, 1.0, 8.0][row % 3];
        let impossible = vocab > 4 && (token == 0 || token + 2 >= vocab || (row % 2 == 1 && token % 3 != 1));
        if impossible { f32::NEG_INFINITY } else { width * rng.value() + 20.0 }
    };
    Tensor::from_slice(&(0..rows * vocab).map(value).collect::<Vec<f32>>()).view([rows as i64, vocab as i64])
}

fn keys(rows: usize) -> Tensor {
    Tensor::from_slice(&(0..rows as i64).map(|row| (row << 40) ^ -0x7FFF_0000_0000_0001).collect::<Vec<i64>>())
}

fn ids_of(sampled: &(Tensor, Tensor)) -> Vec<i64> {
    Vec::try_from(&sampled.0).unwrap()
}

/// A chosen token has a probability, and u lies between the sums before and after it but for what f32 sums may be off.
fn assert_is_inverse_cdf(logits: &Tensor, rule: &SamplingRule, keys: &Tensor, ids: &[i64], what: &str) {
    let p = (logits.to_kind(Kind::Double) / rule.temperature).softmax(-1, Kind::Double);
    let keys = Vec::<i64>::try_from(keys).unwrap();
    for (row, (&id, &key)) in ids.iter().zip(&keys).enumerate() {
        let p = Vec::<f64>::try_from(p.get(row as i64)).unwrap();
        let u = f64::from(uniform_f32(rule.seed, rule.stream, key as u64));
        let before: f64 = p[..id as usize].iter().sum();
        let after = before + p[id as usize];
        assert!(p[id as usize] > 0.0, "{what}: row {row}: token {id} is impossible");
        assert!(before - 2e-6 <= u && u <= after + 2e-6, "{what}: row {row}: {u} is not in {before} .. {after}");
    }
}

#[test]
fn tokens_are_the_inverse_cdfs_and_log_probabilities_the_chains() {
    for (number, shape) in SHAPES.into_iter().enumerate() {
        for temperature in [1.0, 0.7] {
            let (logits, keys) = (logits(shape, number as u64), keys(shape.0));
            let rule = SamplingRule { temperature, ..RULE };
            let shim = ORDERS[number % ORDERS.len()];
            let what = format!("{shape:?} at {temperature} {shim:?}");
            let found = sample(&shim, &logits, &keys, &rule).unwrap();
            assert_is_inverse_cdf(&logits, &rule, &keys, &ids_of(&found), &what);
            let expected = definition(&logits, &host_uniforms(&keys, &rule).unwrap(), &rule).unwrap();
            // Rounding alone decides otherwise: never in so few rows.
            assert_eq!(ids_of(&found), ids_of(&expected), "{what}");
            for (found, expected) in floats(&found.1).iter().zip(floats(&expected.1)) {
                assert!((found - expected).abs() <= 4e-6 * (1.0 + expected.abs()), "{what}: {found} {expected}");
            }
            let greedy = SamplingRule { greedy: true, ..rule };
            let found = sample(&shim, &logits, &keys, &greedy).unwrap();
            let expected = definition(&logits, &keys, &greedy).unwrap();
            assert_eq!(ids_of(&found), ids_of(&expected), "{what} greedy");
            for (found, expected) in floats(&found.1).iter().zip(floats(&expected.1)) {
                assert!((found - expected).abs() <= 4e-6 * (1.0 + expected.abs()), "{what} greedy: {found} {expected}");
            }
        }
    }
}

#[test]
fn the_smallest_and_the_largest_uniforms_stay_among_the_possible() {
    let shape = (1, 3000);
    let logits = logits(shape, 4);
    // Among many keys, those with the most extreme uniforms.
    let of = |key: &i64| uniform_f32(RULE.seed, RULE.stream, *key as u64);
    let mut all: Vec<i64> = (0..300_000).collect();
    all.sort_by(|a, b| of(a).total_cmp(&of(b)));
    let extremes = [&all[..4], &all[all.len() - 4..]].concat();
    assert!(of(&extremes[0]) < 1e-4 && of(&extremes[7]) > 0.9999);
    let keys = Tensor::from_slice(&extremes);
    let logits = logits.expand([8, 3000], false).contiguous();
    let found = sample(&Shim(1), &logits, &keys, &RULE).unwrap();
    assert_is_inverse_cdf(&logits, &RULE, &keys, &ids_of(&found), "extremes");
}

#[test]
fn ties_go_to_the_first_and_the_order_of_threads_changes_nothing() {
    let flat = Tensor::zeros([4, 9000], (Kind::Float, Device::Cpu));
    let _ = flat.get(2).narrow(0, 8123, 2).fill_(1.0);
    let _ = flat.get(3).fill_(f64::NEG_INFINITY);
    let _ = flat.get(3).narrow(0, 8999, 1).fill_(-5.0);
    let greedy = SamplingRule { greedy: true, ..RULE };
    for shim in ORDERS {
        assert_eq!(ids_of(&sample(&shim, &flat, &keys(4), &greedy).unwrap()), [0, 0, 8123, 8999], "{shim:?}");
    }
    let first = sample(&Shim(0), &flat, &keys(4), &RULE).unwrap();
    assert_eq!(ids_of(&first)[3], 8999, "the only possible token");
    for shim in ORDERS {
        let again = sample(&shim, &flat, &keys(4), &RULE).unwrap();
        assert!(ids_of(&again) == ids_of(&first) && floats(&again.1) == floats(&first.1), "{shim:?}");
    }
}

#[test]
fn logits_that_are_not_finite_show_as_nan() {
    let logits = logits((5, 200), 1);
    let _ = logits.get(0).get(150).fill_(f64::NAN);
    let _ = logits.get(1).get(7).fill_(f64::INFINITY);
    let _ = logits.get(2).fill_(f64::NEG_INFINITY);
    let _ = logits.get(3).fill_(f64::NAN);
    for greedy in [false, true] {
        let (ids, logprobs) = sample(&Shim(77), &logits, &keys(5), &SamplingRule { greedy, ..RULE }).unwrap();
        assert_eq!(
            floats(&logprobs).iter().map(|l| l.is_nan()).collect::<Vec<bool>>(),
            [true, true, true, true, false]
        );
        assert!(Vec::<i64>::try_from(ids).unwrap().iter().all(|id| (0..200).contains(id)));
    }
}

#[test]
fn uniforms_are_the_definitions() {
    let keys = keys(300);
    assert_eq!(floats(&uniforms(&Shim(0), &keys, &RULE).unwrap()), floats(&host_uniforms(&keys, &RULE).unwrap()));
}

#[test]
fn frequencies_are_probabilities() {
    let p = [0.5, 0.0, 0.25, 0.125, 0.125f64];
    let logits = Tensor::from_slice(&p.map(|p| p.ln() as f32)).view([1, 5]).expand([4000, 5], false).contiguous();
    let keys = Tensor::arange(4000, (Kind::Int64, Device::Cpu));
    let ids = ids_of(&sample(&Shim(0), &logits, &keys, &RULE).unwrap());
    for (token, p) in p.iter().enumerate() {
        let count = ids.iter().filter(|id| **id == token as i64).count() as f64;
        assert!((count - 4000.0 * p).abs() <= 4.0 * (4000.0 * p * (1.0 - p)).sqrt(), "{token}: {count}");
    }
}

#[test]
fn filters_leave_what_they_say_and_errors_name_the_tensor() {
    let (logits, keys) = (logits((6, 50), 2), keys(6));
    let one = SamplingRule { top_k: 1, ..RULE };
    let greedy = SamplingRule { greedy: true, ..RULE };
    let ids = |rule: &SamplingRule| ids_of(&dispatched(&logits, &keys, rule).unwrap());
    assert_eq!(ids(&one), ids(&greedy));
    assert_eq!(ids(&SamplingRule { top_p: 1e-6, ..RULE }), ids(&greedy));
    for (text, part) in [
        (sample(&Shim(0), &logits.to_kind(Kind::Half), &keys, &RULE).err(), "logits: found dtype Half"),
        (sample(&Shim(0), &logits, &keys.narrow(0, 0, 5), &RULE).err(), "keys: found shape [5]"),
        (sample(&Shim(0), &logits.get(0), &keys, &RULE).err(), "expected [rows, vocab]"),
    ] {
        let text = text.unwrap().to_string();
        assert!(text.contains("sample") && text.contains(part), "{text}");
    }
}
