//! The generator against its vectors, and AVX2 = portable = definition.

use crate::support::{Random, shared};
use serde_json::Value;
use temper::numerics::generator::{
    normal, normal_integer, philox4x32_7, uniform_f32, uniform_u8, uniform_u16, uniform_u16_fragment, uniform_u32,
};
use temper::numerics::philox::philox4x32;
use temper::ops::cpu::normals::{Path, normals_into, normals_into_by};

fn integers(case: &Value, key: &str) -> Vec<i64> {
    let list = case[key].as_array().unwrap();
    list.iter().map(|v| v.as_i64().unwrap()).collect()
}

fn hex(v: &Value) -> u64 {
    u64::from_str_radix(v.as_str().unwrap().trim_start_matches("0x"), 16).unwrap()
}

/// Counts the lists it knows, so that a value in the file that nothing compares fails the test.
#[test]
fn every_value_of_the_vectors() {
    let Some(path) = shared("vectors/noise_generator.json") else {
        return;
    };
    let file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    for case in file["cases"].as_array().unwrap() {
        let (seed, token) = (hex(&case["seed"]), hex(&case["token"]));
        let stream = case["stream"].as_u64().unwrap() as u32;
        let by_n = |of: &dyn Fn(u32) -> i64, count: usize| (0..count as u32).map(of).collect::<Vec<i64>>();
        for (key, value) in case.as_object().unwrap() {
            let count = value.as_array().map_or(0, Vec::len);
            match key.as_str() {
                "name" | "seed" | "stream" | "token" => {}
                "philox7_call0" | "philox7_call9" | "philox10_call0" | "philox10_call9" => {
                    let call = if key.ends_with('9') { 9 } else { 0 };
                    let counter = [call, stream, token as u32, (token >> 32) as u32];
                    let key_words = [seed as u32, (seed >> 32) as u32];
                    let words = match key.starts_with("philox7") {
                        true => philox4x32_7(key_words, counter),
                        false => philox4x32::<10>(key_words, counter),
                    };
                    let expected: Vec<u64> = value.as_array().unwrap().iter().map(hex).collect();
                    assert_eq!(words.map(u64::from).to_vec(), expected, "{key}");
                }
                "S7_columns_0_127" => {
                    let s = by_n(&|c| normal_integer(seed, stream, token, c) as i64, count);
                    assert_eq!(s, integers(case, key));
                }
                "S7_columns_123456768_123456783" => {
                    let s = by_n(&|c| normal_integer(seed, stream, token, 123_456_768 + c) as i64, count);
                    assert_eq!(s, integers(case, key));
                }
                // The ten-round variant is not part of this version; its Philox words are compared above.
                "S10_columns_0_127" => {}
                "z7_bits_columns_0_15" => {
                    for (c, bits) in value.as_array().unwrap().iter().enumerate() {
                        assert_eq!(normal(seed, stream, token, c as u32).to_bits() as u64, hex(bits));
                    }
                }
                "u8_7_columns_0" => {
                    assert_eq!(by_n(&|n| uniform_u8(seed, stream, token, n) as i64, count), integers(case, key));
                }
                "u16_7_columns_0" => {
                    assert_eq!(by_n(&|n| uniform_u16(seed, stream, token, n) as i64, count), integers(case, key));
                }
                "u32_7_columns_0" => {
                    assert_eq!(by_n(&|n| uniform_u32(seed, stream, token, n) as i64, count), integers(case, key));
                }
                "u16_frag_7_columns_0" => {
                    let u = by_n(&|n| uniform_u16_fragment(seed, stream, token, n) as i64, count);
                    assert_eq!(u, integers(case, key));
                }
                other => panic!("the vectors hold `{other}`, which no comparison knows"),
            }
        }
    }
}

#[test]
fn bulk_paths_equal_the_definition() {
    let mut random = Random(1);
    let lengths = [0, 1, 2, 7, 8, 15, 16, 63, 64, 65, 127, 128, 129, 191, 192, 193, 896, 1000];
    let random_lengths: Vec<usize> = (0..40).map(|_| random.below(700)).collect();
    for length in lengths.into_iter().chain(random_lengths) {
        let (seed, stream, token) = (random.next(), random.next() as u32, random.next());
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        let expected: Vec<f32> = (0..length as u32).map(|c| normal(seed, stream, token, c)).collect();
        for path in Path::ALL {
            let mut out = vec![f32::NAN; length];
            normals_into_by(path, seed, stream, token, &mut out);
            assert_eq!(bits(&out), bits(&expected), "{path:?} {length}");
        }
        let mut out = vec![f32::NAN; length];
        normals_into(seed, stream, token, &mut out);
        assert_eq!(bits(&out), bits(&expected));
    }
}

#[test]
fn the_sampling_uniform_keeps_24_bits_of_word_zero() {
    let mut random = Random(9);
    for _ in 0..1000 {
        let (seed, stream, token) = (random.next(), random.next() as u32, random.next());
        let u = uniform_f32(seed, stream, token);
        assert!((0.0..1.0).contains(&u));
        assert_eq!(u as f64 * 16_777_216.0, (uniform_u32(seed, stream, token, 0) >> 8) as f64);
    }
}
