//! The policy loss: clipped token objective with dual clip, plus a KL penalty to a frozen reference.
//!
//! The policy runs on flattened, unpadded response tokens, so everything here is per token, [T]. With the
//! log-probs `new` (with gradient), `old` (of the policy that sampled), `ref` and the advantage A:
//!
//! ```text
//! r      = exp(clamp(new - old, -20, 20))
//! policy = max(-r A, -clip(r, 1 - low, 1 + high) A)          PPO, arXiv 1707.06347, eq. 7
//!          and where A < 0: min(policy, c |A|)               dual clip, arXiv 1912.09729, eq. 5
//! x      = ref - new
//! kl     = k1: -x     k2: x^2 / 2     k3: clamp(e^x - 1 - x, -10, 10) with x clamped to +-20
//! loss   = sum over tokens of w (policy + kl_coef kl)
//! ```
//!
//! (k1, k2, k3: J. Schulman, "Approximating KL divergence"; clamps as in verl.) The aggregation is nothing but
//! the weight w of a token. It is taken from the WHOLE optimizer batch ([`LossNormalizer`]), not from the
//! tensors at hand, so the losses and gradients of micro-batches add up to those of the batch:
//!
//! ```text
//! token_mean     w = 1 / tokens of the optimizer batch                 (verl, DAPO)
//! sequence_mean  w = 1 / (tokens of its sequence * sequences)          (the GRPO paper)
//! sum_over_lmax  w = 1 / (sequences * Lmax)                            (Dr. GRPO)
//! ```

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::section::{Aggregation, AlgorithmSection, KlEstimator};
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
    pub new_logprobs: &'a Tensor,         // [T] f32, carries the gradient
    pub old_logprobs: &'a Tensor,         // [T]
    pub ref_logprobs: Option<&'a Tensor>, // [T]; needed when kl_coef is not 0
    pub advantages: &'a Tensor,           // [T], or [sequences] for one value per sequence
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

/// Sums over the tokens of one micro-batch; [`merge`](LossMetrics::merge) adds those of an optimizer batch.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct LossMetrics {
    /// sum of w * policy: the share of this micro-batch in `loss/policy`.
    pub policy_loss: f64,
    /// kl_coef * sum of w * kl: its share in `loss/kl`.
    pub kl_loss: f64,
    /// Sum over tokens of the KL estimate (0 without a reference).
    pub kl_sum: f64,
    pub tokens: f64,
    /// Tokens with A < 0 and r < 1 - clip_low: their gradient is cut.
    pub clipped_low_tokens: f64,
    /// Tokens with A > 0 and r > 1 + clip_high: their gradient is cut.
    pub clipped_high_tokens: f64,
    /// Tokens with A < 0 that the dual clip caught.
    pub dual_clipped_tokens: f64,
    pub ratio_max: f64,
}

impl LossMetrics {
    pub fn merge(&mut self, other: &LossMetrics) {
        self.policy_loss += other.policy_loss;
        self.kl_loss += other.kl_loss;
        self.kl_sum += other.kl_sum;
        self.tokens += other.tokens;
        self.clipped_low_tokens += other.clipped_low_tokens;
        self.clipped_high_tokens += other.clipped_high_tokens;
        self.dual_clipped_tokens += other.dual_clipped_tokens;
        // f64::max would drop a NaN, and a NaN ratio must be seen.
        if other.ratio_max.is_nan() || other.ratio_max > self.ratio_max {
            self.ratio_max = other.ratio_max;
        }
    }

    /// False when the loss of any merged micro-batch was NaN or infinite: the step must be skipped.
    pub fn is_finite(&self) -> bool {
        (self.policy_loss + self.kl_loss).is_finite()
    }

    /// `kl/ref`: mean KL estimate per token.
    pub fn kl_ref(&self) -> f64 {
        self.per_token(self.kl_sum)
    }

    /// `ratio/clipped_low`.
    pub fn clipped_low_ratio(&self) -> f64 {
        self.per_token(self.clipped_low_tokens)
    }

    /// `ratio/clipped_high`.
    pub fn clipped_high_ratio(&self) -> f64 {
        self.per_token(self.clipped_high_tokens)
    }

    fn per_token(&self, sum: f64) -> f64 {
        if self.tokens > 0.0 { sum / self.tokens } else { 0.0 }
    }
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
    let log_ratio =
        keep(&inputs.new_logprobs.f_sub(&old)?, counts.as_ref())?.f_clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)?; // [T]
    let ratio = log_ratio.f_exp()?; // [T]
    let (policy, dual_clipped) = clipped_objective(&ratio, &advantages, config)?; // [T]
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

/// Replaces what does not count by 0, in value and gradient (a product with the mask would keep a NaN).
fn keep(x: &Tensor, counts: Option<&Tensor>) -> Result<Tensor> {
    Ok(match counts {
        Some(counts) => x.f_masked_fill(&counts.f_logical_not()?, 0.0)?,
        None => x.shallow_clone(),
    })
}

/// Weight of each token [T], 0 where the mask is 0; the divisors are formed in f64.
fn token_weights(
    inputs: &PolicyLossInputs,
    counts: Option<&Tensor>,
    aggregation: Aggregation,
    normalizer: LossNormalizer,
) -> Result<Tensor> {
    let lengths = inputs.sequence_lengths;
    let mask: Option<Vec<bool>> = counts.map(Vec::<bool>::try_from).transpose()?;
    let total: usize = lengths.iter().sum();
    let mut weights: Vec<f32> = Vec::with_capacity(total);
    let mut counted_total = 0u64;
    for &length in lengths {
        let start = weights.len();
        let is_counted = |i: usize| mask.as_ref().is_none_or(|m| m[start + i]);
        let counted = (0..length).filter(|&i| is_counted(i)).count() as u64;
        counted_total += counted;
        let divisor = match aggregation {
            Aggregation::TokenMean => normalizer.tokens as f64,
            Aggregation::SequenceMean => counted as f64 * normalizer.sequences as f64,
            Aggregation::SumOverLmax => normalizer.sequences as f64 * normalizer.max_response_tokens as f64,
        };
        if counted > 0 && divisor < 1.0 {
            bail_input!("loss normalizer: found a divisor of {divisor} for {aggregation:?}, expected at least 1");
        }
        weights.extend((0..length).map(|i| if is_counted(i) { (1.0 / divisor) as f32 } else { 0.0 }));
    }
    let sequences = lengths.len() as u64;
    if counted_total > normalizer.tokens || sequences > normalizer.sequences {
        bail_input!(
            "loss normalizer: found {} tokens and {} sequences, expected at least the micro-batch's {counted_total} \
             and {sequences} (it counts the whole optimizer batch)",
            normalizer.tokens,
            normalizer.sequences
        );
    }
    let new = inputs.new_logprobs;
    Ok(Tensor::f_from_slice(&weights)?.f_to_kind(new.kind())?.f_to_device(new.device())?)
}

/// Advantages per token [T], from [T] or [sequences].
fn spread_advantages(inputs: &PolicyLossInputs, tokens: usize) -> Result<Tensor> {
    let new = inputs.new_logprobs;
    let advantages = inputs.advantages.detach().f_to_kind(new.kind())?.f_to_device(new.device())?;
    if advantages.size() == [tokens as i64] {
        return Ok(advantages);
    }
    let sequence_of: Vec<i64> =
        inputs.sequence_lengths.iter().enumerate().flat_map(|(s, &n)| std::iter::repeat_n(s as i64, n)).collect();
    Ok(advantages.f_index_select(0, &Tensor::f_from_slice(&sequence_of)?.f_to_device(new.device())?)?)
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
    Ok(tokens)
}
