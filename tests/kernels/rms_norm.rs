//! rms_norm.cu: the norm against its formula in f64, the addition and its rounding against torch's to the bit, gradients through
//! autograd against those of the torch chain in f64.

use tch::{Device, Kind, Tensor};
use temper::ops::autograd::run_backward;
use temper::ops::cuda::rms_norm::{Norm, NormBackward, backward, forward};
use temper::ops::rms_norm::{definition, on_device};

use crate::host::{ORDERS, Shim};
use crate::support::{Lcg, assert_bits, floats, tensor};

const EPS: f64 = 1e-6;
const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];
/// One element, ragged, whole, more octets than threads, the widest.
const SHAPES: [(usize, usize); 9] =
    [(1, 1), (3, 7), (2, 64), (5, 250), (9, 896), (2, 2048), (2, 2049), (3, 3584), (1, 8192)];

/// Ordinary values, outliers of a thousand, zeros of both signs, tiny values.
fn values(rows: usize, cols: usize, seed: u64) -> Vec<f32> {
    let mut rng = Lcg(seed);
    let value = |i: usize| match i % 61 {
        7 => 1000.0 * rng.value(),
        13 => [0.0, -0.0][i % 2],
        21 => 1e-7 * rng.value(),
        _ => rng.value(),
    };
    (0..rows * cols).map(value).collect()
}

fn stream(shape: (usize, usize), seed: u64, kind: Kind) -> Tensor {
    tensor(&values(shape.0, shape.1, seed), shape.0, shape.1, kind)
}

fn weight(cols: usize, seed: u64) -> Tensor {
    let mut rng = Lcg(seed);
    Tensor::from_slice(&(0..cols).map(|_| 1.0 + 0.3 * rng.value()).collect::<Vec<f32>>())
}

fn double(x: &Tensor) -> Tensor {
    x.detach().to_kind(Kind::Double)
}

/// The formula in f64 of s as it was rounded.
fn exact(s: &Tensor, weight: &Tensor) -> Tensor {
    let mean_square = s.square().mean_dim([-1i64].as_slice(), true, Kind::Double);
    s * (mean_square + EPS).rsqrt() * weight
}

/// Half a unit in the last place, over the value.
fn rounding(kind: Kind) -> f64 {
    match kind {
        Kind::BFloat16 => 1.0 / 256.0 * 1.001,
        Kind::Half => 1.0 / 2048.0 * 1.001,
        _ => 0.0,
    }
}

/// |found - expected| <= relative |expected| + absolute.
fn assert_near(found: &Tensor, expected: &Tensor, relative: f64, absolute: f64, what: &str) {
    assert_eq!(found.size(), expected.size(), "{what}");
    let slack = expected.abs() * relative + absolute;
    let excess = ((double(found) - expected).abs() - slack).max().double_value(&[]);
    assert!(excess <= 0.0, "{what}: off by {excess:e} more than allowed");
}

#[test]
fn outputs_are_the_formula_with_one_rounding() {
    for (number, shape) in SHAPES.into_iter().enumerate() {
        for kind in KINDS {
            for with_delta in [false, true] {
                let (x, delta, w) = (stream(shape, 1, kind), stream(shape, 2, kind), weight(shape.1, 3));
                let delta = with_delta.then_some(&delta);
                let clean = weight(shape.1, 3) + 1e-3;
                let shim = ORDERS[number % ORDERS.len()];
                let what = format!("{shape:?} {kind:?} delta {with_delta} {shim:?}");
                let norm = Norm { x: &x, delta, weight: &w, clean: Some(&clean), eps: EPS as f32 };
                let normed = forward(&shim, &norm).unwrap();
                let s = definition(&x, delta, &w, None, EPS).unwrap().residual;
                if let Some(residual) = &normed.residual {
                    assert_bits(&floats(residual), &floats(&s), &what);
                }
                // Subnormal f16 values round by their own step.
                let smallest = if kind == Kind::Half { 6e-8 } else { 1e-38 };
                let expected = exact(&double(&s), &double(&w));
                assert_near(&normed.y, &expected, rounding(kind) + 1e-6, smallest, &what);
                let with_clean = forward(&shim, &Norm { weight: &clean, clean: None, ..norm }).unwrap();
                let differing = normed.y.not_equal_tensor(&with_clean.y).sum(Kind::Int64).int64_value(&[]);
                assert_eq!(normed.changed.unwrap().int64_value(&[0]), differing, "{what}");
                assert!(shape.1 < 100 || differing > 0, "{what}");
            }
        }
    }
}

#[test]
fn a_row_with_nan_is_nan_and_no_other() {
    let x = stream((3, 100), 5, Kind::BFloat16);
    let _ = x.get(1).get(77).fill_(f64::NAN);
    let norm = Norm { x: &x, delta: None, weight: &weight(100, 1), clean: None, eps: EPS as f32 };
    let y = forward(&Shim(1), &norm).unwrap().y;
    let rows = Vec::<i64>::try_from(y.isnan().to_kind(Kind::Int64).sum_dim_intlist([1i64].as_slice(), false, None));
    assert_eq!(rows.unwrap(), [0, 100, 0]);
}

/// (loss's gradients of x, delta, weight) through `f`, with fixed gradients arriving at residual and y.
fn gradients(
    inputs: [&Tensor; 3],
    kind: Kind,
    f: impl Fn(&Tensor, &Tensor, &Tensor) -> (Tensor, Tensor),
) -> Vec<Tensor> {
    let [x, delta, weight] = inputs;
    let weight_kind = if kind == Kind::Double { Kind::Double } else { Kind::Float };
    let leaf = |t: &Tensor, kind| t.detach().to_kind(kind).copy().set_requires_grad(true);
    let leaves = [leaf(x, kind), leaf(delta, kind), leaf(weight, weight_kind)];
    let (residual, y) = f(&leaves[0], &leaves[1], &leaves[2]);
    let shape = (x.size()[0] as usize, x.size()[1] as usize);
    // Of the inputs' dtype, so that both sides see the same numbers.
    let (ds, dy) = (stream(shape, 8, x.kind()).to_kind(kind), stream(shape, 9, x.kind()).to_kind(kind));
    run_backward(&((residual * ds).sum(kind) + (y * dy).sum(kind))).unwrap();
    leaves.iter().map(Tensor::grad).collect()
}

