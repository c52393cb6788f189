//! decode_attention.cu against softmax attention in f64, with lengths of every kind, split and not.

use tch::{Device, Kind, Tensor};
use temper::ops::cuda::decode_attention::{Heads, decode_attention, prepare_split};
use temper::ops::decode_attention::definition;

use crate::host::{ORDERS, Shim};
use crate::support::{Lcg, floats};

const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

struct Case {
    q: Tensor,      // [rows, heads, dim]
    keys: Tensor,   // [rows, kv_heads, capacity, dim]
    values: Tensor, // as keys
    lengths: Tensor,
    longest: i64,
}

/// Ordinary values, some keys far along their query, so that a softmax has a peak.
fn values(shape: &[i64], seed: u64, kind: Kind) -> Tensor {
    let mut rng = Lcg(seed);
    let count = shape.iter().product::<i64>() as usize;
    let value = |i: usize| if i % 1999 < 3 { 6.0 * rng.value() } else { rng.value() };
    Tensor::from_slice(&(0..count).map(value).collect::<Vec<f32>>()).view(shape).to_kind(kind)
}

impl Case {
    /// Behind each row's length the cache holds NaN, which nobody may read into a result.
    fn new((heads, kv_heads, dim): (i64, i64, i64), capacity: i64, lengths: &[i64], kind: Kind) -> Case {
        let rows = lengths.len() as i64;
        let cache = |seed| values(&[rows, kv_heads, capacity, dim], seed, kind);
        let case = Case {
            q: values(&[rows, heads, dim], 1, kind),
            keys: cache(2),
            values: cache(3),
            lengths: Tensor::from_slice(lengths),
            longest: lengths.iter().copied().max().unwrap(),
        };
        for (row, &length) in lengths.iter().enumerate() {
            for cache in [&case.keys, &case.values] {
                let _ = cache.get(row as i64).narrow(1, length, capacity - length).fill_(f64::NAN);
            }
        }
        case
    }

    fn scale(&self) -> f64 {
        1.0 / (self.q.size()[2] as f64).sqrt()
    }

    fn heads(&self) -> Heads<'_> {
        let Case { q, keys, values, lengths, longest } = self;
        Heads { q, keys, values, lengths, longest: *longest, scale: self.scale() as f32 }
    }

    fn split(&self, shim: Shim, splits: u32) -> Tensor {
        let (prepared, out) = prepare_split(&shim, &self.heads(), splits).unwrap();
        prepared.run(&shim).unwrap();
        out
    }

    /// In f64, row by row.
    fn exact(&self) -> Vec<f64> {
        let double = |t: &Tensor| t.to_kind(Kind::Double);
        let (heads, kv_heads, dim) = (self.q.size()[1], self.keys.size()[1], self.q.size()[2]);
        let lengths = Vec::<i64>::try_from(&self.lengths).unwrap();
        let mut all = Vec::new();
        for (row, length) in lengths.into_iter().enumerate() {
            for head in 0..heads {
                let of =
                    |cache: &Tensor| double(&cache.get(row as i64).get(head / (heads / kv_heads)).narrow(0, 0, length));
                let q = double(&self.q.get(row as i64).get(head)) * self.scale();
                let out = match length {
                    0 => Tensor::zeros([dim], (Kind::Double, Device::Cpu)),
                    _ => of(&self.values).tr().mv(&of(&self.keys).mv(&q).softmax(0, Kind::Double)),
                };
                all.extend(Vec::<f64>::try_from(out).unwrap());
            }
        }
        all
    }

    fn assert(&self, found: &Tensor, what: &str) {
        let rows = self.q.size()[0];
        assert_eq!((found.size(), found.kind()), (vec![rows, self.q.size()[1] * self.q.size()[2]], self.q.kind()));
        let rounding = match self.q.kind() {
            Kind::BFloat16 => 1.0 / 256.0,
            Kind::Half => 1.0 / 2048.0,
            _ => 0.0,
        };
        for (i, (found, expected)) in floats(found).iter().zip(self.exact()).enumerate() {
            let off = (f64::from(*found) - expected).abs();
            assert!(off <= rounding * expected.abs() + 2e-6, "{what}: element {i}: {found}, expected {expected}");
        }
    }
}

