//! A whole small model with error in every product.
//!
//! A pass whose blocks will be computed again takes, to the bit, the products of one that keeps them, though it wants no gradient
//! itself; over few rows and over many. And what a rollout in rows that are refilled, with a cache, as a CUDA graph or not, says of
//! its tokens is what one pass over the whole sequences says under the same keys: the same draws, to rounding.

use std::cell::Cell;

use tch::{Device, Kind, Tensor};

use super::{Check, Compared, enter};
use crate::Result;
use crate::inject::injector::Injector;
use crate::inject::plan::InjectionPlan;
use crate::inject::section::{FakeQuantSection, NoiseInjectionSection, NoisyOpsSection};
use crate::model::config::Qwen2Config;
use crate::model::generate::{Batching, Completion, Prompt, Request, Sampling, generate};
use crate::model::load::random_model;
use crate::model::logprobs::response_logprobs;
use crate::model::pass::{Pass, PromptUid, Sequence};
use crate::model::qwen2::Qwen2;
use crate::numerics::noise_key::Phase;
use crate::ops::cuda::launch::Executor;
use crate::ops::matmul_error::RowKeys;

/// Tokens of a sequence, and of its prompt.
const LENGTH: usize = 40;
const PROMPT: usize = 7;

pub fn checks(executor: &dyn Executor, checks: &mut Vec<Check>) -> Result<()> {
    for sequences in [2, 12] {
        let run = |compared: &mut Compared| computed_again(executor.device(), sequences, compared);
        let case = format!("blocks computed again, {sequences} sequences");
        enter(checks, "model", case, Kind::BFloat16, (sequences as usize * LENGTH, 64), run)?;
    }
    for (kind, tolerance) in [(Kind::Float, 1e-4), (Kind::BFloat16, 0.15)] {
        let ways = [("eager", true, 0), ("as a graph", false, 0), ("as a graph, of the 9 likeliest", false, 9)];
        for (way, enforce_eager, top_k) in ways {
            let run =
                |compared: &mut Compared| rollout(executor.device(), kind, (enforce_eager, top_k), tolerance, compared);
            enter(checks, "model", format!("a rollout, {way}"), kind, (PROMPTS as usize * GROUP, NEW_TOKENS), run)?;
        }
    }
    Ok(())
}

/// Applies its plan: error in every product.
fn noisy(model: &Qwen2) -> Result<Injector> {
    let noise = NoisyOpsSection { enabled: true, exclude_modules: vec![], ..NoisyOpsSection::default() };
    let (aqn, quant) = (NoiseInjectionSection::default(), FakeQuantSection::default());
    let plan = InjectionPlan::resolve(&aqn, &noise, &quant, &model.config.modules(), 11)?;
    Ok(Injector::applying(plan.clone(), plan, 1))
}

fn computed_again(device: Device, sequences: u32, compared: &mut Compared) -> Result<()> {
    let model = random_model(Qwen2Config::preset("tiny-4x64")?, 5, 0.2, device, Kind::BFloat16)?;
    let injector = noisy(&model)?;
    let sequence = |number: u32| Sequence {
        uid: PromptUid { step: 7, dataset_index: number },
        member: 0,
        ids: (0..LENGTH as u32).map(|p| 2 + (number * 31 + p * 17) % 40).collect(),
        prompt_len: PROMPT,
    };
    let all: Vec<Sequence> = (0..sequences).map(sequence).collect();
    let all: Vec<&Sequence> = all.iter().collect();
    let pass = || Pass::injected(&injector, Phase::Update, RowKeys::new(Vec::new()));
    let kept = response_logprobs(&model, &all, 1.0, &Pass { differentiable: true, ..pass() })?;
    let first = response_logprobs(&model, &all, 1.0, &Pass { to_recompute: true, ..pass() })?;
    compared.tensors(&first.logprobs, &kept.logprobs.f_to_device(Device::Cpu)?)
}

const PROMPTS: u32 = 6;
const GROUP: usize = 3;
const NEW_TOKENS: usize = 40;

fn rollout(
    device: Device,
    kind: Kind,
    (enforce_eager, top_k): (bool, usize),
    tolerance: f64,
    compared: &mut Compared,
) -> Result<()> {
    // Heads that decode_attention.cu has a kernel for.
    let config = Qwen2Config { head_dim: 64, ..Qwen2Config::preset("tiny-4x64")? };
    let model = random_model(config, 5, 0.1, device, kind)?;
    let injector = noisy(&model)?;
    let prompt = |number: u32| Prompt {
        uid: PromptUid { step: 7, dataset_index: number },
        ids: (0..3 + 4 * number).map(|p| 2 + (number * 31 + p * 17) % 40).collect(),
    };
    let prompts: Vec<Prompt> = (0..PROMPTS).map(prompt).collect();
    let temperature = 0.9;
    let sampling = Sampling { greedy: false, temperature, top_p: 1.0, top_k, seed: 11, phase: Phase::Rollout };
    let batching = Batching { max_sequences: Some(2 * GROUP), check_every: Some(4), enforce_eager };
    let pass = Pass::injected(&injector, Phase::Rollout, RowKeys::new(Vec::new()));
    // Where no graph can be captured a rollout goes on without, and warns.
    let warnings = Cell::new(0);
    let warn = |_: &str| warnings.set(warnings.get() + 1);
    let request = Request { batching, warn: &warn, ..Request::new(&prompts, GROUP, NEW_TOKENS, &[1, 2], &sampling) };
    let completions = tch::no_grad(|| generate(&model, &request, &pass, |_| {}))?;
    compared.counts(warnings.get(), 0);
    let sequences: Vec<&Sequence> = completions.iter().map(|Completion { sequence, .. }| sequence).collect();
    let scored = tch::no_grad(|| response_logprobs(&model, &sequences, temperature, &pass))?;
    let sampled: Vec<f32> = completions.iter().flat_map(|completion| completion.logprobs.iter().copied()).collect();
    compared.tensors_near(&scored.logprobs, &Tensor::f_from_slice(&sampled)?, tolerance, tolerance)
}
