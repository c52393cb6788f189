//! The policy loss: clipped objective with dual clip, plus a KL penalty to a frozen reference, minus an entropy bonus.
//!
//! The policy runs on flattened, unpadded response tokens, so everything here is per token, [T]. With the
//! log-probs `new` (with gradient), `old` (of the policy before the update), `rollout` (as sampled), `ref`, the entropy H
//! (with gradient) and the advantage A:
//!
//! ```text
//! d      = new - old;  ratio sequence: its mean over the tokens of the sequence     GSPO, arXiv 2507.18071, eq. 7
//! r      = exp(clamp(d, -20, 20))
//! policy = max(-r A, -clip(r, 1 - low, 1 + high) A)          PPO, arXiv 1707.06347, eq. 7
//!          and where A < 0: min(policy, c |A|)               dual clip, arXiv 1912.09729, eq. 5
//!          times min(exp(clamp(old - rollout, -20, 20)), C), a constant             truncated_importance: C
//! x      = ref - new
//! kl     = k1: -x     k2: x^2 / 2     k3: clamp(e^x - 1 - x, -10, 10) with x clamped to +-20
//! loss   = sum over tokens of w (policy + kl_coef kl) - entropy_coef (sum of H) / tokens of the optimizer batch
//! ```
//!
//! (k1, k2, k3: J. Schulman, "Approximating KL divergence"; clamps as in verl.) A sequence's ratio depends on all its
//! tokens, and so its gradient reaches each of them by 1/length. The importance weight corrects for a rollout that was
//! not quite the old policy: other noise, AQN, another kernel. The entropy bonus is a mean over tokens whatever the
//! aggregation, as in TRL. The aggregation is nothing but
//! the weight w of a token. It is taken from the WHOLE optimizer batch ([`LossNormalizer`]), not from the
//! tensors at hand, so the losses and gradients of micro-batches add up to those of the batch:
//!
//! ```text
//! token_mean     w = 1 / tokens of the optimizer batch                 (verl, DAPO)
//! sequence_mean  w = 1 / (tokens of its sequence * sequences)          (the GRPO paper, GSPO)
//! sum_over_lmax  w = 1 / (sequences * Lmax)                            (Dr. GRPO)
//! ```

mod metrics;
mod tokens;

use tch::{Kind, Tensor};

pub use metrics::LossMetrics;
use tokens::{keep, sequence_means, spread_advantages, token_weights};

use super::section::{Aggregation, AlgorithmSection, KlEstimator, RatioLevel};
use crate::{Result, bail_input};

/// |new - old| beyond this says nothing more than "impossible"; e^20 keeps r finite in f32.
const LOG_RATIO_LIMIT: f64 = 20.0;
const K3_LOG_RATIO_LIMIT: f64 = 20.0;
const K3_LIMIT: f64 = 10.0;

/// The loss's parameters: what it needs of the `algorithm` section.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PolicyLossConfig {
    pub clip_low: f64,
    pub clip_high: f64,
    /// c of the dual clip; None turns it off.
    pub dual_clip: Option<f64>,
    pub aggregation: Aggregation,
    pub kl_coef: f64,
    pub kl_estimator: KlEstimator,
    pub ratio: RatioLevel,
    /// C; None: no importance weight.
    pub truncated_importance: Option<f64>,
    pub entropy_coef: f64,
}

impl From<&AlgorithmSection> for PolicyLossConfig {
    fn from(section: &AlgorithmSection) -> PolicyLossConfig {
        PolicyLossConfig {
            clip_low: section.clip_low,
            clip_high: section.clip_high,
            dual_clip: section.dual_clip,
            aggregation: section.aggregation,
            kl_coef: section.kl_coef,
            kl_estimator: section.kl_estimator,
            ratio: section.ratio,
            truncated_importance: section.truncated_importance,
            entropy_coef: section.entropy_coef,
        }
    }
}

/// What the tokens of one micro-batch are divided by: counts over the whole optimizer batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LossNormalizer {
    /// Unmasked response tokens of the optimizer batch.
    pub tokens: u64,
    /// Sequences of the optimizer batch.
    pub sequences: u64,
    /// Lmax: the configured limit on response tokens.
    pub max_response_tokens: u64,
}

/// Response tokens of a micro-batch, its sequences one after another.
#[derive(Debug, Clone, Copy)]
pub struct PolicyLossInputs<'a> {
    pub new_logprobs: &'a Tensor,             // [T] f32, carries the gradient
    pub old_logprobs: &'a Tensor,             // [T]
    pub ref_logprobs: Option<&'a Tensor>,     // [T]; needed when kl_coef is not 0
    pub rollout_logprobs: Option<&'a Tensor>, // [T]; needed with truncated_importance
    pub entropy: Option<&'a Tensor>,          // [T], carries the gradient; needed when entropy_coef is not 0
    pub advantages: &'a Tensor,               // [T], or [sequences] for one value per sequence
    /// [T], nonzero = counts. A token left out has no influence at all, even if it is NaN. None: all count.
    pub mask: Option<&'a Tensor>,
    /// Tokens of each sequence; they add up to T.
    pub sequence_lengths: &'a [usize],
}

