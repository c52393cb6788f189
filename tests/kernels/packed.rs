//! matmul_w4.cu under the shim: the product with a packed weight against that with the fake-quantized one, and every code's
//! value under every kind of scale.

use std::rc::Rc;

use tch::{Kind, Tensor};
use temper::numerics::block_format::TensorScale;
use temper::numerics::error_law::ErrorLaw;
use temper::numerics::format::Format;
use temper::numerics::generator;
use temper::ops::cuda::fake_quant::{Matrix, MatrixScale};
use temper::ops::cuda::matmul::{Layout, PACKED_K, PackedScales, PackedWeight, Product, choices, matmul, prepare_as};
use temper::ops::cuda::noise::Destination;
use temper::ops::cuda::place::with_host;
use temper::ops::fake_quant::{Weight, fake_quant, fake_quant_weights};
use temper::ops::matmul_error::{ErrorDraw, RowKeys, SumsSink};
use temper::ops::noisy_linear::{self, NoisyLinearCall, Part, ProductError};

use crate::host::{ORDERS, Shim};
use crate::matmul::{Case, assert_near};
use crate::support::{Lcg, assert_bits, floats, nasty, tensor};

/// y = x Q^T: as the product of the fake-quantized weight, which is the same numbers, up to the order of sums.
#[test]
fn a_packed_weight_gives_the_fake_quantized_ones_product() {
    let mut rng = Lcg(5);
    let mut below = |n: usize| 1 + rng.next_u32() as usize % n;
    for turn in 0..6 {
        let (m, n, k) = ([1, 5, 16, 40, 70, 130][turn], below(600), PACKED_K as usize * below(6));
        for format in [Format::MXFP4, Format::NVFP4] {
            let mut case = Case::new(Layout::Nt, Kind::BFloat16, (m, n, k), turn as u64);
            let packed = PackedWeight::quantize(&Shim(0), &case.b, format).unwrap();
            case.b = fake_quant(&case.b, format, TensorScale::Tensor, None).unwrap();
            let exact = case.exact();
            let draw = ErrorDraw { law: ErrorLaw::RelativeGaussian, scale: 0.05, seed: 3, stream: 9 };
            for choice in choices(packed.layout, Kind::BFloat16, k as i64).into_iter().filter(|c| c.splits <= 3) {
                let out = tensor(&vec![f32::NAN; m * n], m, n, Kind::Float);
                let run = |error| {
                    let into = Destination::Store(&out);
                    let dense = case.product(into, error);
                    let scales = Some(packed.scales());
                    let product = Product { layout: packed.layout, b: &packed.codes, scales, ..dense };
                    let shim = ORDERS[turn % ORDERS.len()];
                    prepare_as(&shim, &product, choice).unwrap().run(&shim).unwrap();
                    floats(&out)
                };
                let clean = run(None);
                assert_near(&out, &exact, k, &format!("{format} {:?} {choice:?}", (m, n, k)));
                let noisy: Vec<f32> = (0..m * n)
                    .map(|i| {
                        let key = case.keys.host()[i / n];
                        draw.law.apply(clean[i], draw.scale, generator::normal(3, 9, key, (i % n) as u32))
                    })
                    .collect();
                assert_bits(&run(Some(&draw)), &noisy, &format!("{format} {:?} {choice:?}, noisy", (m, n, k)));
            }
        }
    }
}

/// A linear layer over a packed weight is the one over Q(w): the same draws, bias and measurement, to rounding; and weights that
/// share a tensor amax are packed with it.
#[test]
fn a_packed_linear_layer_is_the_fake_quantized_one() {
    let (m, n, k) = (7, 70, PACKED_K as usize);
    for format in [Format::MXFP4, Format::NVFP4] {
        let case = Case::new(Layout::Nt, Kind::BFloat16, (m, n, k), 3);
        let larger = case.b.f_mul_scalar(3.0).unwrap();
        let weights = [&case.b, &larger].map(|x| Weight { x, scale_group: 4, draw: None });
        let matrices = [&case.b, &larger].map(|x| Matrix { x, scale: MatrixScale::Group(4), draw: None });
        let packed: Vec<Rc<PackedWeight>> =
            PackedWeight::quantize_all(&Shim(0), &matrices, format).unwrap().into_iter().map(Rc::new).collect();
        let quantized = fake_quant_weights(&weights, format, false).unwrap();
        let bias = Tensor::from_slice(&vec![0.25f32; n]);
        let draw = ErrorDraw { law: ErrorLaw::RelativeGaussian, scale: 0.05, seed: 3, stream: 9 };
        for draw in [None, Some(draw)] {
            for (packed, (quantized, _)) in packed.iter().zip(&quantized) {
                let call = || {
                    let sink = draw.is_some().then(SumsSink::default);
                    let forward = ProductError { draw: draw.clone(), sink };
                    NoisyLinearCall { forward, ..NoisyLinearCall::clean(case.keys.clone(), false) }
                };
                let (ours, dense) = (call(), call());
                let part = |call: &NoisyLinearCall| Part {
                    x: case.a.shallow_clone(),
                    weight: noisy_linear::Weight::Packed(packed.clone()),
                    bias: Some(&bias),
                    call: call.clone(),
                };
                let y = with_host(&Shim(0), || noisy_linear::forward_together(&[part(&ours)])).unwrap().remove(0);
                // Two in one launch, each as alone.
                let unmeasured = NoisyLinearCall { forward: ProductError { draw: draw.clone(), sink: None }, ..call() };
                let both =
                    with_host(&Shim(5), || noisy_linear::forward_together(&[part(&unmeasured), part(&unmeasured)]))
                        .unwrap();
                assert!(both.iter().all(|both| floats(both) == floats(&y)), "{format}: together");
                let want =
                    noisy_linear::forward(&case.a, quantized, Some(&bias), &dense, true, Kind::BFloat16).unwrap();
                let (y, want) = (floats(&y), floats(&want));
                let largest = want.iter().fold(0f32, |a, w| a.max(w.abs()));
                for (y, want) in y.iter().zip(&want) {
                    assert!((y - want).abs() <= largest / 100.0, "{format}: {y}, expected {want}");
                }
                if let (Some(ours), Some(dense)) = (ours.forward.sink, dense.forward.sink) {
                    let taken = SumsSink::take_all(&[ours, dense]).unwrap();
                    let relative = |i: usize| (taken[i].1.error_sq / taken[i].1.clean_sq).sqrt();
                    assert_eq!((taken[0].0, taken[0].1.elements), (taken[1].0, taken[1].1.elements));
                    assert!((relative(0) / relative(1) - 1.0).abs() < 0.01, "{} {}", relative(0), relative(1));
                }
            }
        }
    }
}

