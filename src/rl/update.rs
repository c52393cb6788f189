//! The policy update of one step: log-probs of the old and the reference policy, then an optimizer update for each
//! mini-batch, whose micro-batches are what is computed at once.
//!
//! Old log-probs run through the same function with the same micro-batch composition as the update, so that with
//! `draw: shared` the first mini-batch's ratio is exactly 1.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::loss::{LossMetrics, LossNormalizer, PolicyLossConfig, PolicyLossInputs, policy_loss};
use super::microbatch::with_halving;
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
    pub reference: Option<&'a mut Qwen2>,
    pub injector: &'a Injector,
    pub optimizer: &'a mut AdamW,
    pub recipe: &'a Recipe,
    /// Optimizer updates begun so far in the run, skipped ones included: part of dW's noise key.
    pub update_number: &'a mut u32,
    /// Of the micro-batch, so far in the run.
    pub halvings: &'a mut u32,
    pub step: u32,
    pub sigma: f64,
    pub progress: &'a mut dyn FnMut(u64), // sequences done
    pub warn: &'a dyn Fn(&str),
}

/// The sequences of one optimizer update, and what does not change during the step.
struct MiniBatch<'a> {
    sequences: Vec<&'a Sequence>,
    advantages: Vec<f32>,      // [sequences]
    old: Tensor,               // f32 [response tokens]
    sampled: Tensor,           // f32 [response tokens], as the rollout had them
    reference: Option<Tensor>, // f32 [response tokens]
}

impl MiniBatch<'_> {
    /// Response tokens of each sequence of a micro-batch.
    fn lengths(&self, part: &Range<usize>) -> Vec<usize> {
        self.sequences[part.clone()].iter().map(|s| s.response().len()).collect()
    }

    /// The part of `values` [response tokens] that is a micro-batch's.
    fn narrow(&self, values: &Tensor, part: &Range<usize>) -> Result<Tensor> {
        let count = |part: Range<usize>| self.lengths(&part).iter().sum::<usize>() as i64;
        Ok(values.f_narrow(0, count(0..part.start), count(part.clone()))?)
    }
}

/// Tokens of each sequence.
fn lengths(sequences: &[&Sequence]) -> Vec<usize> {
    sequences.iter().map(|s| s.ids.len()).collect()
}

/// What the micro-batches of an optimizer update add up to.
#[derive(Default)]
struct Accumulated {
    metrics: LossMetrics,
    entropy_sum: f64,
}

