//! The policy update of one step: log-probs of the old and the reference policy, then mini-batches of micro-batches.
//!
//! Old log-probs run through the same function with the same micro-batch composition as the update, so that with
//! `draw: shared` the first mini-batch's ratio is exactly 1.

use tch::{Kind, Tensor};

use super::loss::{LossMetrics, LossNormalizer, PolicyLossConfig, PolicyLossInputs, policy_loss};
use super::optimizer::{AdamW, ParamRef, StepOutcome};
use super::recipe::Recipe;
use super::rollout::Rollout;
use crate::inject::injector::Injector;
use crate::model::aqn;
use crate::model::logprobs::{recomputed_logprobs, response_logprobs};
use crate::model::parameter::Role;
use crate::model::pass::{Pass, Sequence};
use crate::model::qwen2::{Module, Qwen2};
use crate::numerics::noise_key::Phase;
use crate::ops::autograd::run_backward;
use crate::ops::cuda::memory::synchronize;
use crate::ops::matmul_error::{RowKeys, finish_product};
use crate::ops::profile::{numbered, span};
use crate::ops::token_logprobs::TokenLogprobs;
use crate::{Error, Result};

/// What the update of one step did, over all its optimizer updates.
#[derive(Default)]
pub struct UpdateSummary {
    pub loss: LossMetrics,
    pub updates: u64,
    pub skipped: u64,
    pub grad_norm: f64, // mean over updates that were not skipped
    pub lr: f64,
    pub entropy: f64,         // mean over response tokens, of the update's forward pass
    pub logprob_gap_abs: f64, // mean |old - rollout| over response tokens
    pub first_ratio_max: f64, // largest ratio of the first mini-batch
    pub seconds_logprobs: f64,
    pub seconds_update: f64,
}

pub struct Updater<'a> {
    pub model: &'a mut Qwen2,
    pub reference: Option<&'a Qwen2>,
    pub injector: &'a Injector,
    pub optimizer: &'a mut AdamW,
    pub recipe: &'a Recipe,
    /// Optimizer updates begun so far in the run, skipped ones included: part of dW's noise key.
    pub update_number: &'a mut u32,
    pub step: u32,
    pub sigma: f64,
    pub progress: &'a mut dyn FnMut(u64), // sequences done
}

/// Constants of a micro-batch: its sequences and the log-probs that do not change during the update.
struct MicroBatch<'a> {
    sequences: Vec<&'a Sequence>,
    advantages: Vec<f32>, // [sequences]
    lengths: Vec<usize>,  // response tokens of each sequence
    old: Tensor,          // f32 [response tokens]
    reference: Option<Tensor>,
}

