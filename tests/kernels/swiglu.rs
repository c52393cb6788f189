//! swiglu.cu against its formula in f64 with the roundings of torch's chain, and its gradients against the chain's.

use tch::{Kind, Tensor};
use temper::ops::autograd::run_backward;
use temper::ops::cuda::swiglu::forward;
use temper::ops::swiglu::{definition, on_device};

use crate::host::{ORDERS, Shim};
use crate::support::{Lcg, assert_bits, floats, rounded, tensor};

const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];
/// One element, less than an octet, a ragged end, several blocks.
const SHAPES: [(usize, usize); 5] = [(1, 1), (1, 7), (3, 65), (2, 64), (5, 1000)];

/// Ordinary values, where e^-g is tiny or infinite, zeros of both signs, tiny values.
fn values((rows, cols): (usize, usize), seed: u64, kind: Kind) -> Tensor {
    let mut rng = Lcg(seed);
    let value = |i: usize| match i % 37 {
        5 => 30.0 * rng.value(),
        11 => [0.0, -0.0][i % 2],
        17 => [-100.0, 100.0, -88.0][i % 3],
        23 => 1e-6 * rng.value(),
        _ => 2.0 * rng.value(),
    };
    tensor(&(0..rows * cols).map(value).collect::<Vec<f32>>(), rows, cols, kind)
}

/// A unit in the last place over the value, twice: where the exponential's last bits decide a rounding.
fn slack(kind: Kind) -> f32 {
    match kind {
        Kind::BFloat16 => 2.0 / 128.0,
        Kind::Half => 2.0 / 1024.0,
        _ => 1e-6,
    }
}

/// Nearly all the same bits, and all within two units.
fn assert_close(found: &[f32], expected: &[f32], kind: Kind, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let mut differing = 0;
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let same = f.to_bits() == e.to_bits() || (f.is_nan() && e.is_nan());
        let smallest = if kind == Kind::Half { 2e-7 } else { 1e-37 };
        assert!(
            same || (f - e).abs() <= slack(kind) * e.abs() + smallest,
            "{what}: element {i}: {f:e}, expected {e:e}"
        );
        differing += usize::from(!same);
    }
    assert!(kind == Kind::Float || differing * 50 <= found.len(), "{what}: {differing} of {} differ", found.len());
}

#[test]
fn outputs_are_the_formula_with_two_roundings() {
    for (number, shape) in SHAPES.into_iter().enumerate() {
        for kind in KINDS {
            let (gate, up) = (values(shape, 1, kind), values(shape, 2, kind));
            let shim = ORDERS[number % ORDERS.len()];
            let y = forward(&shim, &gate, &up).unwrap();
            let silu = |g: &f32| (f64::from(*g) / (1.0 + (-f64::from(*g)).exp())) as f32;
            let h = rounded(&floats(&gate).iter().map(silu).collect::<Vec<f32>>(), kind);
            let expected: Vec<f32> = h.iter().zip(floats(&up)).map(|(h, u)| h * u).collect();
            assert_close(&floats(&y), &rounded(&expected, kind), kind, &format!("{shape:?} {kind:?} {shim:?}"));
        }
    }
}

#[test]
fn values_and_gradients_are_the_chains() {
    for shape in SHAPES {
        for kind in KINDS {
            let (gate, up, dy) = (values(shape, 1, kind), values(shape, 2, kind), values(shape, 3, kind) * 0.01);
            let through = |f: &dyn Fn(&Tensor, &Tensor) -> Tensor| {
                let leaves = [&gate, &up].map(|t| t.copy().set_requires_grad(true));
                let y = f(&leaves[0], &leaves[1]);
                run_backward(&(&y * &dy).sum(kind)).unwrap();
                [floats(&y.detach()), floats(&leaves[0].grad()), floats(&leaves[1].grad())]
            };
            let found = through(&|gate, up| on_device(Shim(77), gate, up).unwrap());
            let expected = through(&|gate, up| definition(gate, up).unwrap());
            for (which, (found, expected)) in ["y", "dgate", "dup"].iter().zip(found.iter().zip(&expected)) {
                // 1 + g (1 - sigma) cancels where g is near -1.28: compare with what was added.
                let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                if *which != "dgate" {
                    assert_close(found, expected, kind, &format!("{which} {shape:?} {kind:?}"));
                }
                let far = found
                    .iter()
                    .zip(expected)
                    .find(|(f, e)| (**f - **e).abs() > slack(kind) * e.abs() + 1e-5 * largest);
                assert!(far.is_none(), "{which} {shape:?} {kind:?}: {far:?}");
            }
        }
    }
}

#[test]
fn where_the_exponential_overflows() {
    let gate = tensor(&[f32::NEG_INFINITY, -1e30, 1e30, f32::INFINITY, f32::NAN, -89.0], 1, 6, Kind::Float);
    let (up, one) = (gate.ones_like(), Shim(1));
    let y = floats(&forward(&one, &gate, &up).unwrap());
    let expected = floats(&definition(&gate, &up).unwrap());
    assert!(y[0].is_nan() && expected[0].is_nan() && y[4].is_nan());
    assert_eq!(y[2..4], expected[2..4]);
    assert!(y[1] == 0.0 && y[1].is_sign_negative() && expected[1] == 0.0 && y[5].abs() < 1e-36);
}

#[test]
fn an_offset_that_breaks_alignment_changes_no_bit() {
    let (gate, up) = (values((1, 200), 1, Kind::BFloat16), values((1, 200), 2, Kind::BFloat16));
    let whole = floats(&forward(&Shim(0), &gate, &up).unwrap());
    let (gate, up) = (gate.narrow(1, 3, 190), up.narrow(1, 3, 190));
    assert_bits(&floats(&forward(&Shim(1), &gate, &up).unwrap()), &whole[3..193], "from element 3 on");
    let text = forward(&Shim(0), &gate, &up.to_kind(Kind::Half)).err().unwrap().to_string();
    assert!(text.contains("swiglu: up") && text.contains("Half"), "{text}");
}
