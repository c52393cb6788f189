//! Loss and gradient by hand. One token per sequence, old = 0 and new = ln r, so that the ratio is r and
//! d(-rA)/d(new) = -rA.

use tch::{Kind, Tensor};
use temper::rl::loss::{LossMetrics, LossNormalizer, PolicyLossConfig, PolicyLossInputs, policy_loss};
use temper::rl::section::{Aggregation, KlEstimator, RatioLevel};

pub const CONFIG: PolicyLossConfig = PolicyLossConfig {
    clip_low: 0.2,
    clip_high: 0.2,
    dual_clip: Some(3.0),
    aggregation: Aggregation::TokenMean,
    kl_coef: 0.0,
    kl_estimator: KlEstimator::K3,
    ratio: RatioLevel::Token,
    truncated_importance: None,
    entropy_coef: 0.0,
};

struct Batch {
    new: Vec<f32>,
    old: Vec<f32>,
    reference: Option<Vec<f32>>,
    advantages: Vec<f32>,
    mask: Option<Vec<f32>>,
    lengths: Vec<usize>,
}

impl Batch {
    fn tokens(new: &[f32], old: &[f32], advantages: &[f32]) -> Batch {
        let lengths = vec![1; new.len()];
        Batch { new: new.into(), old: old.into(), reference: None, advantages: advantages.into(), mask: None, lengths }
    }

    /// Loss, gradient with respect to the new log-probs, metrics.
    fn run(&self, config: &PolicyLossConfig, normalizer: LossNormalizer) -> (f64, Vec<f32>, LossMetrics) {
        let new = Tensor::from_slice(&self.new).set_requires_grad(true);
        let out = policy_loss(
            &PolicyLossInputs {
                new_logprobs: &new,
                old_logprobs: &Tensor::from_slice(&self.old),
                ref_logprobs: self.reference.as_ref().map(|r| Tensor::from_slice(r)).as_ref(),
                rollout_logprobs: None,
                entropy: None,
                advantages: &Tensor::from_slice(&self.advantages),
                mask: self.mask.as_ref().map(|m| Tensor::from_slice(m)).as_ref(),
                sequence_lengths: &self.lengths,
            },
            config,
            normalizer,
        )
        .unwrap();
        out.loss.backward();
        let loss = out.loss.double_value(&[]);
        (loss, Vec::<f32>::try_from(&new.grad()).unwrap(), out.metrics)
    }
}

fn normalizer(tokens: u64, sequences: u64) -> LossNormalizer {
    LossNormalizer { tokens, sequences, max_response_tokens: 10 }
}

fn one() -> LossNormalizer {
    normalizer(1, 1)
}

fn assert_near(got: f64, want: f64, what: &str) {
    assert!((got - want).abs() <= 1e-6 * want.abs().max(1.0), "{what}: {got}, expected {want}");
}

/// Clip [.8, 1.2], c = 3. The gradient is -rA where the first argument of the max stands, 0 where it is cut.
///
/// | r   | A  | -rA  | -clip(r)A | max  | c A bound | loss | d/dnew |
/// |-----|----|------|-----------|------|-----------|------|--------|
/// | 1.0 |  1 | -1   | -1        | -1   |           | -1   | -1     |
/// | 1.1 |  2 | -2.2 | -2.2      | -2.2 |           | -2.2 | -2.2   |
/// | 1.5 |  1 | -1.5 | -1.2      | -1.2 |           | -1.2 | 0      | high
/// | 0.5 |  1 | -0.5 | -0.8      | -0.5 |           | -0.5 | -0.5   |
/// | 0.5 | -1 |  0.5 |  0.8      |  0.8 | 3         |  0.8 | 0      | low
/// | 1.5 | -2 |  3   |  2.4      |  3   | 6         |  3   | 3      |
/// | 2.9 | -1 |  2.9 |  1.2      |  2.9 | 3         |  2.9 | 2.9    |
/// | 4.0 | -1 |  4   |  1.2      |  4   | 3         |  3   | 0      | dual
/// | 4.0 | -2 |  8   |  2.4      |  8   | 6         |  6   | 0      | dual
/// | 4.0 |  1 | -4   | -1.2      | -1.2 |           | -1.2 | 0      | high
/// | 4.0 |  0 |  0   |  0        |  0   |           |  0   | 0      |
#[test]
fn clip_and_dual_clip() {
    let table: [(f32, f32, f64, f64); 11] = [
        (1.0, 1.0, -1.0, -1.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 1.0, -1.2, 0.0),
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),
        (1.5, -2.0, 3.0, 3.0),
        (2.9, -1.0, 2.9, 2.9),
        (4.0, -1.0, 3.0, 0.0),
        (4.0, -2.0, 6.0, 0.0),
        (4.0, 1.0, -1.2, 0.0),
        (4.0, 0.0, 0.0, 0.0),
    ];
    let mut merged = LossMetrics::default();
    for (r, a, loss, gradient) in table {
        // r = 1 sits where both arguments are equal; torch splits the gradient, both halves reach r: still -rA.
        let (got, grad, metrics) = Batch::tokens(&[r.ln()], &[0.0], &[a]).run(&CONFIG, one());
        assert_near(got, loss, &format!("loss at r {r} A {a}"));
        assert_near(f64::from(grad[0]), gradient, &format!("gradient at r {r} A {a}"));
        merged.merge(&metrics);
    }
    assert_eq!(merged.tokens, 11.0);
    assert_eq!((merged.clipped_low_tokens, merged.clipped_high_tokens, merged.dual_clipped_tokens), (1.0, 2.0, 2.0));
    assert_near(merged.ratio_max, 4.0, "ratio_max");
    assert_near(merged.clipped_high_ratio(), 2.0 / 11.0, "clipped_high_ratio");
}