impl Updater<'_> {
    pub fn run(&mut self, rollout: &Rollout) -> Result<UpdateSummary> {
        let mut summary = UpdateSummary::default();
        let started = std::time::Instant::now();
        let minibatches = self.prepare(rollout, &mut summary)?;
        summary.seconds_logprobs = started.elapsed().as_secs_f64();
        let started = std::time::Instant::now();
        let _span = span("update");
        let (mut entropy_sum, mut tokens) = (0.0, 0.0);
        for minibatch in &minibatches {
            let metrics = self.optimizer_update(minibatch, &mut entropy_sum, &mut tokens, &mut summary)?;
            if summary.updates == 1 {
                summary.first_ratio_max = metrics.ratio_max;
            }
            summary.loss.merge(&metrics);
        }
        let updates = summary.updates as f64;
        summary.loss.policy_loss /= updates;
        summary.loss.kl_loss /= updates;
        summary.grad_norm /= (summary.updates - summary.skipped).max(1) as f64;
        summary.entropy = entropy_sum / f64::max(tokens, 1.0);
        // Without it the last optimizer update would be in nobody's time.
        synchronize(self.model.device());
        summary.seconds_update = started.elapsed().as_secs_f64();
        Ok(summary)
    }

    /// Splits the rollout and computes old and reference log-probs of every micro-batch.
    fn prepare<'r>(&mut self, rollout: &'r Rollout, summary: &mut UpdateSummary) -> Result<Vec<Vec<MicroBatch<'r>>>> {
        let _span = span("logprobs");
        let trainer = &self.recipe.trainer;
        let per_minibatch = trainer.minibatch_prompts * self.recipe.rollout.group_size;
        let (mut gap, mut tokens) = (0.0, 0usize);
        let mut minibatches = Vec::new();
        let indices: Vec<usize> = (0..rollout.completions.len()).collect();
        for minibatch in indices.chunks(per_minibatch) {
            let mut microbatches = Vec::new();
            for microbatch in minibatch.chunks(trainer.microbatch_sequences) {
                let sequences: Vec<&Sequence> = microbatch.iter().map(|&i| &rollout.completions[i].sequence).collect();
                let old = self.frozen_logprobs(self.model, Phase::OldLogprobs, &sequences)?;
                let reference = match self.reference {
                    Some(reference) => Some(self.frozen_logprobs(reference, Phase::RefLogprobs, &sequences)?),
                    None => None,
                };
                let sampled: Vec<f32> =
                    microbatch.iter().flat_map(|&i| rollout.completions[i].logprobs.iter().copied()).collect();
                let sampled = Tensor::f_from_slice(&sampled)?.f_to_device(old.device())?;
                gap += f64::try_from(old.f_sub(&sampled)?.f_abs()?.f_sum(Kind::Double)?)?;
                tokens += old.numel();
                microbatches.push(MicroBatch {
                    advantages: microbatch.iter().map(|&i| rollout.advantages[i] as f32).collect(),
                    lengths: sequences.iter().map(|s| s.response().len()).collect(),
                    sequences,
                    old,
                    reference,
                });
            }
            minibatches.push(microbatches);
        }
        summary.logprob_gap_abs = gap / tokens.max(1) as f64;
        Ok(minibatches)
    }

    fn frozen_logprobs(&self, model: &Qwen2, phase: Phase, sequences: &[&Sequence]) -> Result<Tensor> {
        let _span = span(if phase == Phase::RefLogprobs { "reference_logprobs" } else { "old_logprobs" });
        let _no_grad = tch::no_grad_guard();
        let pass = Pass::injected(self.injector, phase, RowKeys::new(Vec::new()));
        Ok(response_logprobs(model, sequences, self.recipe.rollout.temperature, &pass)?.logprobs)
    }

    fn optimizer_update(
        &mut self,
        microbatches: &[MicroBatch],
        entropy_sum: &mut f64,
        tokens: &mut f64,
        summary: &mut UpdateSummary,
    ) -> Result<LossMetrics> {
        let count = |f: fn(&MicroBatch) -> usize| microbatches.iter().map(f).sum::<usize>() as u64;
        let normalizer = LossNormalizer {
            tokens: count(|m| m.lengths.iter().sum()),
            sequences: count(|m| m.lengths.len()),
            max_response_tokens: self.recipe.data.max_response_tokens as u64,
        };
        for parameter in self.model.parameters_mut() {
            parameter.zero_gradient()?;
        }
        // A skipped update has left the head's own gradient behind.
        drop(self.model.head.take_own_gradient());
        let mut metrics = LossMetrics::default();
        for (number, microbatch) in microbatches.iter().enumerate() {
            let draw = *self.update_number * microbatches.len() as u32 + number as u32;
            let (loss, entropy) = self.backward(microbatch, normalizer, draw)?;
            metrics.merge(&loss);
            *entropy_sum += entropy;
            *tokens += loss.tokens;
            (self.progress)(microbatch.sequences.len() as u64);
        }
        let skipped = self.step_optimizer(&metrics, summary)?;
        summary.updates += 1;
        summary.skipped += u64::from(skipped);
        *self.update_number += 1;
        Ok(metrics)
    }

    /// Forward and backward of one micro-batch; returns its loss metrics and the sum of its entropies.
    fn backward(
        &mut self,
        microbatch: &MicroBatch,
        normalizer: LossNormalizer,
        draw: u32,
    ) -> Result<(LossMetrics, f64)> {
        let span_forward = numbered("forward", u64::from(draw));
        let pass = Pass {
            differentiable: true,
            microbatch_draw: draw,
            ..Pass::injected(self.injector, Phase::Update, RowKeys::new(Vec::new()))
        };
        let temperature = self.recipe.rollout.temperature;
        let on_gpu = self.model.device().is_cuda();
        let (TokenLogprobs { logprobs, entropy }, recompute) =
            if self.recipe.trainer.gradient_checkpointing.unwrap_or(on_gpu) {
                let (forward, recompute) = recomputed_logprobs(self.model, &microbatch.sequences, temperature, &pass)?;
                (forward, Some(recompute))
            } else {
                (response_logprobs(self.model, &microbatch.sequences, temperature, &pass)?, None)
            };
        let advantages = Tensor::f_from_slice(&microbatch.advantages)?.f_to_device(self.model.device())?;
        let inputs = PolicyLossInputs {
            new_logprobs: &logprobs,
            old_logprobs: &microbatch.old,
            ref_logprobs: microbatch.reference.as_ref(),
            advantages: &advantages,
            mask: None,
            sequence_lengths: &microbatch.lengths,
        };
        let output = policy_loss(&inputs, &PolicyLossConfig::from(&self.recipe.algorithm), normalizer)?;
        drop(span_forward);
        if output.metrics.is_finite() {
            let _span = numbered("backward", u64::from(draw));
            match recompute {
                Some(recompute) => recompute.backward(&output.loss)?,
                None => run_backward(&output.loss)?,
            }
        }
        Ok((output.metrics, f64::try_from(entropy.f_sum(Kind::Double)?)?))
    }

    /// dW's error per update, clipping, AdamW, rounding into the compute weights. True when the update was skipped.
    fn step_optimizer(&mut self, metrics: &LossMetrics, summary: &mut UpdateSummary) -> Result<bool> {
        let _span = span("optimizer");
        summary.lr = self.optimizer.next_lr();
        self.model.set_update_number(*self.update_number + 1);
        if !metrics.is_finite() {
            self.optimizer.skip();
            return Ok(true);
        }
        let _no_grad = tch::no_grad_guard();
        add_update_gradient_error(self.model, self.injector, *self.update_number)?;
        let outcome = optimizer_step(self.model, self.optimizer, summary.lr)?;
        if outcome.skipped {
            return Ok(true);
        }
        summary.grad_norm += outcome.grad_norm;
        if self.injector.aqn_applies(Phase::Update) {
            // w' follows the new w; the draw is the step's, so the noise is the same.
            aqn::apply(self.model, self.injector, self.step, self.sigma)?;
        }
        Ok(false)
    }
}

