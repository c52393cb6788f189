//! Errors of each format on standard normal values (numerics.md section 2, gates).

use crate::support::Random;
use temper::numerics::block_format::{RoundingDraw, TensorScale, quantize};
use temper::numerics::format::Format;
use temper::numerics::noise_key::row_key;
use temper::numerics::tensor_error::{TensorError, TensorErrorSums};
use temper::ops::cpu::fake_quant::fake_quant_into;

const ROWS: usize = 1024;
const COLS: usize = 1024;

fn normals(sigma: f32) -> Vec<f32> {
    let mut random = Random(2026);
    (0..ROWS * COLS).map(|_| random.normal() * sigma).collect()
}

fn measure(format: &str, sigma: f32) -> TensorError {
    let x = normals(sigma);
    let format: Format = format.parse().unwrap();
    let keys: Vec<u64> = (0..ROWS as u32).map(|row| row_key(0, row)).collect();
    let draw = RoundingDraw { seed: 0, stream: 5 << 28, row_keys: &keys };
    let q = quantize(&x, ROWS, COLS, format, TensorScale::Tensor, Some(&draw));
    let mut fast = vec![0.0; x.len()];
    let stats = fake_quant_into(&x, ROWS, COLS, format, TensorScale::Tensor, Some(&draw), &mut fast);
    assert_eq!(fast, q.dequantized);
    assert_eq!((stats.saturated, stats.nonfinite_blocks), (q.saturated, 0));
    let error = TensorErrorSums::of(&x, &q.dequantized, q.saturated as u64).finish();
    println!(
        "{format} sigma {sigma}: {:.3} dB, relative error {:.2} %, deadzone {:.2} %, saturated {:.3} %, gain {:.5}",
        error.sqnr_db,
        100.0 * error.relative_error,
        100.0 * error.deadzone_ratio,
        100.0 * error.saturation_ratio,
        error.gain
    );
    error
}

fn assert_near(value: f64, expected: f64, tolerance: f64) {
    assert!((value - expected).abs() <= tolerance, "{value}, expected {expected} +- {tolerance}");
}

#[test]
fn nvfp4_does_not_depend_on_the_scale_of_the_data() {
    for sigma in [1.0, 0.02, 1e-6, 3e8] {
        let error = measure("nvfp4", sigma);
        assert_near(error.sqnr_db, 20.43, 0.03);
        assert_near(error.deadzone_ratio, 0.068, 0.0005);
        if sigma >= 0.02 {
            // The 1e-10 in its denominator shows below.
            assert_near(error.relative_error, 0.179, 0.0005);
        }
    }
}

#[test]
fn mxfp4_by_scale_rule() {
    assert_near(measure("mxfp4", 1.0).sqnr_db, 18.8, 0.2);
    assert_near(measure("mxfp4:even", 1.0).sqnr_db, 19.0, 0.1);
    assert_near(measure("mxfp4:rceil", 1.0).sqnr_db, 18.65, 0.15);
    assert_eq!(measure("mxfp4:rceil", 0.02).saturation_ratio, 0.0);
}

#[test]
fn single_level_reproduces_the_originals_figures() {
    let error = measure("nvfp4_single_level", 0.02);
    assert_near(error.sqnr_db, 17.7, 0.05);
    assert_near(error.relative_error, 0.298, 0.0005);
    assert_near(error.deadzone_ratio, 0.155, 0.0005);
}

#[test]
fn the_other_formats() {
    for (format, sqnr_db, tolerance) in
        [("nvfp4:2d", 19.07, 0.03), ("nvfp4:4over6", 21.2, 0.05), ("mxfp8", 30.6, 0.1), ("fp8:tensor", 31.5, 0.1)]
    {
        assert_near(measure(format, 1.0).sqnr_db, sqnr_db, tolerance);
    }
    // Their scales follow the data.
    assert_near(measure("nvfp4:2d", 1e-6).sqnr_db, 19.07, 0.03);
    assert_near(measure("nvfp4:4over6", 1e-6).sqnr_db, 21.2, 0.05);
    assert_near(measure("fp8:tensor", 3e8).sqnr_db, 31.5, 0.1);
}

/// Rounding at random has twice the error power of rounding to nearest (3 dB), and its scales leave room. Nothing clips.
#[test]
fn stochastic_rounding_pays_in_power_alone() {
    for (format, nearest) in [("nvfp4:sr", "nvfp4"), ("mxfp4:sr", "mxfp4:rceil"), ("mxfp8:sr", "mxfp8:rceil")] {
        let (random, nearest) = (measure(format, 1.0), measure(nearest, 1.0));
        let cost = nearest.sqnr_db - random.sqnr_db;
        assert!((2.9..4.5).contains(&cost), "{format}: {cost} dB");
        assert_eq!(random.saturation_ratio, 0.0, "{format}");
        assert_near(random.gain, 1.0, 2e-3);
    }
}
