//! Properties of every format on matrices of every awkward kind: ragged, tied, subnormal, spread over all exponents,
//! with NaN and infinity, down to one element.

use crate::support::FORMATS;
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use temper::numerics::block_format::{Quantized, RoundingDraw, TensorScale, quantize};
use temper::numerics::format::{Family, Format, MxScaleRule};
use temper::numerics::{e4m3, e8m0};
use temper::ops::cpu::fake_quant::{Storage, fake_quant_into};

const KEYS: [u64; 64] = {
    let mut keys = [0; 64];
    let mut row = 0;
    while row < 64 {
        keys[row] = 5 << 32 | row as u64;
        row += 1;
    }
    keys
};

fn draw(rows: usize) -> RoundingDraw<'static> {
    RoundingDraw { seed: 11, stream: 5 << 28, row_keys: &KEYS[..rows] }
}

fn definition(x: &Matrix, format: Format, scale: TensorScale) -> Quantized {
    quantize(&x.values, x.rows, x.cols, format, scale, Some(&draw(x.rows)))
}

#[derive(Clone, Debug)]
struct Matrix {
    values: Vec<f32>, // [rows, cols]
    rows: usize,
    cols: usize,
}

impl Matrix {
    fn map(&self, f: impl Fn(f32) -> f32) -> Matrix {
        Matrix { values: self.values.iter().map(|&v| f(v)).collect(), ..*self }
    }
}

/// A value of one of the awkward kinds; which of them a matrix has is drawn first, so that pure ones occur.
fn value(kinds: u32) -> BoxedStrategy<f32> {
    let ties = prop::sample::select(vec![0.25f32, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, 232.0, 464.0]);
    let kind: [BoxedStrategy<f32>; 6] = [
        prop::num::f32::NORMAL.prop_map(|v| v % 8.0).boxed(),
        (ties, -3..4i32, any::<bool>()).prop_map(|(t, k, minus)| if minus { -t } else { t } * 2f32.powi(k)).boxed(),
        prop::num::f32::ZERO.boxed(),
        prop::num::f32::SUBNORMAL.boxed(),
        prop::num::f32::NORMAL.boxed(), // all exponents: huge ratios
        (1..1 << 24i32).prop_map(|m| m as f32 * 2f32.powi(-22)).boxed(),
    ];
    let chosen: Vec<BoxedStrategy<f32>> =
        kind.into_iter().enumerate().filter(|(i, _)| kinds >> i & 1 == 1).map(|(_, kind)| kind).collect();
    prop::strategy::Union::new(chosen).boxed()
}

fn matrix(finite: bool) -> impl Strategy<Value = Matrix> {
    let shape = prop_oneof![Just((1, 1)), (1..40usize, 1..70usize)];
    let poison = prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
    (shape, 1..64u32, prop::collection::vec((any::<prop::sample::Index>(), poison), 0..3)).prop_flat_map(
        move |((rows, cols), kinds, poisons)| {
            prop::collection::vec(value(kinds), rows * cols).prop_map(move |mut values| {
                for (at, poison) in poisons.iter().filter(|_| !finite) {
                    *at.get_mut(&mut values) = *poison;
                }
                Matrix { values, rows, cols }
            })
        },
    )
}

/// Values whose scaled forms stay normal when multiplied by 2^-20 .. 2^20.
fn moderate() -> impl Strategy<Value = Matrix> {
    (1..20usize, 1..70usize).prop_flat_map(|(rows, cols)| {
        let value = (-1f32..1.0, 0..6i32).prop_map(|(v, k)| (v * 2f32.powi(k) * 4096.0).round() / 4096.0);
        prop::collection::vec(value, rows * cols).prop_map(move |values| Matrix { values, rows, cols })
    })
}

fn format_where(wanted: fn(&Format) -> bool) -> impl Strategy<Value = Format> {
    prop::sample::select(FORMATS.iter().map(|text| text.parse().unwrap()).filter(wanted).collect::<Vec<Format>>())
}

fn format() -> impl Strategy<Value = Format> {
    format_where(|_| true)
}

fn scale(format: Format) -> impl Strategy<Value = TensorScale> {
    prop_oneof![
        Just(TensorScale::Tensor),
        Just(if format.two_d { TensorScale::Tensor } else { TensorScale::Row }),
        (0.01f32..100.0).prop_map(TensorScale::Amax)
    ]
}

fn case() -> impl Strategy<Value = (Matrix, Format, TensorScale)> {
    (matrix(false), format()).prop_flat_map(|(x, format)| (Just(x), Just(format), scale(format)))
}

/// y of the operation, on x narrowed to `T` first, against the definition of what was read.
fn check_storage<T: Storage + Default>(x: &Matrix, format: Format, scale: TensorScale) -> Result<(), TestCaseError> {
    let mut stored = vec![T::default(); x.values.len()];
    T::narrow(&x.values, &mut stored);
    let mut read = x.clone();
    T::widen(&stored, &mut read.values);
    let expected = definition(&read, format, scale);
    let (mut out, mut rounded) = (stored.clone(), stored.clone());
    let stats = fake_quant_into(&stored, x.rows, x.cols, format, scale, Some(&draw(x.rows)), &mut out);
    T::narrow(&expected.dequantized, &mut rounded);
    let (mut found, mut wanted) = (read.values.clone(), read.values);
    T::widen(&out, &mut found);
    T::widen(&rounded, &mut wanted);
    for (i, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
        let same = found.to_bits() == wanted.to_bits() || (found.is_nan() && wanted.is_nan());
        prop_assert!(same, "element {i} x {} found {found} expected {wanted}", x.values[i]);
    }
    prop_assert_eq!(stats.saturated, expected.saturated);
    prop_assert_eq!(stats.nonfinite_blocks, expected.nonfinite_blocks);
    prop_assert_eq!(stats.tensor_encode_scale, expected.tensor_encode_scale);
    Ok(())
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()))
}