impl Updater<'_> {
    pub fn run(&mut self, rollout: &Rollout) -> Result<UpdateSummary> {
        let mut summary = UpdateSummary::default();
        let started = std::time::Instant::now();
        let device = self.model.device();
        self.move_reference(device)?;
        let minibatches = self.prepare(rollout, &mut summary)?;
        if self.recipe.trainer.offload_reference {
            self.move_reference(Device::Cpu)?;
        }
        summary.seconds_logprobs = started.elapsed().as_secs_f64();
        let started = std::time::Instant::now();
        let mut total = Accumulated::default();
        let _span = span("update");
        for minibatch in &minibatches {
            let Accumulated { metrics, entropy_sum } = self.optimizer_update(minibatch, &mut summary)?;
            if summary.updates == 1 {
                summary.first_ratio_max = metrics.ratio_max;
            }
            total.metrics.merge(&metrics);
            total.entropy_sum += entropy_sum;
        }
        let updates = summary.updates as f64;
        summary.entropy = total.entropy_sum / f64::max(total.metrics.tokens, 1.0);
        summary.loss = total.metrics;
        summary.loss.policy_loss /= updates;
        summary.loss.kl_loss /= updates;
        summary.loss.entropy_loss /= updates;
        summary.grad_norm /= (summary.updates - summary.skipped).max(1) as f64;
        // Without it the last optimizer update would be in nobody's time.
        synchronize(device);
        summary.seconds_update = started.elapsed().as_secs_f64();
        Ok(summary)
    }

    /// What the KL penalty refers to; None without one.
    fn reference_policy(&self) -> Option<&Qwen2> {
        let own_base = self.model.lora.is_some() && self.recipe.algorithm.kl_coef != 0.0;
        self.reference.as_deref().or(own_base.then_some(&*self.model))
    }

    fn move_reference(&mut self, device: Device) -> Result<()> {
        self.reference.as_mut().map_or(Ok(()), |reference| reference.move_to(device))
    }

    /// Splits the rollout and computes old and reference log-probs.
    fn prepare<'r>(&mut self, rollout: &'r Rollout, summary: &mut UpdateSummary) -> Result<Vec<MiniBatch<'r>>> {
        let _span = span("logprobs");
        let per_minibatch = self.recipe.trainer.minibatch_prompts * self.recipe.rollout.group_size;
        let (mut gap, mut tokens) = (0.0, 0usize);
        let mut minibatches = Vec::new();
        let indices: Vec<usize> = (0..rollout.completions.len()).collect();
        for minibatch in indices.chunks(per_minibatch) {
            let sequences: Vec<&Sequence> = minibatch.iter().map(|&i| &rollout.completions[i].sequence).collect();
            let (old, reference) = self.in_microbatches(&lengths(&sequences), |updater, parts| {
                let old = updater.frozen_logprobs(updater.model, Phase::OldLogprobs, &sequences, parts)?;
                let reference = updater.reference_policy();
                let reference = reference.map(|m| updater.frozen_logprobs(m, Phase::RefLogprobs, &sequences, parts));
                Ok((old, reference.transpose()?))
            })?;
            let sampled: Vec<f32> =
                minibatch.iter().flat_map(|&i| rollout.completions[i].logprobs.iter().copied()).collect();
            let sampled = Tensor::f_from_slice(&sampled)?.f_to_device(old.device())?;
            gap += f64::try_from(old.f_sub(&sampled)?.f_abs()?.f_sum(Kind::Double)?)?;
            tokens += old.numel();
            let advantages = minibatch.iter().map(|&i| rollout.advantages[i] as f32).collect();
            minibatches.push(MiniBatch { sequences, advantages, old, sampled, reference });
        }
        summary.logprob_gap_abs = gap / tokens.max(1) as f64;
        Ok(minibatches)
    }

    /// As [`with_halving`], under this run's configuration.
    fn in_microbatches<T>(
        &mut self,
        lengths: &[usize],
        mut work: impl FnMut(&mut Self, &[Range<usize>]) -> Result<T>,
    ) -> Result<T> {
        let (trainer, dw_draw, warn) = (&self.recipe.trainer, self.injector.plan().dw_draw, self.warn);
        let (mut halvings, injector) = (*self.halvings, self.injector);
        injector.settle();
        let result = with_halving(trainer, dw_draw, &mut halvings, lengths, warn, |parts| {
            // Nothing of an attempt that failed counts.
            injector.forget();
            work(self, parts)
        });
        *self.halvings = halvings;
        result
    }

    /// f32 [response tokens], micro-batch by micro-batch.
    fn frozen_logprobs(
        &self,
        model: &Qwen2,
        phase: Phase,
        sequences: &[&Sequence],
        parts: &[Range<usize>],
    ) -> Result<Tensor> {
        let _span = span(if phase == Phase::RefLogprobs { "reference_logprobs" } else { "old_logprobs" });
        let _no_grad = tch::no_grad_guard();
        let pass = Pass::injected(self.injector, phase, RowKeys::new(Vec::new()));
        let temperature = self.recipe.rollout.temperature;
        let logprobs =
            |part: &Range<usize>| Ok(response_logprobs(model, &sequences[part.clone()], temperature, &pass)?.logprobs);
        Ok(Tensor::f_cat(&parts.iter().map(logprobs).collect::<Result<Vec<_>>>()?, 0)?)
    }

    fn optimizer_update(&mut self, minibatch: &MiniBatch, summary: &mut UpdateSummary) -> Result<Accumulated> {
        let all = 0..minibatch.sequences.len();
        let normalizer = LossNormalizer {
            tokens: minibatch.lengths(&all).iter().sum::<usize>() as u64,
            sequences: minibatch.sequences.len() as u64,
            max_response_tokens: self.recipe.data.max_response_tokens as u64,
        };
        let accumulated = self.in_microbatches(&lengths(&minibatch.sequences), |updater, parts| {
            for parameter in updater.model.parameters_mut() {
                parameter.zero_gradient()?;
            }
            // A skipped update or an attempt that failed has left the head's own gradient behind.
            drop(updater.model.head.take_own_gradient());
            let mut accumulated = Accumulated::default();
            for (number, part) in parts.iter().enumerate() {
                let draw = *updater.update_number * parts.len() as u32 + number as u32;
                let (metrics, entropy) = updater.backward(minibatch, part, normalizer, draw)?;
                accumulated.metrics.merge(&metrics);
                accumulated.entropy_sum += entropy;
                (updater.progress)(part.len() as u64);
            }
            Ok(accumulated)
        })?;
        let skipped = self.step_optimizer(&accumulated.metrics, summary)?;
        summary.updates += 1;
        summary.skipped += u64::from(skipped);
        *self.update_number += 1;
        Ok(accumulated)
    }

    /// Forward and backward of one micro-batch; returns its loss metrics and the sum of its entropies.
    fn backward(
        &mut self,
        minibatch: &MiniBatch,
        part: &Range<usize>,
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
        let sequences = &minibatch.sequences[part.clone()];
        let (TokenLogprobs { logprobs, entropy }, recompute) =
            if self.recipe.trainer.gradient_checkpointing.unwrap_or(on_gpu) {
                let (forward, recompute) = recomputed_logprobs(self.model, sequences, temperature, &pass)?;
                (forward, Some(recompute))
            } else {
                (response_logprobs(self.model, sequences, temperature, &pass)?, None)
            };
        let advantages = &minibatch.advantages[part.clone()];
        let advantages = Tensor::f_from_slice(advantages)?.f_to_device(self.model.device())?;
        let old = minibatch.narrow(&minibatch.old, part)?;
        let sampled = minibatch.narrow(&minibatch.sampled, part)?;
        let reference = minibatch.reference.as_ref().map(|r| minibatch.narrow(r, part)).transpose()?;
        let inputs = PolicyLossInputs {
            new_logprobs: &logprobs,
            old_logprobs: &old,
            ref_logprobs: reference.as_ref(),
            rollout_logprobs: Some(&sampled),
            entropy: Some(&entropy),
            advantages: &advantages,
            mask: None,
            sequence_lengths: &minibatch.lengths(part),
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
        Ok((output.metrics, f64::try_from(entropy.f_detach()?.f_sum(Kind::Double)?)?))
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
        // A frozen base stays as it was quantized.
        if model.lora.is_none() {
            model.invalidate();
        }
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