/// Without the dual clip r = 4, A = -1 costs 4 and pushes with 4; an asymmetric clip (.2, .28) cuts at 1.28.
#[test]
fn no_dual_clip_and_asymmetric_clip() {
    let config = PolicyLossConfig { dual_clip: None, clip_high: 0.28, ..CONFIG };
    let (loss, grad, metrics) =
        Batch::tokens(&[4f32.ln(), 1.25f32.ln(), 1.3f32.ln()], &[0.0; 3], &[-1.0, 1.0, 1.0]).run(&config, one3());
    assert_near(loss, (4.0 - 1.25 - 1.28) / 3.0, "loss");
    assert_near(f64::from(grad[0]), 4.0 / 3.0, "gradient 0");
    assert_near(f64::from(grad[1]), -1.25 / 3.0, "gradient 1");
    assert_eq!(grad[2], 0.0);
    assert_eq!(metrics.dual_clipped_tokens, 0.0);
}

fn one3() -> LossNormalizer {
    normalizer(3, 3)
}

/// new - old = 30 is taken as 20: r = e^20 = 4.8516520e8, and the clamp stops the gradient. A = 1: clipped at
/// 1.2. A = -1 without dual clip: e^20 itself. -30: r = e^-20 = 2.06e-9, A = 1: -2.06e-9, no gradient.
#[test]
fn the_log_ratio_is_clamped() {
    let config = PolicyLossConfig { dual_clip: None, ..CONFIG };
    for (new, a, loss) in [(30.0, 1.0, -1.2), (30.0, -1.0, 20f64.exp()), (-30.0, 1.0, -(-20f64).exp())] {
        let (got, grad, _) = Batch::tokens(&[new], &[0.0], &[a]).run(&config, one());
        assert_near(got, loss, "loss");
        assert_eq!(grad[0], 0.0);
    }
}

/// The KL part alone (A = 0, coefficient 2, new = 0 so that x = ref). Values and d/dnew = -d/dx, times 2:
///
/// | x     | k1 = -x | k2 = x^2/2 | k3 = e^x - 1 - x           | dk1/dnew | dk2/dnew = -x | dk3/dnew = 1 - e^x |
/// |-------|---------|------------|----------------------------|----------|---------------|--------------------|
/// | ln 2  | -ln 2   | .240226507 | 1 - ln 2 = .306852819      | 1        | -ln 2         | -1                 |
/// | -ln 4 | ln 4    | .960906028 | -.75 + ln 4 = .636294361   | 1        | ln 4          | .75                |
/// | 3     | -3      | 4.5        | 16.0855 -> 10 (limit)      | 1        | -3            | 0                  |
/// | -12   | 12      | 72         | 11.000006 -> 10 (limit)    | 1        | 12            | 0                  |
/// | 25    | -25     | 312.5      | clamped, then 10           | 1        | -25           | 0                  |
#[test]
fn kl_estimators() {
    let (ln2, ln4) = (2f64.ln(), 4f64.ln());
    let table = [
        (ln2, [-ln2, ln2 * ln2 / 2.0, 1.0 - ln2], [1.0, -ln2, -1.0]),
        (-ln4, [ln4, ln4 * ln4 / 2.0, ln4 - 0.75], [1.0, ln4, 0.75]),
        (3.0, [-3.0, 4.5, 10.0], [1.0, -3.0, 0.0]),
        (-12.0, [12.0, 72.0, 10.0], [1.0, 12.0, 0.0]),
        (25.0, [-25.0, 312.5, 10.0], [1.0, -25.0, 0.0]),
    ];
    for (x, values, gradients) in table {
        for (i, kl_estimator) in [KlEstimator::K1, KlEstimator::K2, KlEstimator::K3].into_iter().enumerate() {
            let config = PolicyLossConfig { kl_coef: 2.0, kl_estimator, ..CONFIG };
            let mut batch = Batch::tokens(&[0.0], &[0.0], &[0.0]);
            batch.reference = Some(vec![x as f32]);
            let (loss, grad, metrics) = batch.run(&config, one());
            assert_near(loss, 2.0 * values[i], &format!("{kl_estimator:?} at {x}"));
            assert_near(f64::from(grad[0]), 2.0 * gradients[i], &format!("gradient of {kl_estimator:?} at {x}"));
            assert_near(metrics.kl_ref(), values[i], "kl/ref");
            assert_near(metrics.kl_loss, 2.0 * values[i], "loss/kl");
        }
    }
}

