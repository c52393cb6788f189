//! What a step of generation ends with on a GPU, each beside the chain of torch's operations that it stands for: the choice of
//! the next tokens, and the attention to the cache.

use tch::{Kind, Tensor};

use super::OnDevice;
use super::small_ops::Beside;
use crate::Result;
use crate::bench::{Options, Row};
use crate::ops::cuda::decode_attention::{Heads, prepare as prepare_attention};
use crate::ops::cuda::sampling;
use crate::ops::decode_attention;
use crate::ops::sampling::{SamplingRule, definition};

/// Of a sequence's cache: kv_heads, capacity and dim, and its query heads.
#[derive(Clone, Copy, Debug)]
pub struct Cache {
    pub rows: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub capacity: usize,
    pub dim: usize,
}

pub fn rows(device: &OnDevice, options: &Options) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for &shape in device.shapes.logits {
        if options.begins(&format!("sample f32 [{}, {}]", shape.0, shape.1)) {
            rows.push(sample(device, shape)?);
        }
    }
    for &cache in device.shapes.caches {
        if options.begins(&format!("decode_attention bf16 {cache:?}")) {
            rows.push(attend(device, cache)?);
        }
    }
    Ok(rows)
}

/// By the inverse CDF; the chain is given its uniform numbers.
fn sample(device: &OnDevice, shape: (usize, usize)) -> Result<Row> {
    let logits = device.matrices(shape, Kind::Float)?;
    let place = device.executor.device();
    let keys = Tensor::f_arange(shape.0 as i64, (Kind::Int64, place))?;
    let uniforms = Tensor::f_rand([shape.0 as i64], (Kind::Float, place))?;
    let rule = SamplingRule { greedy: false, temperature: 1.0, top_p: 1.0, top_k: 0, seed: 1, stream: 6 << 28 };
    let call = |logits: &Tensor| Ok(sampling::prepare(place, logits, &keys, &rule)?.0);
    let calls = logits.iter().map(call).collect::<Result<Vec<_>>>()?;
    let chain = |turn: usize| definition(&logits[turn % logits.len()], &uniforms, &rule).map(drop);
    let bytes = size_of::<f32>() * shape.0 * shape.1;
    let shape = [shape.0, shape.1];
    let beside = Beside { name: "sample", shape: &shape, calls: &calls, chain: &chain, bytes, copied: &logits };
    Ok(Row { dtype: "f32", ..beside.row(device)? })
}

/// Every sequence at its longest.
fn attend(device: &OnDevice, cache: Cache) -> Result<Row> {
    let Cache { rows, heads, kv_heads, capacity, dim } = cache;
    let places = (rows * kv_heads * capacity, dim);
    let view = |all: Vec<Tensor>| {
        let shape = [rows as i64, kv_heads as i64, capacity as i64, dim as i64];
        all.into_iter().map(|x| Ok(x.f_view(shape)?)).collect::<Result<Vec<Tensor>>>()
    };
    let keys = view(device.matrices(places, Kind::BFloat16)?)?;
    let values = view(device.some(keys.len(), places, Kind::BFloat16)?)?;
    let q = device.some(1, (rows, heads * dim), Kind::BFloat16)?;
    let q = q[0].f_view([rows as i64, heads as i64, dim as i64])?;
    let (place, longest) = (device.executor.device(), capacity as i64);
    let lengths = Tensor::f_full([rows as i64], longest, (Kind::Int64, place))?;
    let scale = 1.0 / (dim as f64).sqrt();
    let call = |(keys, values): (&Tensor, &Tensor)| {
        let heads = Heads { q: &q, keys, values, lengths: &lengths, longest, scale: scale as f32 };
        Ok(prepare_attention(device.executor, &heads)?.0)
    };
    let calls = keys.iter().zip(&values).map(call).collect::<Result<Vec<_>>>()?;
    let chain = |turn: usize| {
        let at = turn % keys.len();
        decode_attention::definition(&q, &keys[at], &values[at], &lengths, longest, scale).map(drop)
    };
    let bytes = 2 * 2 * places.0 * places.1;
    let shape = [rows, heads, kv_heads, capacity, dim];
    Beside { name: "decode_attention", shape: &shape, calls: &calls, chain: &chain, bytes, copied: &keys }.row(device)
}
