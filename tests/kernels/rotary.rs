//! rotary.cu against the chain of torch's operations, forward and backward, to the bit.

use tch::{Kind, Tensor};
use temper::ops::autograd::run_backward;
use temper::ops::cuda::rotary::{Append, Rotation, rotate, rotate_and_append};
use temper::ops::rotary::{definition, on_device};

use crate::host::{ORDERS, Shim};
use crate::support::{Lcg, assert_bits, floats};

const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];
/// (tokens, heads, kv_heads, dim): one pair, ragged halves, whole ones, more than a block.
const SHAPES: [(i64, i64, i64, i64); 6] =
    [(1, 1, 1, 2), (3, 2, 1, 10), (5, 4, 2, 16), (2, 14, 2, 64), (9, 12, 2, 128), (1, 3, 3, 24)];

fn values(shape: &[i64], seed: u64, kind: Kind) -> Tensor {
    let mut rng = Lcg(seed);
    let count = shape.iter().product::<i64>() as usize;
    let value = |i: usize| match i % 29 {
        3 => [0.0, -0.0][i % 2],
        7 => 300.0 * rng.value(),
        _ => rng.value(),
    };
    Tensor::from_slice(&(0..count).map(value).collect::<Vec<f32>>()).view(shape).to_kind(kind)
}

#[test]
fn values_and_gradients_are_the_chains_to_the_bit() {
    for (number, (tokens, heads, kv_heads, dim)) in SHAPES.into_iter().enumerate() {
        for kind in KINDS {
            let shim = ORDERS[number % ORDERS.len()];
            let what = format!("{tokens} tokens, {heads} and {kv_heads} heads of {dim}, {kind:?}, {shim:?}");
            let angle = values(&[tokens, 1, dim], 5, Kind::Float);
            let (cos, sin) = (angle.cos(), (&angle + 0.5).sin());
            let (q, k) = (values(&[tokens, heads, dim], 1, kind), values(&[tokens, kv_heads, dim], 2, kind));
            let (dq, dk) = (values(&[tokens, heads, dim], 3, kind), values(&[tokens, kv_heads, dim], 4, kind));
            let through = |f: &dyn Fn(&Tensor, &Tensor) -> (Tensor, Tensor)| {
                let leaves = [&q, &k].map(|t| t.copy().set_requires_grad(true));
                let (rotated_q, rotated_k) = f(&leaves[0], &leaves[1]);
                run_backward(&((&rotated_q * &dq).sum(kind) + (&rotated_k * &dk).sum(kind))).unwrap();
                [rotated_q.detach(), rotated_k.detach(), leaves[0].grad(), leaves[1].grad()].map(|t| floats(&t))
            };
            let found = through(&|q, k| on_device(shim, q, k, &cos, &sin).unwrap());
            let chain = |x: &Tensor| definition(x, &cos, &sin).unwrap();
            let expected = through(&|q, k| (chain(q), chain(k)));
            for (found, expected) in found.iter().zip(&expected) {
                // A sum with zero may have either sign.
                let plus = |x: &[f32]| x.iter().map(|v| v + 0.0).collect::<Vec<f32>>();
                assert_bits(&plus(found), &plus(expected), &what);
            }
        }
    }
}

/// In the launch of a decode step: the bits of a rotation, and of copies to the rows' places, where nothing else is written.
#[test]
fn keys_and_values_are_put_at_their_places() {
    for (number, (rows, heads, kv_heads, dim)) in SHAPES.into_iter().enumerate() {
        for kind in KINDS {
            let shim = ORDERS[number % ORDERS.len()];
            let what = format!("{rows} rows, {heads} and {kv_heads} heads of {dim}, {kind:?}, {shim:?}");
            let angle = values(&[rows, 1, dim], 5, Kind::Float);
            let (cos, sin) = (angle.cos(), (&angle + 0.5).sin());
            let (q, k) = (values(&[rows, heads, dim], 1, kind), values(&[rows, kv_heads, dim], 2, kind));
            let v = values(&[rows, kv_heads, dim], 3, kind);
            let capacity = 11;
            // The last row's is past the capacity, as no step's is, and must touch nothing.
            let mut places: Vec<i64> = (0..rows).map(|row| (7 * row + 10) % capacity).collect();
            if rows > 1 {
                places[rows as usize - 1] = capacity;
            }
            let cache = values(&[rows, kv_heads, capacity, dim], 4, kind);
            let (keys, kept) = (cache.copy(), cache.neg());
            let rotation = Rotation { q: &q, k: &k, cos: &cos, sin: &sin, is_back: false };
            let append = Append { v: &v, keys: &keys, values: &kept, positions: &Tensor::from_slice(&places) };
            let found_q = rotate_and_append(&shim, &rotation, &append).unwrap();
            let (expected_q, rotated) = rotate(&shim, &rotation).unwrap();
            assert_bits(&floats(&found_q), &floats(&expected_q), &what);
            for (found, before, new) in [(&keys, cache.copy(), &rotated), (&kept, cache.neg(), &v)] {
                for (row, &place) in places.iter().enumerate().filter(|(_, place)| **place < capacity) {
                    before.get(row as i64).narrow(1, place, 1).copy_(&new.get(row as i64).unsqueeze(1));
                }
                assert_bits(&floats(found), &floats(&before), &what);
            }
        }
    }
}