#[test]
fn gradients_are_those_of_the_chain_in_f64() {
    for (number, shape) in SHAPES.into_iter().enumerate() {
        for kind in KINDS {
            let (x, w) = (stream(shape, 1, kind), weight(shape.1, 3));
            // Without a rounding of the sum, which the chain in f64 would not make.
            let delta = x.zeros_like();
            let shim = ORDERS[number % ORDERS.len()];
            let what = format!("{shape:?} {kind:?} {shim:?}");
            let found = gradients([&x, &delta, &w], kind, |x, delta, w| {
                let normed = on_device(shim, x, Some(delta), w, None, EPS).unwrap();
                (normed.residual, normed.y)
            });
            let expected = gradients([&x, &delta, &w], Kind::Double, |x, delta, w| {
                let s = x + delta;
                let y = exact(&s, w);
                (s, y)
            });
            assert!(found[0].kind() == kind && found[2].kind() == Kind::Float);
            assert_bits(&floats(&found[0]), &floats(&found[1]), &what);
            let largest = expected[0].abs().max().double_value(&[]);
            assert_near(&found[0], &expected[0], rounding(kind) + 1e-6, 1e-6 * largest, &what);
            let largest = expected[2].abs().max().double_value(&[]);
            assert_near(&found[2], &expected[2], 1e-5, 1e-5 * largest, &what);
        }
    }
}

#[test]
fn without_delta_and_with_a_frozen_weight() {
    let (x, w) = (stream((5, 200), 1, Kind::Float), weight(200, 3));
    let gradient = |f: &dyn Fn(&Tensor) -> Tensor| {
        let x = x.copy().set_requires_grad(true);
        run_backward(&(f(&x) * &stream((5, 200), 4, Kind::Float)).sum(Kind::Float)).unwrap();
        x.grad()
    };
    let found = gradient(&|x| on_device(Shim(77), x, None, &w, None, EPS).unwrap().y);
    let expected = gradient(&|x| definition(x, None, &w, None, EPS).unwrap().y);
    let largest = expected.abs().max().double_value(&[]);
    assert_near(&found, &double(&expected), 1e-5, 1e-6 * largest, "dx");
    // Nothing arrives at y: what arrives at x + delta goes on as it is.
    let (a, b) = (x.copy().set_requires_grad(true), x.copy().set_requires_grad(true));
    run_backward(&on_device(Shim(0), &a, Some(&b), &w, None, EPS).unwrap().residual.sum(Kind::Float)).unwrap();
    assert_eq!([floats(&a.grad()), floats(&b.grad())].concat(), vec![1.0; 2000]);
    assert!(!on_device(Shim(0), &x, None, &w, None, EPS).unwrap().y.requires_grad());
}

#[test]
fn the_order_of_threads_and_a_second_computation_change_no_bit() {
    let (s, dy, w) = (stream((37, 300), 1, Kind::BFloat16), stream((37, 300), 2, Kind::BFloat16), weight(300, 3));
    let back = NormBackward { s: &s, dy: &dy, ds: Some(&dy), weight: &w, eps: EPS as f32, wants_dweight: true };
    let all = |shim: &Shim| {
        let norm = Norm { x: &s, delta: Some(&dy), weight: &w, clean: None, eps: EPS as f32 };
        let (normed, gradients) = (forward(shim, &norm).unwrap(), backward(shim, &back).unwrap());
        [normed.y, gradients.dx, gradients.dweight.unwrap()].map(|t| floats(&t))
    };
    let first = all(&Shim(0));
    assert!(ORDERS.iter().all(|shim| all(shim) == first));
    // Sums of rows far from the last: a block has some, the blocks' are added.
    let norm = |rows: std::ops::Range<i64>| {
        let part = |t: &Tensor| t.narrow(0, rows.start, rows.end - rows.start).copy();
        let back = NormBackward { s: &part(&s), dy: &part(&dy), ds: None, ..back };
        double(&backward(&Shim(0), &back).unwrap().dweight.unwrap())
    };
    let parts = norm(0..9) + norm(9..37);
    assert_near(&norm(0..37), &parts, 1e-5, 1e-4, "dw of all rows is that of its parts together");
}

#[test]
fn what_does_not_fit_is_named() {
    let (x, w) = (stream((2, 16), 1, Kind::Float), weight(16, 1));
    let error = |norm: Norm| forward(&Shim(0), &norm).err().unwrap().to_string();
    let norm = Norm { x: &x, delta: None, weight: &w, clean: None, eps: 1e-6 };
    let wide = Tensor::ones([1, 8200], (Kind::Float, Device::Cpu));
    for (text, part) in [
        (error(Norm { weight: &weight(15, 1), ..norm }), "weight: found shape [15]"),
        (error(Norm { delta: Some(&x.to_kind(Kind::Half)), ..norm }), "delta: found dtype Half"),
        (error(Norm { x: &wide, ..norm }), "8200 columns"),
        (error(Norm { x: &x.to_kind(Kind::Double), ..norm }), "Double"),
        (error(Norm { x: &w, ..norm }), "expected [rows, hidden]"),
    ] {
        assert!(text.contains("rms_norm") && text.contains(part), "{text}");
    }
}
