//! Batched generation with a KV cache; sampling keyed by (seed, uid, position), so that a token does not depend on what
//! else is in the batch (numerics.md section 7).

use tch::{Device, Kind, Tensor};

use super::attention::{Attend, PaddedLayout};
use super::kv_cache::{DecodeStep, KvCache};
use super::pass::{Pass, PromptUid, Sequence, ids_tensor};
use super::qwen2::Qwen2;
use crate::numerics::generator::uniform_f32;
use crate::numerics::noise_key::{Phase, Purpose, stream};
use crate::ops::matmul_error::RowKeys;
use crate::ops::profile::span;
use crate::{Error, Result};

#[derive(Clone, Debug)]
pub struct Sampling {
    pub greedy: bool,
    pub temperature: f64,
    pub top_p: f64,   // 1.0: off
    pub top_k: usize, // 0: off
    pub seed: u64,
    pub phase: Phase,
}

impl Sampling {
    pub fn greedy() -> Sampling {
        Sampling { greedy: true, temperature: 1.0, top_p: 1.0, top_k: 0, seed: 0, phase: Phase::Validation }
    }
}

pub struct Prompt {
    pub uid: PromptUid,
    pub ids: Vec<u32>,
}

pub struct Request<'a> {
    pub prompts: &'a [Prompt],
    pub group_size: usize,
    pub max_new_tokens: usize,
    /// Most response tokens of each sequence, prompt-major as the result; None: `max_new_tokens` for all.
    pub limits: Option<&'a [usize]>,
    pub stop_ids: &'a [u32],
    pub sampling: &'a Sampling,
    /// False recomputes everything for every token: the plain definition that the cache is checked against.
    pub kv_cache: bool,
}

pub struct Completion {
    pub sequence: Sequence,
    pub logprobs: Vec<f32>, // of each response token, at the sampling temperature
    /// Ended with a stop token; otherwise the token limit clipped it.
    pub finished: bool,
}

/// Completions of every prompt, group members together, prompts in order. `pass` gives phase and injection; its keys are
/// ignored. `progress` is told how many sequences have ended.
pub fn generate(
    model: &Qwen2,
    request: &Request,
    pass: &Pass,
    mut progress: impl FnMut(usize),
) -> Result<Vec<Completion>> {
    let _no_grad = tch::no_grad_guard();
    let mut rows = Vec::new();
    for (p, prompt) in request.prompts.iter().enumerate() {
        if prompt.ids.is_empty() {
            return Err(Error::Input("generate: an empty prompt".into()));
        }
        for member in 0..request.group_size {
            rows.push((p, new_completion(prompt, member as u32)));
        }
    }
    if request.max_new_tokens == 0 || rows.is_empty() {
        return Ok(rows.into_iter().map(|(_, c)| c).collect());
    }
    let limit = |slot: usize| match request.limits {
        Some(limits) => limits[slot].min(request.max_new_tokens),
        None => request.max_new_tokens,
    };
    if let Some(limits) = request.limits
        && (limits.len() != rows.len() || limits.contains(&0))
    {
        return Err(Error::Runtime(format!(
            "{} limits of at least 1 token for {} sequences",
            limits.len(),
            rows.len()
        )));
    }
    let mut done: Vec<Option<Completion>> = rows.iter().map(|_| None).collect();
    let mut active: Vec<(usize, usize, Completion)> =
        rows.into_iter().enumerate().map(|(slot, (p, c))| (slot, p, c)).collect();

    let mut decoder = Decoder { model, request, pass, cache: None };
    let mut logits = decoder.prefill(&active)?;
    loop {
        let sequences: Vec<&Sequence> = active.iter().map(|(_, _, c)| &c.sequence).collect();
        let (ids, logprobs) = {
            let _span = span("sample");
            sample(&logits, &sequences, request.sampling)?
        };
        let mut kept = Vec::new();
        let mut still = Vec::new();
        for (row, (slot, p, mut completion)) in active.into_iter().enumerate() {
            completion.sequence.ids.push(ids[row]);
            completion.logprobs.push(logprobs[row]);
            completion.finished = request.stop_ids.contains(&ids[row]);
            if completion.finished || completion.logprobs.len() == limit(slot) {
                done[slot] = Some(completion);
                progress(1);
            } else {
                kept.push(row);
                still.push((slot, p, completion));
            }
        }
        if still.is_empty() {
            return Ok(done.into_iter().flatten().collect());
        }
        active = still;
        logits = decoder.decode(&active, &kept)?;
    }
}

fn new_completion(prompt: &Prompt, member: u32) -> Completion {
    let (ids, prompt_len) = (prompt.ids.clone(), prompt.ids.len());
    Completion {
        sequence: Sequence { uid: prompt.uid, member, ids, prompt_len },
        logprobs: Vec::new(),
        finished: false,
    }
}

/// Runs the model over the active rows.
struct Decoder<'a> {
    model: &'a Qwen2,
    request: &'a Request<'a>,
    pass: &'a Pass<'a>,
    cache: Option<KvCache>,
}

type ActiveRow = (usize, usize, Completion); // (slot in the result, prompt, completion so far)

