//! The loss's options by hand: a ratio of sequences, truncated importance weights, the entropy bonus.

use tch::Tensor;
use temper::rl::loss::{LossMetrics, LossNormalizer, PolicyLossConfig, PolicyLossInputs, policy_loss};
use temper::rl::section::{Aggregation, RatioLevel};

use crate::hand_tables::CONFIG;

/// Sequences of two and one token; log-probs `new`, with old = 0.
struct Batch<'a> {
    new: [f64; 3],
    advantages: [f64; 2],
    rollout: [f64; 3],
    mask: Option<&'a [f32]>,
}

impl Batch<'_> {
    /// Loss, gradients of the new log-probs, metrics. The entropy is 3 new, so that its gradient is 3.
    fn run(&self, config: PolicyLossConfig) -> (f64, Vec<f64>, LossMetrics) {
        let new = Tensor::from_slice(&self.new).set_requires_grad(true);
        let out = policy_loss(
            &PolicyLossInputs {
                new_logprobs: &new,
                old_logprobs: &Tensor::from_slice(&[0f64; 3]),
                ref_logprobs: None,
                rollout_logprobs: Some(&Tensor::from_slice(&self.rollout)),
                entropy: Some(&(&new * 3.0)),
                advantages: &Tensor::from_slice(&self.advantages),
                mask: self.mask.map(Tensor::from_slice).as_ref(),
                sequence_lengths: &[2, 1],
            },
            &config,
            LossNormalizer { tokens: if self.mask.is_some() { 2 } else { 3 }, sequences: 2, max_response_tokens: 10 },
        )
        .unwrap();
        out.loss.backward();
        (out.loss.double_value(&[]), Vec::try_from(&new.grad()).unwrap(), out.metrics)
    }
}

fn batch(new: [f64; 3], advantages: [f64; 2]) -> Batch<'static> {
    Batch { new, advantages, rollout: [0.0; 3], mask: None }
}

fn assert_near(got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    for (g, w) in got.iter().zip(want) {
        assert!((g - w).abs() < 2e-7, "{got:?}, expected {want:?}");
    }
}

fn sequence(aggregation: Aggregation) -> PolicyLossConfig {
    PolicyLossConfig { ratio: RatioLevel::Sequence, aggregation, ..CONFIG }
}

/// d = ln 2, -ln 2 | ln 1.1: the means are 0 and ln 1.1, r = 1 1 | 1.1, though the tokens' own ratios 2 and .5 would both be
/// cut for A = 1. A = 1 | 2.
/// token_mean: -(1 + 1 + 2.2)/3 = -1.4; the sequence's loss is -2r/3 with dr/dnew = r/2 at each token: -1/3 -1/3 | -2.2/3.
/// sequence_mean: -(1 + 2.2)/2 = -1.6; -1/4 -1/4 | -1.1.
#[test]
fn a_sequence_has_one_ratio() {
    let ln = f64::ln;
    let batch = batch([ln(2.0), -ln(2.0), ln(1.1)], [1.0, 2.0]);
    let (loss, gradient, metrics) = batch.run(sequence(Aggregation::TokenMean));
    assert_near(&[loss], &[-1.4]);
    assert_near(&gradient, &[-1.0 / 3.0, -1.0 / 3.0, -2.2 / 3.0]);
    assert_near(&[metrics.ratio_max, metrics.clipped_high_tokens], &[1.1, 0.0]);
    let (loss, gradient, _) = batch.run(sequence(Aggregation::SequenceMean));
    assert_near(&[loss], &[-1.6]);
    assert_near(&gradient, &[-0.25, -0.25, -1.1]);
    let (_, gradient, metrics) = batch.run(CONFIG);
    assert_near(&gradient[..1], &[0.0]);
    assert_eq!(metrics.clipped_high_tokens, 1.0, "by tokens the first is cut");
}

