//! Philox and the normal law of the kernels: the frozen vectors, and the Rust definition on many columns.

use serde_json::Value;
use tch::Kind;
use temper::numerics::error_law::ErrorLaw;
use temper::numerics::generator;
use temper::ops::cuda::noise::{Destination, Law, Noisy, add_noise};
use temper::ops::matmul_error::RowKeys;

use crate::host::{self, Shim};
use crate::support::{floats, shared, tensor};

fn number(v: &Value) -> u64 {
    match v.as_str() {
        Some(text) => u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap(),
        None => v.as_u64().unwrap(),
    }
}

/// z of columns 0..n: absolute noise of scale 1 on zeros, by the kernel.
fn normals(seed: u64, stream: u32, token: u64, n: usize) -> Vec<f32> {
    let (y, keys) = (tensor(&vec![0.0; n], 1, n, Kind::Float), RowKeys::new(vec![token]));
    let law = Law { law: ErrorLaw::AbsoluteGaussian, seed, sums: None };
    let noisy = Noisy { y: &y, into: Destination::Store(&y), bias: None, keys: &keys, scale: 1.0, stream };
    add_noise(&Shim(0), &law, &[noisy]).unwrap();
    floats(&y)
}

#[test]
fn the_frozen_vectors() {
    let Some(path) = shared("vectors/noise_generator.json") else {
        return;
    };
    let file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    for case in file["cases"].as_array().unwrap() {
        let (seed, stream, token) = (number(&case["seed"]), number(&case["stream"]) as u32, number(&case["token"]));
        for (call, key) in [(0, "philox7_call0"), (9, "philox7_call9")] {
            let words =
                host::philox([seed as u32, (seed >> 32) as u32], [call, stream, token as u32, (token >> 32) as u32]);
            let expected: Vec<u64> = case[key].as_array().unwrap().iter().map(number).collect();
            assert_eq!(words.map(u64::from).to_vec(), expected, "{} {key}", case["name"]);
        }
        let expected: Vec<i64> =
            case["S7_columns_0_127"].as_array().unwrap().iter().map(|v| v.as_i64().unwrap()).collect();
        let found: Vec<i64> = normals(seed, stream, token, 128).iter().map(|z| (z * 32768.0) as i64).collect();
        assert_eq!(found, expected, "{}", case["name"]);
    }
}

#[test]
fn every_column_is_the_definitions() {
    for (seed, stream, token) in [(0, 0, 0), (0x299f_31d0_a409_3822, 0x8123_4567, 0xFFFF_0000_1234_5678)] {
        for (column, z) in normals(seed, stream, token, 1000).into_iter().enumerate() {
            // z + 0: the kernel adds to a clean 0, which turns -0 into 0.
            let expected = generator::normal(seed, stream, token, column as u32) + 0.0;
            assert_eq!(z.to_bits(), expected.to_bits(), "column {column}");
        }
    }
}
