//! The next token of each row of logits, and its log-probability at the temperature (numerics.md section 7).
//!
//! l = log_softmax(logits / temperature) in f32; greedy: the largest. Else the first token whose cumulative probability exceeds
//! u times the total of what top_k and top_p leave, u keyed by (seed, stream, key of the row). Shapes: logits f32 [rows, vocab],
//! keys i64 [rows] (the bits of token keys); ids i64 [rows], log-probabilities f32 [rows]. On CUDA nothing waits for the device.

use tch::{Kind, Tensor};

use super::cuda::place::Place;
use super::cuda::sampling as cuda;
use crate::Result;
use crate::numerics::generator::uniform_f32;

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingRule {
    pub greedy: bool,
    pub temperature: f64,
    pub top_p: f64,   // 1.0: off
    pub top_k: usize, // 0: off
    pub seed: u64,
    pub stream: u32,
}

impl SamplingRule {
    /// Whether every token of the vocabulary may be chosen.
    fn is_unfiltered(&self, vocab: i64) -> bool {
        self.greedy || ((self.top_k == 0 || self.top_k as i64 >= vocab) && self.top_p >= 1.0)
    }
}

/// (ids, log-probabilities). Logits that are not finite show as a log-probability of NaN.
///
/// # Errors
/// `Runtime` for shapes and dtypes that do not fit.
pub fn sample(logits: &Tensor, keys: &Tensor, rule: &SamplingRule) -> Result<(Tensor, Tensor)> {
    let (_, vocab) = logits.size2()?;
    match Place::of(logits) {
        None => definition(logits, &host_uniforms(keys, rule)?, rule),
        Some(place) if rule.is_unfiltered(vocab) => cuda::sample(&place, &logits.f_contiguous()?, keys, rule),
        Some(place) => definition(logits, &cuda::uniforms(&place, keys, rule)?, rule),
    }
}

/// u of each row, f32 [rows], on the host.
///
/// # Errors
/// Torch's, for keys that are not i64 [rows].
pub fn host_uniforms(keys: &Tensor, rule: &SamplingRule) -> Result<Tensor> {
    let keys = Vec::<i64>::try_from(keys)?;
    let uniforms: Vec<f32> = keys.iter().map(|&key| uniform_f32(rule.seed, rule.stream, key as u64)).collect();
    Ok(Tensor::f_from_slice(&uniforms)?)
}

/// The same as a chain of torch's operations; `uniforms` f32 [rows].
///
/// # Errors
/// Torch's, for shapes that do not fit.
pub fn definition(logits: &Tensor, uniforms: &Tensor, rule: &SamplingRule) -> Result<(Tensor, Tensor)> {
    let logits =
        if rule.temperature == 1.0 { logits.shallow_clone() } else { logits.f_div_scalar(rule.temperature)? };
    let log_softmax = logits.f_log_softmax(-1, Kind::Float)?;
    let chosen = match rule.greedy {
        true => logits.f_argmax(-1, true)?,
        false => inverse_cdf(&filtered(&log_softmax.f_exp()?, rule)?, uniforms)?,
    };
    let logprobs = log_softmax.f_gather(1, &chosen, false)?;
    Ok((chosen.f_view([-1])?, logprobs.f_view([-1])?))
}

/// The probabilities that top_k and top_p leave; the others 0. Not renormalized: the inverse CDF scales by the total.
fn filtered(probabilities: &Tensor, rule: &SamplingRule) -> Result<Tensor> {
    let vocab = probabilities.size()[1];
    let mut kept = probabilities.shallow_clone();
    if rule.top_k > 0 && (rule.top_k as i64) < vocab {
        let (top, _) = probabilities.f_topk(rule.top_k as i64, -1, true, true)?;
        let smallest = top.f_narrow(1, rule.top_k as i64 - 1, 1)?;
        kept = kept.f_mul(&probabilities.f_ge_tensor(&smallest)?.f_to_kind(Kind::Float)?)?;
    }
    if rule.top_p < 1.0 {
        let (sorted, order) = kept.f_sort(-1, true)?;
        let total = sorted.f_sum_dim_intlist([-1i64].as_slice(), true, Kind::Float)?;
        let before = sorted.f_cumsum(-1, Kind::Float)?.f_sub(&sorted)?;
        let inside = before.f_lt_tensor(&total.f_mul_scalar(rule.top_p)?)?.f_to_kind(Kind::Float)?;
        let mask = inside.f_zeros_like()?.f_scatter(1, &order, &inside)?;
        kept = kept.f_mul(&mask)?;
    }
    Ok(kept)
}

/// The first index whose cumulative probability (f32) exceeds u * total: i64 [rows, 1].
fn inverse_cdf(probabilities: &Tensor, uniforms: &Tensor) -> Result<Tensor> {
    let cdf = probabilities.f_cumsum(-1, Kind::Float)?;
    let total = cdf.f_narrow(1, cdf.size()[1] - 1, 1)?;
    let u = uniforms.f_unsqueeze(1)?;
    let at = |reached: Tensor| reached.f_sum_dim_intlist([-1i64].as_slice(), true, Kind::Int64);
    let index = at(cdf.f_le_tensor(&u.f_mul(&total)?)?)?;
    // u * total may round up to the total: the last token with any probability is the last answer.
    let last = at(cdf.f_lt_tensor(&total)?)?;
    Ok(index.f_minimum(&last)?)
}