#[test]
fn outputs_are_softmax_attention() {
    // (heads, kv_heads, dim): groups of one, a prime, eight and more than a block takes.
    let shapes = [(2, 2, 64), (14, 2, 64), (12, 2, 128), (8, 1, 128), (10, 1, 64)];
    for (number, shape) in shapes.into_iter().enumerate() {
        for kind in KINDS {
            // Nothing, one key, fewer than teams, several steps, all of the capacity.
            let case = Case::new(shape, 77, &[1, 0, 5, 77, 33], kind);
            for splits in [1, 2, 5] {
                let shim = ORDERS[(number + splits as usize) % ORDERS.len()];
                case.assert(&case.split(shim, splits), &format!("{shape:?} {kind:?} {splits} splits {shim:?}"));
            }
        }
    }
}

#[test]
fn the_definition_is_the_same() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let case = Case::new((4, 2, 64), 40, &[40, 40], kind);
        let Case { q, keys, values, lengths, longest } = &case;
        let expected = floats(&definition(q, keys, values, lengths, *longest, case.scale()).unwrap());
        let found = floats(&decode_attention(&Shim(0), &case.heads()).unwrap());
        let slack = if kind == Kind::Float { 2e-5 } else { 0.02 };
        assert!(found.iter().zip(&expected).all(|(f, e)| (f - e).abs() <= slack), "{kind:?}");
    }
}

#[test]
fn a_part_of_a_larger_cache_and_a_row_alone_give_the_same_bits() {
    let case = Case::new((6, 2, 128), 300, &[200, 130, 7], Kind::BFloat16);
    let whole = case.split(Shim(0), 3);
    let (keys, values) = (case.keys.narrow(2, 0, 201), case.values.narrow(2, 0, 201));
    assert!(!keys.is_contiguous());
    let part = Heads { keys: &keys, values: &values, ..case.heads() };
    let (prepared, out) = prepare_split(&Shim(1), &part, 3).unwrap();
    prepared.run(&Shim(1)).unwrap();
    assert_eq!(floats(&out), floats(&whole));
    for row in 0..3 {
        let one = |t: &Tensor| t.narrow(0, row, 1).copy();
        let alone = Case {
            q: one(&case.q),
            keys: one(&case.keys),
            values: one(&case.values),
            lengths: one(&case.lengths),
            longest: 200,
        };
        assert_eq!(floats(&alone.split(Shim(77), 3)), floats(&whole.narrow(0, row, 1)), "row {row}");
    }
}

#[test]
fn lengths_are_read_when_the_launch_runs() {
    let case = Case::new((2, 1, 64), 50, &[50], Kind::Float);
    let (prepared, out) = prepare_split(&Shim(0), &case.heads(), 2).unwrap();
    for length in [3, 50, 17] {
        let _ = case.lengths.shallow_clone().fill_(length as f64);
        prepared.run(&Shim(0)).unwrap();
        case.assert(&out, &format!("{length} keys"));
    }
    // More than there is room for: the capacity.
    let _ = case.lengths.shallow_clone().fill_(1e6);
    prepared.run(&Shim(0)).unwrap();
    let _ = case.lengths.shallow_clone().fill_(50.0);
    case.assert(&out, "too long");
}

#[test]
fn nan_in_sight_is_seen() {
    let case = Case::new((2, 1, 64), 20, &[20, 20], Kind::Half);
    let _ = case.keys.get(1).get(0).get(11).get(3).fill_(f64::NAN);
    let out = case.split(Shim(0), 2);
    assert!(floats(&out.get(0)).iter().all(|v| v.is_finite()) && floats(&out.get(1)).iter().all(|v| v.is_nan()));
}

#[test]
fn what_does_not_fit_is_named() {
    let case = Case::new((4, 2, 64), 20, &[20, 3], Kind::Float);
    let error = |heads: Heads| decode_attention(&Shim(0), &heads).err().unwrap().to_string();
    let heads = case.heads();
    let (other, narrow) = (case.keys.to_kind(Kind::Half), values(&[2, 4, 32], 1, Kind::Float));
    let turned = case.keys.transpose(2, 3).contiguous().transpose(2, 3);
    for (text, part) in [
        (error(Heads { keys: &other, ..heads }), "keys: found dtype Half"),
        (error(Heads { lengths: &case.lengths.narrow(0, 0, 1), ..heads }), "lengths: found shape [1]"),
        (error(Heads { q: &narrow, ..heads }), "64 or 128"),
        (error(Heads { values: &turned, ..heads }), "values: found strides"),
    ] {
        assert!(text.contains("decode_attention") && text.contains(part), "{text}");
    }
}