/// The scalar to run backward on, and what happened (detached).
#[derive(Debug)]
pub struct LossOutput {
    pub loss: Tensor, // [] f32
    pub metrics: LossMetrics,
}

/// Loss of one micro-batch, already divided for its optimizer batch: call backward on each and add up.
///
/// Costs one synchronization with the device, to read the metrics.
///
/// # Errors
/// Lengths that disagree, no reference where `kl_coef` is not 0, a normalizer that contradicts the inputs, or
/// what libtorch refuses.
pub fn policy_loss(
    inputs: &PolicyLossInputs,
    config: &PolicyLossConfig,
    normalizer: LossNormalizer,
) -> Result<LossOutput> {
    let tokens = check(inputs, config)?;
    let device = inputs.new_logprobs.device();
    let kind = inputs.new_logprobs.kind();
    let counts = inputs.mask.map(|m| m.f_ne(0)?.f_to_device(device)).transpose()?; // [T] bool
    let advantages = spread_advantages(inputs, tokens)?; // [T]
    let weights = token_weights(inputs, counts.as_ref(), config.aggregation, normalizer)?; // [T]

    let old = inputs.old_logprobs.f_to_kind(kind)?;
    let log_ratio = keep(&inputs.new_logprobs.f_sub(&old)?, counts.as_ref())?; // [T]
    let log_ratio = match config.ratio {
        RatioLevel::Token => log_ratio,
        RatioLevel::Sequence => sequence_means(&log_ratio, inputs.sequence_lengths, counts.as_ref())?,
    };
    let ratio = log_ratio.f_clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)?.f_exp()?; // [T]
    let (policy, dual_clipped) = clipped_objective(&ratio, &advantages, config)?; // [T]
    let importance = importance_weights(inputs, config, counts.as_ref())?;
    let policy = match &importance {
        Some((weight, _)) => policy.f_mul(weight)?,
        None => policy,
    };
    let policy_loss = policy.f_mul(&weights)?.f_sum(kind)?; // []

    let (kl_loss, kl_sum) = match inputs.ref_logprobs {
        Some(reference) => {
            let x = keep(&reference.f_to_kind(kind)?.f_sub(inputs.new_logprobs)?, counts.as_ref())?;
            let kl = kl_estimate(&x, config.kl_estimator)?; // [T]; 0 at tokens that do not count (x = 0)
            (kl.f_mul(&weights)?.f_sum(kind)?.f_mul_scalar(config.kl_coef)?, kl.detach().f_sum(Kind::Double)?)
        }
        None => (policy_loss.f_zeros_like()?, Tensor::f_zeros([], (Kind::Double, device))?),
    };
    // Adding a zero would turn a NaN reference (kl_coef 0, logged only) into a NaN loss.
    let loss = if config.kl_coef == 0.0 { policy_loss.shallow_clone() } else { policy_loss.f_add(&kl_loss)? };
    let entropy_loss = match inputs.entropy {
        Some(entropy) if config.entropy_coef != 0.0 => {
            let sum = keep(entropy, counts.as_ref())?.f_sum(kind)?;
            Some(sum.f_mul_scalar(-config.entropy_coef / normalizer.tokens as f64)?)
        }
        _ => None,
    };
    let loss = match &entropy_loss {
        Some(bonus) => loss.f_add(bonus)?,
        None => loss,
    };

    let metrics = tch::no_grad(|| -> Result<LossMetrics> {
        let ratio = ratio.detach();
        let weighs = weights.f_ne(0)?;
        let count = |m: Tensor| -> Result<Tensor> { Ok(m.f_logical_and(&weighs)?.f_sum(Kind::Double)?) };
        let low = ratio.f_lt(1.0 - config.clip_low)?.f_logical_and(&advantages.f_lt(0.0)?)?;
        let high = ratio.f_gt(1.0 + config.clip_high)?.f_logical_and(&advantages.f_gt(0.0)?)?;
        let ratio_max = ratio.f_masked_fill(&weighs.f_logical_not()?, 0.0)?.f_max()?.f_to_kind(Kind::Double)?;
        let scalars = [
            policy_loss.detach().f_to_kind(Kind::Double)?,
            kl_loss.detach().f_to_kind(Kind::Double)?,
            kl_sum,
            weighs.f_sum(Kind::Double)?,
            count(low)?,
            count(high)?,
            count(dual_clipped)?,
            ratio_max,
            scalar_or_0(entropy_loss.as_ref(), device)?,
            scalar_or_0(
                importance.as_ref().map(|(weight, _)| keep(weight, Some(&weighs))).transpose()?.as_ref(),
                device,
            )?,
            scalar_or_0(importance.as_ref().map(|(_, cut)| cut.f_logical_and(&weighs)).transpose()?.as_ref(), device)?,
        ];
        let v = Vec::<f64>::try_from(&Tensor::f_stack(&scalars, 0)?)?;
        Ok(LossMetrics {
            policy_loss: v[0],
            kl_loss: if config.kl_coef == 0.0 { 0.0 } else { v[1] },
            kl_sum: v[2],
            tokens: v[3],
            clipped_low_tokens: v[4],
            clipped_high_tokens: v[5],
            dual_clipped_tokens: v[6],
            ratio_max: v[7],
            entropy_loss: v[8],
            importance_sum: v[9],
            truncated_tokens: v[10],
        })
    })?;
    Ok(LossOutput { loss, metrics })
}