/// One AdamW update of every trainable parameter from its accumulated gradient, rounded into the compute weights.
pub fn optimizer_step(model: &mut Qwen2, optimizer: &mut AdamW, lr: f64) -> Result<StepOutcome> {
    let tensors: Vec<(&str, Tensor, Tensor, bool)> = model
        .parameters()
        .into_iter()
        .filter_map(|p| Some((p.name.as_str(), p.master()?, p.gradient()?, p.role == Role::Vector)))
        .collect();
    let mut params: Vec<ParamRef> = tensors
        .iter()
        .map(|&(name, ref master, ref grad, is_norm_or_bias)| ParamRef { name, master, grad, is_norm_or_bias })
        .collect();
    let outcome = optimizer.step(&mut params, lr)?;
    drop(params);
    drop(tensors);
    if !outcome.skipped {
        for parameter in model.parameters_mut() {
            parameter.refresh()?;
        }
        model.invalidate();
    }
    Ok(outcome)
}

/// dW' = law(dW) on the accumulated gradient of every planned linear (`dw_draw: per_update`), and the head's own
/// gradient, kept apart under noise, joins its parameter's in either mode.
pub fn add_update_gradient_error(model: &Qwen2, injector: &Injector, update_number: u32) -> Result<()> {
    for (index, module) in model.modules() {
        let Module::Linear(_, weight) = module else { continue };
        let Some((_, shared)) = weight.anchor() else { continue };
        let out_features = shared.size()[0] as usize;
        let noise = injector.update_gradient_error(index, update_number, out_features);
        let noised = |gradient: Tensor| match &noise {
            Some(noise) => {
                let (error, keys) = (&noise.error, &noise.keys);
                finish_product(gradient, None, error.draw.as_ref(), keys, error.sink.as_ref(), Kind::Float)
            }
            None => Ok(gradient),
        };
        let mut shared = shared.shallow_clone();
        if index == model.head.site.index {
            if let Some(own) = model.head.take_own_gradient() {
                let _ = shared.f_add_(&noised(own)?)?;
            }
        } else if noise.is_some() {
            // In place where the result is the gradient itself, as it is on the CPU.
            let noised = noised(shared.shallow_clone())?;
            if noised.data_ptr() != shared.data_ptr() {
                shared.f_copy_(&noised)?;
            }
        }
    }
    Ok(())
}

/// Stops a run whose steps are not finite any more.
pub fn check_skipped(skipped_steps: u64, limit: u64) -> Result<()> {
    if skipped_steps > limit {
        return Err(Error::Runtime(format!(
            "{skipped_steps} optimizer steps were skipped for a non-finite loss or gradient (trainer.max_skipped_steps: {limit})"
        )));
    }
    Ok(())
}