/// k3 near 0: x = 1e-4 gives x^2/2 = 5.00017e-9; e^x - 1 computed naively in f32 would be off by a tenth.
#[test]
fn small_k3_keeps_its_digits() {
    let mut batch = Batch::tokens(&[0.0], &[0.0], &[0.0]);
    batch.reference = Some(vec![1e-4]);
    let (_, _, metrics) = batch.run(&CONFIG, one());
    assert!((metrics.kl_ref() - 5.00017e-9).abs() < 5e-12, "{}", metrics.kl_ref());
}

/// Sequences of 1 and 3 tokens, r = 1, A = 3 and -1: token losses -3 | 1 1 1, gradients the same.
/// token_mean: 0 / 4 = 0. sequence_mean: (-3 + 1) / 2 = -1. sum_over_lmax: 0 / (2 * 10); with the last token
/// masked: token_mean (-3 + 2)/3, sequence_mean (-3 + 1)/2, sum (-3 + 2)/20.
#[test]
fn aggregations() {
    let batch = |mask: Option<Vec<f32>>| Batch {
        new: vec![0.0; 4],
        old: vec![0.0; 4],
        reference: None,
        advantages: vec![3.0, -1.0],
        mask,
        lengths: vec![1, 3],
    };
    let token_weights = |aggregation, mask: Option<Vec<f32>>, tokens| {
        let config = PolicyLossConfig { aggregation, ..CONFIG };
        let (loss, grad, _) = batch(mask).run(&config, normalizer(tokens, 2));
        (loss, grad)
    };
    use Aggregation::*;
    for (aggregation, full, masked) in
        [(TokenMean, 0.0, -1.0 / 3.0), (SequenceMean, -1.0, -1.0), (SumOverLmax, 0.0, -1.0 / 20.0)]
    {
        let (loss, _) = token_weights(aggregation, None, 4);
        assert_near(loss, full, &format!("{aggregation:?}"));
        let (loss, grad) = token_weights(aggregation, Some(vec![1.0, 1.0, 1.0, 0.0]), 3);
        assert_near(loss, masked, &format!("{aggregation:?}, masked"));
        assert_eq!(grad[3], 0.0);
    }
}

/// A token that does not count may hold anything.
#[test]
fn masked_nan_has_no_influence() {
    let batch = |poison: f32| Batch {
        new: vec![0.1, poison],
        old: vec![0.0, poison],
        reference: Some(vec![0.2, poison]),
        advantages: vec![1.0, 1.0],
        mask: Some(vec![1.0, 0.0]),
        lengths: vec![2],
    };
    let config = PolicyLossConfig { kl_coef: 0.5, ..CONFIG };
    let (loss, grad, metrics) = batch(f32::NAN).run(&config, one());
    assert!(loss.is_finite() && metrics.is_finite());
    assert_eq!((loss, grad, metrics), batch(0.0).run(&config, one()));
}

#[test]
fn nan_is_seen_by_the_metrics() {
    let (_, _, metrics) = Batch::tokens(&[f32::NAN], &[0.0], &[1.0]).run(&CONFIG, one());
    assert!(!metrics.is_finite() && metrics.ratio_max.is_nan());
    let mut merged = LossMetrics::default();
    merged.merge(&metrics);
    merged.merge(&LossMetrics { ratio_max: 2.0, ..LossMetrics::default() });
    assert!(!merged.is_finite() && merged.ratio_max.is_nan());
}

