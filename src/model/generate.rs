//! Completions of prompts, sampled by keys, so that a token does not depend on what else is in the batch (numerics.md
//! section 7).
//!
//! `plain` is the definition: one sequence at a time, everything computed again for every token. `engine` is what runs:
//! many sequences at once, a cache, prompts computed once for their group, and new prompts as sequences end. Draws are
//! equal to the bit, values to rounding.

mod engine;
mod plain;
mod rows;

pub use engine::PREFILL_TOKENS;

use super::pass::{Pass, PromptUid, Sequence};
use super::qwen2::Qwen2;
use crate::numerics::noise_key::{Phase, Purpose, stream};
use crate::ops::sampling::SamplingRule;
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

    fn rule(&self) -> Result<SamplingRule> {
        Ok(SamplingRule {
            greedy: self.greedy,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            seed: self.seed,
            stream: stream(Purpose::Sampling, self.phase, 0, 0)?,
        })
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
    /// In place of `max_new_tokens` a limit for each sequence, in the order of the result: at least 1 each.
    pub limits: Option<&'a [usize]>,
    pub stop_ids: &'a [u32],
    pub sampling: &'a Sampling,
    /// False: the plain definition.
    pub kv_cache: bool,
    pub batching: Batching,
    pub warn: &'a dyn Fn(&str),
}

/// How sequences share the device.
#[derive(Clone, Copy, Debug, Default)]
pub struct Batching {
    /// Most sequences computed at once, rounded down to whole groups but at least one; None: all.
    pub max_sequences: Option<usize>,
    /// Tokens computed between two looks at which sequences have ended. None: 1 on a CPU, 8 on a GPU, where a look waits
    /// for the device.
    pub check_every: Option<usize>,
    /// No CUDA graphs: every operation of a step is launched by itself.
    pub enforce_eager: bool,
}

pub struct Completion {
    pub sequence: Sequence,
    pub logprobs: Vec<f32>, // of each response token, at the sampling temperature
    /// Ended with a stop token; otherwise the token limit clipped it.
    pub finished: bool,
}

impl Completion {
    fn new(prompt: &Prompt, member: usize) -> Completion {
        let (ids, prompt_len) = (prompt.ids.clone(), prompt.ids.len());
        let sequence = Sequence { uid: prompt.uid, member: member as u32, ids, prompt_len };
        Completion { sequence, logprobs: Vec::new(), finished: false }
    }

    /// Takes the next token; true when it was the last.
    fn push(&mut self, id: u32, logprob: f32, limit: usize, stop_ids: &[u32]) -> Result<bool> {
        if logprob.is_nan() {
            return Err(Error::Runtime("generate: the model's logits are not finite".into()));
        }
        self.sequence.ids.push(id);
        self.logprobs.push(logprob);
        self.finished = stop_ids.contains(&id);
        Ok(self.finished || self.logprobs.len() >= limit)
    }
}

impl<'a> Request<'a> {
    /// All prompts at once, with a cache.
    pub fn new(
        prompts: &'a [Prompt],
        group_size: usize,
        max_new_tokens: usize,
        stop_ids: &'a [u32],
        sampling: &'a Sampling,
    ) -> Request<'a> {
        Request {
            prompts,
            group_size,
            max_new_tokens,
            limits: None,
            stop_ids,
            sampling,
            kv_cache: true,
            batching: Batching::default(),
            warn: &|_| {},
        }
    }

    fn sequences(&self) -> usize {
        self.prompts.len() * self.group_size
    }

    /// Most tokens of the sequence at `place` in the result.
    fn limit(&self, place: usize) -> usize {
        self.limits.map_or(self.max_new_tokens, |limits| limits[place])
    }

    fn check(&self) -> Result<()> {
        if self.prompts.iter().any(|prompt| prompt.ids.is_empty()) {
            return Err(Error::Input("generate: an empty prompt".into()));
        }
        match self.limits {
            Some(limits) if limits.len() != self.sequences() || limits.contains(&0) => {
                let (found, expected) = (limits.len(), self.sequences());
                Err(Error::Runtime(format!("generate: found {found} limits, expected {expected} of at least 1")))
            }
            _ => Ok(()),
        }
    }
}

/// Completions of every prompt, group members together, prompts in order. `pass` gives phase and injection; its keys are
/// ignored. `progress` is told how many sequences have ended.
pub fn generate(model: &Qwen2, request: &Request, pass: &Pass, progress: impl FnMut(usize)) -> Result<Vec<Completion>> {
    let _no_grad = tch::no_grad_guard();
    request.check()?;
    if request.limits.is_none() && request.max_new_tokens == 0 {
        let members = |prompt| (0..request.group_size).map(move |member| Completion::new(prompt, member));
        return Ok(request.prompts.iter().flat_map(members).collect());
    }
    match request.kv_cache {
        true => engine::run(model, request, pass, progress),
        false => plain::run(model, request, pass, progress),
    }
}