/// Means ln 1.5 and ln .5 with A = 1 | -1: both cut, at 1.2 and .8, all three tokens of them. -(1.2 * 2 - .8)/3.
#[test]
fn a_sequence_is_cut_as_a_whole() {
    let (loss, gradient, metrics) =
        batch([2.25f64.ln(), 0.0, 0.5f64.ln()], [1.0, -1.0]).run(sequence(Aggregation::TokenMean));
    assert_near(&[loss], &[-(2.4 - 0.8) / 3.0]);
    assert_eq!(gradient, [0.0; 3]);
    assert_eq!((metrics.clipped_high_tokens, metrics.clipped_low_tokens), (2.0, 1.0));
}

/// A token that does not count is no part of its sequence's mean, NaN or not: d = ln 1.1 alone.
#[test]
fn the_mean_is_over_what_counts() {
    let mut batch = batch([f64::NAN, 1.1f64.ln(), 0.0], [1.0, 0.0]);
    batch.mask = Some(&[0.0, 1.0, 1.0]);
    let (loss, gradient, _) = batch.run(sequence(Aggregation::TokenMean));
    assert_near(&[loss], &[-0.55]);
    assert_near(&gradient, &[0.0, -0.55, 0.0]);
}

/// r = 1, A = 1 | -1, rollout = ln .5, ln .8 | -1: weights min(2, 1.5), min(1.25, 1.5) | min(e, 1.5), constants in the gradient.
/// -(1.5 + 1.25 - 1.5)/3.
#[test]
fn importance_weights_are_truncated() {
    let batch = Batch { rollout: [0.5f64.ln(), 0.8f64.ln(), -1.0], ..batch([0.0; 3], [1.0, -1.0]) };
    let (loss, gradient, metrics) = batch.run(PolicyLossConfig { truncated_importance: Some(1.5), ..CONFIG });
    assert_near(&[loss], &[-1.25 / 3.0]);
    assert_near(&gradient, &[-0.5, -1.25 / 3.0, 0.5]);
    assert_near(&[metrics.importance_mean(), metrics.truncated_ratio()], &[4.25 / 3.0, 2.0 / 3.0]);
    let (loss, _, metrics) = batch.run(CONFIG);
    assert_near(&[loss], &[-1.0 / 3.0]);
    assert_eq!(metrics.importance_sum, 0.0, "off by default");
}

/// The KL term is not weighed by it, and a gap of 50 is taken as 20.
#[test]
fn the_importance_weight_is_bounded_and_of_the_policy_term_alone() {
    let batch = Batch { rollout: [-50.0, 0.0, 50.0], ..batch([0.0; 3], [1.0, 0.0]) };
    let (loss, _, _) = batch.run(PolicyLossConfig { truncated_importance: Some(1e12), ..CONFIG });
    assert!((loss / (-(20f64.exp() + 1.0) / 3.0) - 1.0).abs() < 1e-6, "{loss}");
}

/// A = 0: the loss is the bonus alone, -.1 * mean of 3 new, whatever the aggregation; its gradient -.1 in each of 3 tokens.
#[test]
fn the_entropy_bonus_is_a_mean_over_tokens() {
    for aggregation in [Aggregation::TokenMean, Aggregation::SequenceMean, Aggregation::SumOverLmax] {
        let config = PolicyLossConfig { entropy_coef: 0.1, aggregation, ..CONFIG };
        let (loss, gradient, metrics) = batch([0.1, 0.2, -0.6], [0.0, 0.0]).run(config);
        assert_near(&[loss, metrics.entropy_loss], &[0.03, 0.03]);
        assert_near(&gradient, &[-0.1; 3]);
    }
    let mut masked = batch([0.1, f64::NAN, 0.3], [0.0, 0.0]);
    masked.mask = Some(&[1.0, 0.0, 1.0]);
    let (loss, gradient, _) = masked.run(PolicyLossConfig { entropy_coef: -0.1, ..CONFIG });
    assert_near(&[loss], &[0.1 * 3.0 * 0.2]);
    assert_near(&gradient, &[0.15, 0.0, 0.15]);
}