/// A product with rows of the unit matrix reads out single weights: every code under every kind of scale is the value that
/// fake quantization gives.
#[test]
fn packed_weights_have_the_very_values() {
    let (n, k) = (256, 256);
    let ones: Vec<f32> = (0..k * k).map(|i| if i / k == i % k { 1.0 } else { 0.0 }).collect();
    let unit = tensor(&ones, k, k, Kind::BFloat16);
    for format in [Format::MXFP4, Format::NVFP4] {
        let weights = [
            nasty(n, k, 3, false),
            nasty(n, k, 4, false).iter().map(|v| v * 1e-3).collect::<Vec<f32>>(),
            // Scales of every exponent, the subnormal ones among them.
            (0..n * k).map(|i| (Lcg(i as u64).value()) * (2.0f32).powi(i as i32 / k as i32 - 140)).collect(),
        ];
        for (number, weight) in weights.iter().enumerate() {
            let weight = tensor(&weight.iter().map(|v| v.clamp(-1e38, 1e38)).collect::<Vec<_>>(), n, k, Kind::BFloat16);
            let packed = PackedWeight::quantize(&Shim(0), &weight, format).unwrap();
            let expected = fake_quant(&weight, format, TensorScale::Tensor, None).unwrap().transpose(0, 1).contiguous();
            let keys = RowKeys::consecutive(0, k);
            for choice in choices(packed.layout, Kind::BFloat16, k as i64).into_iter().filter(|c| c.splits == 1) {
                let out = tensor(&vec![f32::NAN; n * k], k, n, Kind::BFloat16);
                let product = Product {
                    layout: packed.layout,
                    a: &unit,
                    b: &packed.codes,
                    scales: Some(packed.scales()),
                    into: Destination::Store(&out),
                    bias: None,
                    error: None,
                    keys: &keys,
                    sums: None,
                };
                prepare_as(&Shim(1), &product, choice).unwrap().run(&Shim(1)).unwrap();
                // A sum with zeros has no negative zero.
                let without_sign = |t: &Tensor| floats(t).iter().map(|v| v + 0.0).collect::<Vec<f32>>();
                assert_bits(
                    &without_sign(&out),
                    &without_sign(&expected),
                    &format!("{format} weight {number} {choice:?}"),
                );
            }
        }
    }
}

#[test]
fn packed_operands_that_do_not_fit_are_named() {
    let case = Case::new(Layout::Nt, Kind::BFloat16, (8, 16, 256), 1);
    let packed = PackedWeight::quantize(&Shim(0), &case.b, Format::NVFP4).unwrap();
    let out = tensor(&[0.0; 8 * 16], 8, 16, Kind::Float);
    let dense = case.product(Destination::Store(&out), None);
    let good = Product { layout: packed.layout, b: &packed.codes, scales: Some(packed.scales()), ..dense };
    matmul(&Shim(0), &good).unwrap();
    let error = |product: Product| matmul(&Shim(0), &product).err().unwrap().to_string();
    let no_amax = PackedScales { amax: None, ..packed.scales() };
    let (short_a, short_b) = (case.a.narrow(1, 0, 160).contiguous(), packed.codes.narrow(1, 0, 80).contiguous());
    let (wide, ones) = (case.a.to_kind(Kind::Half), packed.codes.narrow(0, 0, 1).contiguous());
    for (text, part) in [
        (error(Product { scales: None, ..good }), "scales: found none"),
        (error(Product { scales: Some(no_amax), ..good }), "amax: found none"),
        (error(Product { layout: Layout::NtMxfp4, ..good }), "matmul: scales"),
        (error(Product { a: &wide, ..good }), "matmul: a: found dtype Half"),
        (error(Product { b: &ones, ..good }), "matmul: out"),
        (error(Product { a: &short_a, b: &short_b, ..good }), "k: found 160, expected a multiple of 128"),
    ] {
        assert!(text.contains(part), "{text}");
    }
    assert!(PackedWeight::quantize(&Shim(0), &case.b, "nvfp4:4over6".parse().unwrap()).is_err());
}