/// The same cases in every run; PROPTEST_CASES and PROPTEST_RNG_SEED ask for more and for others.
fn config() -> ProptestConfig {
    let mut config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = 1000;
    }
    if std::env::var_os("PROPTEST_RNG_SEED").is_none() {
        config.rng_seed = RngSeed::Fixed(2026);
    }
    config
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn the_operation_is_the_definition((x, format, scale) in case()) {
        check_storage::<f32>(&x, format, scale)?;
        check_storage::<bf16>(&x, format, scale)?;
        check_storage::<f16>(&x, format, scale)?;
    }

    /// What is stored (codes and scales) gives y, and a block is NaN exactly where one of its elements is not finite.
    #[test]
    fn codes_and_scales_give_the_values((x, format, scale) in case()) {
        let q = definition(&x, format, scale);
        let (size, blocks) = (format.block_size(x.cols), format.blocks_per_row(x.cols));
        for (i, &y) in q.dequantized.iter().enumerate() {
            let (row, block) = (i / x.cols, i % x.cols / size);
            let decode = match format.family {
                Family::Fp8 { .. } => q.fp8_scales[row],
                Family::Mxfp4 { .. } | Family::Mxfp8 { .. } => e8m0::decode(q.block_scales[row * blocks + block]),
                Family::Nvfp4 { .. } => {
                    let g = q.row_encode_scales.get(row).unwrap_or(&q.tensor_encode_scale);
                    e4m3::decode(q.block_scales[row * blocks + block]) * (1.0 / g)
                }
                // Its scale byte has no NaN of its own.
                Family::Nvfp4SingleLevel => continue,
            };
            let stored = format.decode_element(q.codes[i]) * decode;
            prop_assert!(stored.to_bits() == y.to_bits() || (stored.is_nan() && y.is_nan()), "element {i}");
        }
        let tile = |i: usize| (i / x.cols / format.block_rows(), i % x.cols / size);
        let bad: std::collections::BTreeSet<_> =
            (0..x.values.len()).filter(|&i| !x.values[i].is_finite()).map(tile).collect();
        prop_assert_eq!(q.nonfinite_blocks, bad.len());
        for (i, y) in q.dequantized.iter().enumerate() {
            prop_assert!(!bad.contains(&tile(i)) || y.is_nan(), "element {i}");
        }
    }

    #[test]
    fn the_sign_goes_through((x, format, scale) in case()) {
        let (q, negated) = (definition(&x, format, scale), definition(&x.map(|v| -v), format, scale));
        let expected: Vec<f32> = q.dequantized.iter().map(|v| -v).collect();
        prop_assert!(same_bits(&negated.dequantized, &expected));
        for ((x, y), code) in x.values.iter().zip(&q.dequantized).zip(&q.codes) {
            let sign = if format.has_e4m3_elements() { code >> 7 } else { code >> 3 };
            let minus = x.is_sign_negative();
            prop_assert!(y.is_nan() || (y.is_sign_negative() == minus && (sign == 1) == minus));
        }
    }

    /// Powers of two move through every format whose scales follow the data.
    #[test]
    fn a_power_of_two_moves_through(
        x in moderate(),
        format in format_where(|format| format.family != Family::Nvfp4SingleLevel),
        k in -20..20i32,
    ) {
        let q = definition(&x, format, TensorScale::Tensor);
        let scaled = definition(&x.map(|v| v * 2f32.powi(k)), format, TensorScale::Tensor);
        prop_assert_eq!(&scaled.codes, &q.codes);
        let expected: Vec<f32> = q.dequantized.iter().map(|v| v * 2f32.powi(k)).collect();
        prop_assert!(same_bits(&scaled.dequantized, &expected));
    }

    /// What an MX format gives, it keeps, whatever the tie rule and the draw: its scales are exact. Not mxfp8:even, where
    /// an amax rounded up to 448 asks for the next scale, on which the smallest codes are too fine.
    #[test]
    fn mx_values_stay(
        x in matrix(true),
        format in format_where(|format| match format.family {
            Family::Mxfp4 { .. } => true,
            Family::Mxfp8 { rule } => rule != MxScaleRule::Even,
            _ => false,
        }),
    ) {
        // Rounding up at the largest exponent would leave f32.
        let x = x.map(|v| v / 4.0);
        let once = Matrix { values: definition(&x, format, TensorScale::Tensor).dequantized, ..x };
        prop_assert!(same_bits(&definition(&once, format, TensorScale::Tensor).dequantized, &once.values));
    }

    /// nvfp4 keeps codes and block scales; its values may move by an f32 rounding of G.
    #[test]
    fn nvfp4_codes_stay(x in moderate(), two_d in any::<bool>()) {
        let format: Format = if two_d { "nvfp4:2d" } else { "nvfp4" }.parse().unwrap();
        let q = definition(&x, format, TensorScale::Tensor);
        // Subnormal block scales are too coarse to come back to.
        prop_assume!(q.block_scales.iter().all(|&s| s == 0 || e4m3::decode(s) >= 1.0 / 64.0));
        let again = definition(&Matrix { values: q.dequantized.clone(), ..x }, format, TensorScale::Tensor);
        prop_assert_eq!(&again.codes, &q.codes);
        prop_assert_eq!(&again.block_scales, &q.block_scales);
        for (a, b) in again.dequantized.iter().zip(&q.dequantized) {
            prop_assert!((a - b).abs() <= 4.0 * f32::EPSILON * b.abs(), "{a} {b}");
        }
    }
}
