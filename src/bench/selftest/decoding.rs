//! What a step of generation ends with, against the chains of torch's operations on the CPU: sample.cu and decode_attention.cu.

use tch::{Device, Kind, Tensor};

use super::{Check, Compared, enter, inputs};
use crate::Result;
use crate::ops::cuda::decode_attention::{Heads, prepare_split};
use crate::ops::cuda::launch::Executor;
use crate::ops::cuda::sampling;
use crate::ops::decode_attention;
use crate::ops::sampling::{SamplingRule, definition, host_uniforms};

/// (rows, vocab): ragged, and Qwen2.5's.
const LOGITS: [(usize, usize); 4] = [(3, 1), (33, 131), (64, 4096), (2, 151_936)];
/// (heads, kv_heads, dim).
const HEADS: [(i64, i64, i64); 3] = [(14, 2, 64), (12, 2, 128), (9, 1, 64)];
const CAPACITY: i64 = 200;
const LENGTHS: [i64; 5] = [1, 200, 7, 150, 64];

pub fn checks(executor: &dyn Executor, checks: &mut Vec<Check>) -> Result<()> {
    for shape in LOGITS {
        for (case, greedy) in [("greedy", true), ("inverse CDF", false)] {
            let run = |compared: &mut Compared| sample(executor, shape, greedy, compared);
            enter(checks, "sample", case.into(), Kind::Float, shape, run)?;
        }
    }
    for heads in HEADS {
        for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
            for splits in [1, 3] {
                let shape = (LENGTHS.len(), (heads.0 * heads.2) as usize);
                let run = |compared: &mut Compared| attend(executor, heads, kind, splits, compared);
                enter(checks, "decode_attention", format!("{splits} splits"), kind, shape, run)?;
            }
        }
    }
    Ok(())
}

fn sample(executor: &dyn Executor, shape: (usize, usize), greedy: bool, compared: &mut Compared) -> Result<()> {
    let rule = SamplingRule { greedy, temperature: 0.9, top_p: 1.0, top_k: 0, seed: 11, stream: 6 << 28 };
    let logits = inputs(shape, Kind::Float, false)?;
    let keys = Tensor::f_arange(shape.0 as i64, (Kind::Int64, Device::Cpu))?.f_mul_scalar(1 << 18)?;
    let there = |t: &Tensor| t.f_to_device(executor.device());
    let (ids, logprobs) = sampling::sample(executor, &there(&logits)?, &there(&keys)?, &rule)?;
    let uniforms = host_uniforms(&keys, &rule)?;
    compared.tensors(&sampling::uniforms(executor, &there(&keys)?, &rule)?, &uniforms)?;
    let ids = ids.f_to_device(Device::Cpu)?;
    if greedy {
        let (expected, of_expected) = definition(&logits, &uniforms, &rule)?;
        compared.tensors(&ids, &expected)?;
        return compared.tensors_near(&logprobs, &of_expected, 1e-5, 1e-5);
    }
    // On the boundary of two tokens rounding decides: u lies between the sums before and after the token, nearly.
    let p = logits.f_to_kind(Kind::Double)?.f_div_scalar(rule.temperature)?.f_softmax(-1, Kind::Double)?;
    // What is no token counts as the first; its sums will not do.
    let index = ids.f_clamp(0, shape.1 as i64 - 1)?.f_unsqueeze(1)?;
    let own = p.f_gather(1, &index, false)?;
    let after = p.f_cumsum(-1, Kind::Double)?.f_gather(1, &index, false)?;
    let u = uniforms.f_to_kind(Kind::Double)?.f_unsqueeze(1)?;
    let inside = u.f_le_tensor(&after.f_add_scalar(1e-5)?)?;
    let inside = inside.f_logical_and(&u.f_ge_tensor(&after.f_sub(&own)?.f_sub_scalar(1e-5)?)?)?;
    let inside = inside.f_logical_and(&ids.f_unsqueeze(1)?.f_eq_tensor(&index)?)?;
    compared.tensors(&inside, &inside.f_ones_like()?)?;
    compared.tensors_near(&logprobs, &own.f_log()?.f_view([-1])?.f_to_kind(Kind::Float)?, 1e-5, 1e-5)
}

fn attend(
    executor: &dyn Executor,
    (heads, kv_heads, dim): (i64, i64, i64),
    kind: Kind,
    splits: u32,
    compared: &mut Compared,
) -> Result<()> {
    let rows = LENGTHS.len() as i64;
    // Scores of hundreds would leave a softmax of one key, and f32's last places would choose it.
    let flat = |heads: i64, places: i64| -> Result<Tensor> {
        Ok(inputs(((rows * heads * places) as usize, dim as usize), Kind::Float, false)?.f_clamp(-2.0, 2.0)?)
    };
    let q = flat(heads, 1)?.f_view([rows, heads, dim])?.f_to_kind(kind)?;
    let cache = [rows, kv_heads, CAPACITY, dim];
    let keys = flat(kv_heads, CAPACITY)?.f_view(cache)?.f_to_kind(kind)?;
    let values = keys.f_flip([2])?.f_contiguous()?;
    let lengths = Tensor::f_from_slice(&LENGTHS)?;
    let scale = 1.0 / (dim as f64).sqrt();
    let there = |t: &Tensor| t.f_to_device(executor.device());
    let (q_there, keys_there, values_there, lengths_there) =
        (there(&q)?, there(&keys)?, there(&values)?, there(&lengths)?);
    let call = Heads {
        q: &q_there,
        keys: &keys_there,
        values: &values_there,
        lengths: &lengths_there,
        longest: CAPACITY,
        scale: scale as f32,
    };
    let (prepared, found) = prepare_split(executor, &call, splits)?;
    prepared.run(executor)?;
    // In f32: torch's attention in 16 bits rounds its weights.
    let wide = |t: &Tensor| t.f_to_kind(Kind::Float);
    let expected = decode_attention::definition(&wide(&q)?, &wide(&keys)?, &wide(&values)?, &lengths, CAPACITY, scale)?;
    let (relative, absolute) = match kind {
        Kind::BFloat16 => (1.0 / 128.0, 1e-4),
        Kind::Half => (1.0 / 1024.0, 1e-4),
        _ => (1e-5, 1e-4),
    };
    compared.tensors_near(&found, &expected.f_to_kind(kind)?, relative, absolute)
}