/// Token objective [T], and the tokens whose value the dual clip replaced [T] bool.
fn clipped_objective(ratio: &Tensor, advantages: &Tensor, config: &PolicyLossConfig) -> Result<(Tensor, Tensor)> {
    let minus_advantages = advantages.f_neg()?;
    let unclipped = ratio.f_mul(&minus_advantages)?;
    let clipped = ratio.f_clamp(1.0 - config.clip_low, 1.0 + config.clip_high)?.f_mul(&minus_advantages)?;
    let objective = unclipped.f_maximum(&clipped)?;
    let Some(c) = config.dual_clip else {
        let none = objective.f_zeros_like()?.f_to_kind(Kind::Bool)?;
        return Ok((objective, none));
    };
    let bound = minus_advantages.f_mul_scalar(c)?; // c |A| where A < 0
    let caught = advantages.f_lt(0.0)?.f_logical_and(&objective.detach().f_gt_tensor(&bound)?)?;
    Ok((bound.f_where_self(&caught, &objective)?, caught))
}

/// min(exp(old - rollout), C) [T] and where C was the smaller [T] bool; both constant.
fn importance_weights(
    inputs: &PolicyLossInputs,
    config: &PolicyLossConfig,
    counts: Option<&Tensor>,
) -> Result<Option<(Tensor, Tensor)>> {
    let (Some(limit), Some(rollout)) = (config.truncated_importance, inputs.rollout_logprobs) else {
        return Ok(None);
    };
    let kind = inputs.new_logprobs.kind();
    let gap = keep(&inputs.old_logprobs.f_to_kind(kind)?.f_sub(&rollout.f_to_kind(kind)?)?, counts)?.f_detach()?;
    let weight = gap.f_clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)?.f_exp()?;
    let cut = weight.f_gt(limit)?;
    Ok(Some((weight.f_clamp_max(limit)?, cut)))
}

/// The sum as f64 [], or 0.
fn scalar_or_0(x: Option<&Tensor>, device: tch::Device) -> Result<Tensor> {
    Ok(match x {
        Some(x) => x.detach().f_sum(Kind::Double)?,
        None => Tensor::f_zeros([], (Kind::Double, device))?,
    })
}

/// KL estimate [T] from x = ref - new [T].
fn kl_estimate(x: &Tensor, estimator: KlEstimator) -> Result<Tensor> {
    Ok(match estimator {
        KlEstimator::K1 => x.f_neg()?,
        KlEstimator::K2 => x.f_square()?.f_mul_scalar(0.5)?,
        KlEstimator::K3 => {
            let x = x.f_clamp(-K3_LOG_RATIO_LIMIT, K3_LOG_RATIO_LIMIT)?;
            // expm1 keeps the digits that e^x - 1 would lose where x is small, which is nearly everywhere.
            x.f_expm1()?.f_sub(&x)?.f_clamp(-K3_LIMIT, K3_LIMIT)?
        }
    })
}

/// The number of tokens T, once every shape agrees with it.
fn check(inputs: &PolicyLossInputs, config: &PolicyLossConfig) -> Result<usize> {
    let tokens: usize = inputs.sequence_lengths.iter().sum();
    if tokens == 0 {
        bail_input!("policy loss: found no response token in {} sequences", inputs.sequence_lengths.len());
    }
    let per_token = [
        ("new_logprobs", Some(inputs.new_logprobs)),
        ("old_logprobs", Some(inputs.old_logprobs)),
        ("ref_logprobs", inputs.ref_logprobs),
        ("rollout_logprobs", inputs.rollout_logprobs),
        ("entropy", inputs.entropy),
        ("mask", inputs.mask),
    ];
    for (name, tensor) in per_token {
        if let Some(t) = tensor
            && t.size() != [tokens as i64]
        {
            bail_input!("policy loss: {name}: found shape {:?}, expected [{tokens}]", t.size());
        }
    }
    let sequences = inputs.sequence_lengths.len();
    let size = inputs.advantages.size();
    if size != [tokens as i64] && size != [sequences as i64] {
        bail_input!("policy loss: advantages: found shape {size:?}, expected [{tokens}] or [{sequences}]");
    }
    if config.kl_coef != 0.0 && inputs.ref_logprobs.is_none() {
        bail_input!("policy loss: found no reference log-probs, expected them because kl_coef is {}", config.kl_coef);
    }
    if config.truncated_importance.is_some() && inputs.rollout_logprobs.is_none() {
        bail_input!("policy loss: found no rollout log-probs, expected them for truncated_importance");
    }
    if config.entropy_coef != 0.0 && inputs.entropy.is_none() {
        bail_input!("policy loss: found no entropy, expected it because entropy_coef is {}", config.entropy_coef);
    }
    Ok(tokens)
}