#[test]
fn back_undoes_forth_and_lengths_stay() {
    let angle = values(&[7, 1, 64], 5, Kind::Float).narrow(2, 0, 32);
    let angle = Tensor::cat(&[&angle, &angle], 2);
    let (cos, sin) = (angle.cos(), angle.sin());
    let (q, k) = (values(&[7, 4, 64], 1, Kind::Float), values(&[7, 2, 64], 2, Kind::Float));
    let rotation = Rotation { q: &q, k: &k, cos: &cos, sin: &sin, is_back: false };
    let (rotated_q, rotated_k) = rotate(&Shim(1), &rotation).unwrap();
    assert!((rotated_q.square().sum(Kind::Double) / q.square().sum(Kind::Double) - 1.0).abs().double_value(&[]) < 1e-6);
    let back = Rotation { q: &rotated_q, k: &rotated_k, is_back: true, ..rotation };
    let (again_q, again_k) = rotate(&Shim(77), &back).unwrap();
    for (again, x) in [(again_q, q), (again_k, k)] {
        assert!((again - &x).abs().max().double_value(&[]) <= 1e-6 * x.abs().max().double_value(&[]));
    }
}

#[test]
fn keys_alone_have_a_gradient() {
    let angle = values(&[3, 1, 8], 5, Kind::Float).narrow(2, 0, 4);
    let angle = Tensor::cat(&[&angle, &angle], 2);
    let (cos, sin) = (angle.cos(), angle.sin());
    let (q, k) = (values(&[3, 2, 8], 1, Kind::Float), values(&[3, 1, 8], 2, Kind::Float));
    let gradient = |f: &dyn Fn(&Tensor) -> Tensor| {
        let k = k.copy().set_requires_grad(true);
        run_backward(&f(&k).square().sum(Kind::Float)).unwrap();
        k.grad()
    };
    let found = gradient(&|k| on_device(Shim(0), &q, k, &cos, &sin).unwrap().1);
    let expected = gradient(&|k| definition(k, &cos, &sin).unwrap());
    assert!((found - expected).abs().max().double_value(&[]) < 1e-5);
}

#[test]
fn what_does_not_fit_is_named() {
    let (q, k, cos) =
        (values(&[3, 2, 8], 1, Kind::Float), values(&[3, 1, 8], 2, Kind::Float), values(&[3, 1, 8], 3, Kind::Float));
    let error = |rotation: Rotation| rotate(&Shim(0), &rotation).err().unwrap().to_string();
    let rotation = Rotation { q: &q, k: &k, cos: &cos, sin: &cos, is_back: false };
    let odd = values(&[3, 2, 7], 1, Kind::Float);
    let cache = values(&[3, 1, 5, 8], 4, Kind::Float);
    let positions = Tensor::from_slice(&[0i64, 1, 2]);
    let append = Append { v: &k, keys: &cache, values: &cache, positions: &positions };
    let lost = |append: Append| rotate_and_append(&Shim(0), &rotation, &append).err().unwrap().to_string();
    for (text, part) in [
        (lost(Append { v: &q, ..append }), "v: found shape [3, 2, 8]"),
        (lost(Append { values: &cache.narrow(2, 0, 4), ..append }), "values: found shape [3, 1, 4, 8]"),
        (lost(Append { keys: &k, ..append }), "keys: found shape [3, 1, 8]"),
        (lost(Append { positions: &positions.narrow(0, 0, 2), ..append }), "positions: found shape [2]"),
        (error(Rotation { q: &odd, ..rotation }), "q: found shape [3, 2, 7]"),
        (error(Rotation { k: &k.to_kind(Kind::Half), ..rotation }), "k: found dtype Half"),
        (error(Rotation { sin: &cos.narrow(0, 0, 2), ..rotation }), "sin: found shape [2, 1, 8]"),
    ] {
        assert!(text.contains("rotary") && text.contains(part), "{text}");
    }
}
