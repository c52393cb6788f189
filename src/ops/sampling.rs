//! The next token of each row of logits, and its log-probability (numerics.md section 7).
//!
//! One uniform per token keyed (seed, sample, uid, position), through the f32 inverse CDF: a token does not depend on what else
//! is in the batch.

use tch::{Device, Kind, Tensor};

use crate::Result;
use crate::numerics::generator::uniform_f32;

/// How tokens are chosen.
#[derive(Clone, Debug)]
pub struct SamplingRule {
    pub greedy: bool,
    pub temperature: f64,
    pub top_p: f64,   // 1.0: off
    pub top_k: usize, // 0: off
    pub seed: u64,
    pub stream: u32,
}

/// f32 `logits` [rows, vocab], `keys` i64 [rows] (the bits of the token keys) -> ids i64 [rows], log-probabilities at the
/// temperature f32 [rows].
pub fn sample(logits: &Tensor, keys: &Tensor, rule: &SamplingRule) -> Result<(Tensor, Tensor)> {
    let logits =
        if rule.temperature == 1.0 { logits.shallow_clone() } else { logits.f_div_scalar(rule.temperature)? };
    let log_softmax = logits.f_log_softmax(-1, Kind::Float)?;
    let chosen = if rule.greedy {
        logits.f_argmax(-1, true)?
    } else {
        let keys = Vec::<i64>::try_from(keys.f_to_device(Device::Cpu)?)?;
        let uniforms: Vec<f32> = keys.iter().map(|&key| uniform_f32(rule.seed, rule.stream, key as u64)).collect();
        inverse_cdf(&filtered(&log_softmax.f_exp()?, rule)?, &uniforms)?
    };
    let logprobs = log_softmax.f_gather(1, &chosen, false)?;
    Ok((chosen.f_view([-1])?, logprobs.f_view([-1])?))
}

/// The probabilities that top_k and top_p leave; the others 0. Not renormalized: the inverse CDF scales by the total.
fn filtered(probabilities: &Tensor, sampling: &SamplingRule) -> Result<Tensor> {
    let vocab = probabilities.size()[1];
    let mut kept = probabilities.shallow_clone();
    if sampling.top_k > 0 && (sampling.top_k as i64) < vocab {
        let (top, _) = probabilities.f_topk(sampling.top_k as i64, -1, true, true)?;
        let smallest = top.f_narrow(1, sampling.top_k as i64 - 1, 1)?;
        kept = kept.f_mul(&probabilities.f_ge_tensor(&smallest)?.f_to_kind(Kind::Float)?)?;
    }
    if sampling.top_p < 1.0 {
        let (sorted, order) = kept.f_sort(-1, true)?;
        let total = sorted.f_sum_dim_intlist([-1i64].as_slice(), true, Kind::Float)?;
        let before = sorted.f_cumsum(-1, Kind::Float)?.f_sub(&sorted)?;
        let inside = before.f_lt_tensor(&total.f_mul_scalar(sampling.top_p)?)?.f_to_kind(Kind::Float)?;
        let mask = inside.f_zeros_like()?.f_scatter(1, &order, &inside)?;
        kept = kept.f_mul(&mask)?;
    }
    Ok(kept)
}

/// The first index whose cumulative probability (f32) exceeds u * total: i64 [rows, 1].
fn inverse_cdf(probabilities: &Tensor, uniforms: &[f32]) -> Result<Tensor> {
    let cdf = probabilities.f_cumsum(-1, Kind::Float)?;
    let total = cdf.f_narrow(1, cdf.size()[1] - 1, 1)?;
    let u = Tensor::f_from_slice(uniforms)?.f_to_device(cdf.device())?.f_unsqueeze(1)?;
    let at = |reached: Tensor| reached.f_sum_dim_intlist([-1i64].as_slice(), true, Kind::Int64);
    let index = at(cdf.f_le_tensor(&u.f_mul(&total)?)?)?;
    // u * total may round up to the total: the last token with any probability is the last answer.
    let last = at(cdf.f_lt_tensor(&total)?)?;
    Ok(index.f_minimum(&last)?)
}
