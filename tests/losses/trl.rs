//! The loss, its gradient and its metrics against TRL's own (goldens/policy_loss.json), AdamW against
//! torch.optim's (goldens/adamw.json), learning-rate schedules against transformers' (goldens/lr_schedules.json). tests/oracle/make_loss_goldens.py makes both.

use serde::Deserialize;
use tch::Tensor;
use temper::rl::loss::{LossMetrics, LossNormalizer, PolicyLossConfig, PolicyLossInputs, policy_loss};
use temper::rl::lr_schedule;
use temper::rl::optimizer::{AdamW, ParamRef};
use temper::rl::section::{Aggregation, KlEstimator, LrSchedule, OptimizerSection, RatioLevel};

#[derive(Deserialize)]
struct LossGoldens {
    lengths: Vec<usize>,
    max_completion_length: u64,
    new: Vec<f32>,
    old: Vec<f32>,
    reference: Vec<f32>,
    rollout: Vec<f32>,
    advantages: Vec<f32>,
    cases: Vec<LossCase>,
}

#[derive(Deserialize)]
struct LossCase {
    loss_type: String,
    beta: f64,
    epsilon: f64,
    epsilon_high: Option<f64>,
    delta: Option<f64>,
    ratio: RatioLevel,
    truncated_importance: Option<f64>,
    entropy_coef: f64,
    loss: f64,
    gradient: Vec<f64>,
    kl: Option<f64>,
    clipped_low: f64,
    clipped_high: f64,
}

impl LossGoldens {
    /// Loss, gradient and metrics of the sequences `range`, normalized for all of them.
    fn run(&self, case: &LossCase, range: std::ops::Range<usize>) -> (f64, Vec<f32>, LossMetrics) {
        let config = PolicyLossConfig {
            clip_low: case.epsilon,
            clip_high: case.epsilon_high.unwrap_or(case.epsilon),
            // TRL's delta bounds the ratio at any sign of A. Where delta > 1 + epsilon_high that only shows
            // where A < 0, and there it is the dual clip: min(r, delta) |A|.
            dual_clip: case.delta,
            aggregation: match case.loss_type.as_str() {
                "grpo" => Aggregation::SequenceMean,
                "dr_grpo" => Aggregation::SumOverLmax,
                // bnpo divides by the tokens of the micro-batch, dapo by those of the batch: here they are one.
                "bnpo" | "dapo" => Aggregation::TokenMean,
                other => panic!("unknown loss type {other}"),
            },
            kl_coef: case.beta,
            kl_estimator: KlEstimator::K3,
            ratio: case.ratio,
            truncated_importance: case.truncated_importance,
            entropy_coef: case.entropy_coef,
        };
        let normalizer = LossNormalizer {
            tokens: self.lengths.iter().sum::<usize>() as u64,
            sequences: self.lengths.len() as u64,
            max_response_tokens: self.max_completion_length,
        };
        let start: usize = self.lengths[..range.start].iter().sum();
        let end: usize = self.lengths[..range.end].iter().sum();
        let new = Tensor::from_slice(&self.new[start..end]).set_requires_grad(true);
        let out = policy_loss(
            &PolicyLossInputs {
                new_logprobs: &new,
                old_logprobs: &Tensor::from_slice(&self.old[start..end]),
                ref_logprobs: Some(&Tensor::from_slice(&self.reference[start..end])),
                rollout_logprobs: Some(&Tensor::from_slice(&self.rollout[start..end])),
                // The oracle's entropy: some function of the log-probs.
                entropy: Some(&new.square()),
                advantages: &Tensor::from_slice(&self.advantages[range.clone()]),
                mask: None,
                sequence_lengths: &self.lengths[range],
            },
            &config,
            normalizer,
        )
        .unwrap();
        out.loss.backward();
        (out.loss.double_value(&[]), Vec::<f32>::try_from(&new.grad()).unwrap(), out.metrics)
    }
}

#[test]
fn loss_and_gradient_agree_with_trl() {
    let goldens: LossGoldens = serde_json::from_str(include_str!("goldens/policy_loss.json")).unwrap();
    assert_eq!(goldens.cases.len(), 44);
    let all = goldens.lengths.len();
    let (mut worst_loss, mut worst_gradient) = (0f64, 0f64);
    for case in &goldens.cases {
        let what = format!(
            "{} {:?} beta {} delta {:?} C {:?} entropy {}",
            case.loss_type, case.ratio, case.beta, case.delta, case.truncated_importance, case.entropy_coef
        );
        let whole = goldens.run(case, 0..all);
        // In two micro-batches the same: only TRL's bnpo would differ, and it is not offered for that reason.
        let (loss_a, grad_a, mut metrics) = goldens.run(case, 0..2);
        let (loss_b, grad_b, metrics_b) = goldens.run(case, 2..all);
        metrics.merge(&metrics_b);
        for (loss, gradient, metrics) in [whole, (loss_a + loss_b, [grad_a, grad_b].concat(), metrics)] {
            worst_loss = worst_loss.max((loss - case.loss).abs());
            assert!((loss - case.loss).abs() < 1e-6, "{what}: loss {loss}, TRL {}", case.loss);
            assert_eq!(gradient.len(), case.gradient.len());
            for (i, (got, want)) in gradient.iter().zip(&case.gradient).enumerate() {
                let difference = (f64::from(*got) - want).abs();
                worst_gradient = worst_gradient.max(difference);
                assert!(difference < 1e-6, "{what}: gradient of token {i} {got}, TRL {want}");
            }
            if let Some(kl) = case.kl {
                assert!((metrics.kl_ref() - kl).abs() < 1e-6, "{what}: kl {}, TRL {kl}", metrics.kl_ref());
            }
            // TRL counts a sequence's ratio once, we at each of its tokens.
            if case.ratio == RatioLevel::Token {
                assert!((metrics.clipped_low_ratio() - case.clipped_low).abs() < 1e-6, "{what}: clipped_low");
                assert!((metrics.clipped_high_ratio() - case.clipped_high).abs() < 1e-6, "{what}: clipped_high");
            }
        }
    }
    println!("largest difference from TRL: loss {worst_loss:.1e}, gradient {worst_gradient:.1e}");
}