/// The same numbers whether a batch runs at once or as micro-batches of its sequences.
#[test]
fn micro_batches_add_up() {
    let new: Vec<f32> = (0..12).map(|i| -0.4 - 0.07 * (i * i % 7) as f32).collect();
    let old: Vec<f32> = (0..12).map(|i| -0.5 - 0.05 * (i * 5 % 11) as f32).collect();
    let reference: Vec<f32> = (0..12).map(|i| -0.3 - 0.06 * (i * 3 % 8) as f32).collect();
    let (lengths, advantages) = ([3usize, 1, 5, 3], [1.5f32, -0.5, -2.0, 0.7]);
    for aggregation in [Aggregation::TokenMean, Aggregation::SequenceMean, Aggregation::SumOverLmax] {
        let config = PolicyLossConfig { aggregation, kl_coef: 0.1, ..CONFIG };
        let part = |sequences: std::ops::Range<usize>| {
            let start: usize = lengths[..sequences.start].iter().sum();
            let end: usize = lengths[..sequences.end].iter().sum();
            Batch {
                new: new[start..end].into(),
                old: old[start..end].into(),
                reference: Some(reference[start..end].into()),
                advantages: advantages[sequences.clone()].into(),
                mask: None,
                lengths: lengths[sequences].into(),
            }
            .run(&config, normalizer(12, 4))
        };
        let (loss, grad, metrics) = part(0..4);
        let (loss_a, grad_a, mut merged) = part(0..1);
        let (loss_b, grad_b, metrics_b) = part(1..4);
        merged.merge(&metrics_b);
        assert_near(loss_a + loss_b, loss, "loss");
        assert_eq!([grad_a, grad_b].concat(), grad);
        assert_near(merged.policy_loss, metrics.policy_loss, "loss/policy");
        assert_near(merged.kl_ref(), metrics.kl_ref(), "kl/ref");
        assert_near(merged.policy_loss + merged.kl_loss, loss, "the metrics add up to the loss");
        assert_eq!(merged.ratio_max, metrics.ratio_max);
    }
}

#[test]
fn wrong_inputs_are_refused() {
    let new = Tensor::from_slice(&[0f32; 3]);
    let advantages = Tensor::from_slice(&[1f32, 2.0]);
    let inputs = PolicyLossInputs {
        new_logprobs: &new,
        old_logprobs: &new,
        ref_logprobs: None,
        rollout_logprobs: None,
        entropy: None,
        advantages: &advantages,
        mask: None,
        sequence_lengths: &[1, 2],
    };
    let short = Tensor::zeros([2], (Kind::Float, tch::Device::Cpu));
    let with_kl = PolicyLossConfig { kl_coef: 0.1, ..CONFIG };
    let with_importance = PolicyLossConfig { truncated_importance: Some(2.0), ..CONFIG };
    let with_entropy = PolicyLossConfig { entropy_coef: 0.1, ..CONFIG };
    for (inputs, config, normalizer, says) in [
        (PolicyLossInputs { old_logprobs: &short, ..inputs }, CONFIG, normalizer(3, 2), "old_logprobs"),
        (PolicyLossInputs { sequence_lengths: &[1, 1], ..inputs }, CONFIG, normalizer(3, 2), "new_logprobs"),
        (PolicyLossInputs { sequence_lengths: &[1, 1, 1], ..inputs }, CONFIG, normalizer(3, 3), "advantages"),
        (PolicyLossInputs { sequence_lengths: &[], ..inputs }, CONFIG, normalizer(3, 2), "no response token"),
        (inputs, with_kl, normalizer(3, 2), "reference"),
        (inputs, with_importance, normalizer(3, 2), "rollout log-probs"),
        (inputs, with_entropy, normalizer(3, 2), "no entropy"),
        (PolicyLossInputs { entropy: Some(&short), ..inputs }, CONFIG, normalizer(3, 2), "entropy: found shape"),
        (inputs, CONFIG, normalizer(2, 2), "whole optimizer batch"),
        (inputs, CONFIG, normalizer(3, 1), "whole optimizer batch"),
        (inputs, CONFIG, normalizer(0, 2), "divisor"),
    ] {
        let error = policy_loss(&inputs, &config, normalizer).unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
    }
}