impl<'a> Decoder<'a> {
    /// f32 logits [rows, vocab] after each row's prompt; every prompt is computed once for its whole group.
    fn prefill(&mut self, active: &[ActiveRow]) -> Result<Tensor> {
        let _span = span("prefill");
        let prompt_of_row: Vec<usize> = active.iter().map(|(_, p, _)| *p).collect();
        let prompts: Vec<Sequence> =
            self.request.prompts.iter().map(|prompt| new_completion(prompt, 0).sequence).collect();
        if self.request.kv_cache {
            let longest = prompts.iter().map(|s| s.ids.len()).max().unwrap_or(0);
            self.cache = Some(KvCache::new(
                self.model.blocks.len(),
                &prompt_of_row,
                longest + self.request.max_new_tokens,
                self.model.device(),
            )?);
        }
        let sequences: Vec<&Sequence> = prompts.iter().collect();
        let logits = self.full_pass(&sequences, self.cache.as_ref(), true)?;
        let index: Vec<i64> = prompt_of_row.iter().map(|&p| p as i64).collect();
        Ok(logits.f_index_select(0, &Tensor::f_from_slice(&index)?.f_to_device(logits.device())?)?)
    }

    /// f32 logits [rows, vocab] after each active row's last token. `kept`: the rows of the previous step that go on.
    fn decode(&mut self, active: &[ActiveRow], kept: &[usize]) -> Result<Tensor> {
        let _span = span("decode");
        let Some(cache) = &mut self.cache else {
            let sequences: Vec<&Sequence> = active.iter().map(|(_, _, c)| &c.sequence).collect();
            return self.full_pass(&sequences, None, false);
        };
        if kept.len() != cache.rows() {
            cache.keep_rows(kept)?;
        }
        let device = self.model.device();
        let (mut ids, mut positions, mut keys) = (Vec::new(), Vec::new(), Vec::new());
        for (_, _, completion) in active {
            let sequence = &completion.sequence;
            let position = sequence.ids.len() - 1;
            ids.push(sequence.ids[position]);
            positions.push(position);
            keys.push(sequence.key(position)?);
        }
        let step = DecodeStep::new(&positions, device)?;
        let pass = self.pass.with_keys(RowKeys::new(keys));
        let pass = Pass { measure_norms: false, ..pass };
        let attend = Attend::Decode { cache, step: &step };
        let residual = self.model.residual(&ids_tensor(&ids, device)?, step.positions(), &attend, &pass)?;
        let hidden = self.model.norm.forward(&residual, &pass)?;
        self.model.head.logits(self.model.head_weight(), &hidden, &pass)
    }

    /// Logits after the last token of each sequence.
    fn full_pass(&self, sequences: &[&Sequence], cache: Option<&KvCache>, first: bool) -> Result<Tensor> {
        let device = self.model.device();
        let (mut ids, mut positions, mut keys, mut last) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut lengths = Vec::new();
        for sequence in sequences {
            ids.extend_from_slice(&sequence.ids);
            positions.extend((0..sequence.ids.len()).map(|p| p as i64));
            keys.extend(sequence.keys()?);
            last.push(ids.len() - 1);
            lengths.push(sequence.ids.len());
        }
        let keys = RowKeys::new(keys);
        let measure_norms = self.pass.measure_norms && first;
        let head_pass = Pass { measure_norms, ..self.pass.with_keys(keys.select(&last)) };
        let pass = Pass { measure_norms, ..self.pass.with_keys(keys) };
        let layout = PaddedLayout::new(&lengths, device)?;
        let positions = Tensor::f_from_slice(&positions)?.f_to_device(device)?;
        let attend = Attend::Full { layout: &layout, cache };
        let residual = self.model.residual(&ids_tensor(&ids, device)?, &positions, &attend, &pass)?;
        let last: Vec<i64> = last.iter().map(|&r| r as i64).collect();
        let last = Tensor::f_from_slice(&last)?.f_to_device(device)?;
        let hidden = self.model.norm.forward(&residual.f_index_select(0, &last)?, &head_pass)?;
        self.model.head.logits(self.model.head_weight(), &hidden, &head_pass)
    }
}

/// The next token of each row of f32 `logits` [rows, vocab] and its log-probability at the temperature.
fn sample(logits: &Tensor, sequences: &[&Sequence], sampling: &Sampling) -> Result<(Vec<u32>, Vec<f32>)> {
    let logits =
        if sampling.temperature == 1.0 { logits.shallow_clone() } else { logits.f_div_scalar(sampling.temperature)? };
    let log_softmax = logits.f_log_softmax(-1, Kind::Float)?;
    let chosen = if sampling.greedy {
        logits.f_argmax(-1, true)?
    } else {
        let stream = stream(Purpose::Sampling, sampling.phase, 0, 0)?;
        let uniforms: Vec<f32> = sequences
            .iter()
            .map(|s| Ok(uniform_f32(sampling.seed, stream, s.key(s.ids.len())?)))
            .collect::<Result<_>>()?;
        inverse_cdf(&filtered(&log_softmax.f_exp()?, sampling)?, &uniforms)?
    };
    let logprobs = log_softmax.f_gather(1, &chosen, false)?.f_view([-1])?.f_to_device(Device::Cpu)?;
    let logprobs = Vec::<f32>::try_from(logprobs)?;
    let ids = Vec::<i64>::try_from(chosen.f_view([-1])?.f_to_device(Device::Cpu)?)?;
    if logprobs.iter().any(|l| l.is_nan()) {
        return Err(Error::Runtime("generate: the model's logits are not finite".into()));
    }
    Ok((ids.into_iter().map(|i| i as u32).collect(), logprobs))
}

/// The probabilities that top_k and top_p leave; the others 0. Not renormalized: the inverse CDF scales by the total.
fn filtered(probabilities: &Tensor, sampling: &Sampling) -> Result<Tensor> {
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