#[derive(Deserialize)]
struct ScheduleGoldens {
    runs: Vec<ScheduleRun>,
}

#[derive(Deserialize)]
struct ScheduleRun {
    schedule: LrSchedule,
    warmup: u64,
    total: u64,
    min_lr_ratio: f64,
    /// Entry t - 1: the factor of transformers' optimizer step t.
    factors: Vec<f64>,
}

/// After warm-up the same at the same step; in warm-up one step earlier, since transformers' begins with a factor of 0.
#[test]
fn schedules_agree_with_transformers() {
    let goldens: ScheduleGoldens = serde_json::from_str(include_str!("goldens/lr_schedules.json")).unwrap();
    assert_eq!(goldens.runs.len(), 7);
    for run in &goldens.runs {
        let section = OptimizerSection {
            schedule: run.schedule,
            warmup_steps: run.warmup,
            min_lr_ratio: run.min_lr_ratio,
            ..OptimizerSection::default()
        };
        for t in 1..=run.total {
            let theirs = run.factors[if t <= run.warmup { t } else { t - 1 } as usize];
            let ours = lr_schedule::factor(&section, t, run.total);
            assert!((ours - theirs).abs() < 1e-9, "{:?} at {t} of {}: {ours}, {theirs}", run.schedule, run.total);
            assert!(ours > 0.0, "an update is wasted");
        }
    }
}

#[derive(Deserialize)]
struct AdamWGoldens {
    shapes: Vec<Vec<i64>>,
    start: Vec<Vec<f32>>,
    gradients: Vec<Vec<Vec<f32>>>,
    recorded_steps: Vec<u64>,
    runs: Vec<AdamWRun>,
}

#[derive(Deserialize)]
struct AdamWRun {
    weight_decay: f64,
    grad_clip: Option<f64>,
    lr: f64,
    eps: f64,
    steps: Vec<AdamWStep>,
    exp_avg: Vec<Vec<f32>>,
    exp_avg_sq: Vec<Vec<f32>>,
}

#[derive(Deserialize)]
struct AdamWStep {
    norm: f64,
    params: Vec<Vec<f32>>,
}

#[test]
fn adamw_agrees_with_torch() {
    let goldens: AdamWGoldens = serde_json::from_str(include_str!("goldens/adamw.json")).unwrap();
    let tensors = |values: &[Vec<f32>]| -> Vec<Tensor> {
        values.iter().zip(&goldens.shapes).map(|(v, s)| Tensor::from_slice(v).view(s.as_slice())).collect()
    };
    let mut worst = 0f64;
    for run in &goldens.runs {
        let mut optimizer = AdamW::new(OptimizerSection {
            lr: run.lr,
            eps: run.eps,
            weight_decay: run.weight_decay,
            grad_clip: run.grad_clip,
            ..OptimizerSection::default()
        })
        .unwrap();
        let masters = tensors(&goldens.start);
        let mut near = |got: &Tensor, want: &[f32], tolerance: f64, what: &str| {
            let got = Vec::<f32>::try_from(got.view([-1])).unwrap();
            // Relative to the tensor's size: an element that a decay brings near 0 keeps its neighbours' rounding.
            let scale = want.iter().fold(0f32, |m, v| m.max(v.abs()));
            for (g, w) in got.iter().zip(want) {
                let difference = f64::from((g - w).abs() / scale);
                if tolerance == 1e-7 {
                    worst = worst.max(difference);
                }
                assert!(difference <= tolerance, "{what}: {g}, torch {w}");
            }
        };
        for (i, gradient) in goldens.gradients.iter().enumerate() {
            let grads = tensors(gradient);
            let mut params = [
                ParamRef { name: "weight", master: &masters[0], grad: &grads[0], is_norm_or_bias: false },
                ParamRef { name: "bias", master: &masters[1], grad: &grads[1], is_norm_or_bias: true },
            ];
            let outcome = optimizer.step(&mut params, run.lr).unwrap();
            if let Some(k) = goldens.recorded_steps.iter().position(|s| *s == i as u64 + 1) {
                let recorded = &run.steps[k];
                assert!((outcome.grad_norm / recorded.norm - 1.0).abs() < 3e-7);
                for (master, want) in masters.iter().zip(&recorded.params) {
                    near(master, want, 1e-7, &format!("update {}", i + 1));
                }
            }
        }
        // BTreeMap order: bias before weight.
        let state = optimizer.state_tensors();
        let names: Vec<_> = state.iter().map(|(n, _)| n.as_str()).collect();
        assert_eq!(names, ["exp_avg.bias", "exp_avg.weight", "exp_avg_sq.bias", "exp_avg_sq.weight"]);
        // Our norm is summed in f64, torch's in f32: the clipped gradients may differ in their last bit.
        near(&state[0].1, &run.exp_avg[1], 3e-7, names[0]);
        near(&state[1].1, &run.exp_avg[0], 3e-7, names[1]);
        near(&state[2].1, &run.exp_avg_sq[1], 3e-7, names[2]);
        near(&state[3].1, &run.exp_avg_sq[0], 3e-7, names[3]);
    }
    println!("largest difference of a weight from torch.optim.AdamW: {worst:.1e} relative");
}
