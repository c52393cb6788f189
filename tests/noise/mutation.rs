//! A run whose injection differs from its plan says so: multipliers dropped, zeroed, a module skipped, matmul noise
//! off or at another scale. Unmutated it finds nothing.

use std::path::Path;

use serde_json::Value;
use temper::inject::plan::InjectionPlan;
use temper::inject::section::{
    ActivationScale, FakeQuantSection, InjectPhase, LayerSigmaConfig, LayerType, NoiseInjectionSection,
    NoisyOpsSection, PhaseSet, ScheduleKind,
};
use temper::numerics::format::Format;
use temper::rl::recipe::Recipe;
use temper::rl::section::KlEstimator;
use temper::rl::trainer::Outcome;

use crate::support::{recipe, train_small};

/// Trains `recipe` (8 problems, so 2 steps an epoch) into `out`, injecting `applied(plan)`.
pub fn train(
    recipe: &Recipe,
    out: &Path,
    applied: impl FnOnce(&InjectionPlan) -> InjectionPlan,
) -> temper::Result<Outcome> {
    train_small(recipe, out, None, applied)
}

/// The training rows of a run's metrics.jsonl.
pub fn training_rows(run_dir: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap();
    let rows = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    rows.filter(|row| row["kind"] == "train").collect()
}

/// 4 steps under constant sigma; a KL term, so that gradients flow although a random model earns no reward.
fn small() -> Recipe {
    recipe(|r| {
        r.algorithm.kl_coef = 0.1;
        r.algorithm.kl_estimator = KlEstimator::K1;
        r.noisy_ops = NoisyOpsSection { enabled: true, ..NoisyOpsSection::default() };
        r.noise_injection = NoiseInjectionSection {
            enabled: true,
            schedule: ScheduleKind::Constant,
            sigma_start: 0.01,
            layer_sigma_config: Some(LayerSigmaConfig {
                layer_multipliers: [(1, 1.5), (2, 1.2)].into(),
                ..LayerSigmaConfig::default()
            }),
            ..NoiseInjectionSection::default()
        };
    })
}

/// The same with mxfp4 weights, and AQN on them.
fn small_quantized() -> Recipe {
    let mut recipe = small();
    recipe.fake_quant = FakeQuantSection { enabled: true, ..FakeQuantSection::default() };
    recipe.noise_injection.layer_types = vec![LayerType::Linear];
    recipe
}

/// nvfp4 weights and activations with calibrated scales, in every phase.
fn small_w4a4() -> Recipe {
    let mut recipe = small();
    let nvfp4 = Some(Format::NVFP4);
    recipe.fake_quant = FakeQuantSection {
        enabled: true,
        weights: nvfp4,
        activations: nvfp4,
        activation_scale: Some(ActivationScale::Static),
        phases: PhaseSet::ALL,
        ..FakeQuantSection::default()
    };
    recipe
}

fn disagreements(recipe: &Recipe, change: impl Fn(&mut InjectionPlan)) -> (u64, Vec<u64>) {
    let dir = tempfile::tempdir().unwrap();
    let outcome = train(recipe, dir.path(), |plan| {
        let mut plan = plan.clone();
        change(&mut plan);
        plan
    })
    .unwrap();
    let rows = training_rows(&outcome.run_dir);
    let counts = rows.iter().map(|row| row["injection/disagreements"].as_u64().unwrap());
    (outcome.disagreeing_steps, counts.collect())
}

fn assert_noticed(recipe: &Recipe, change: impl Fn(&mut InjectionPlan)) {
    let (steps, counts) = disagreements(recipe, change);
    assert_eq!(steps, 4);
    assert!(counts.len() == 4 && counts.iter().all(|n| *n > 0), "{counts:?}");
}

#[test]
fn what_was_planned_agrees() {
    assert_eq!(disagreements(&small(), |_| {}), (0, vec![0; 4]));
    assert_eq!(disagreements(&small_quantized(), |_| {}), (0, vec![0; 4]));
    assert_eq!(disagreements(&small_w4a4(), |_| {}), (0, vec![0; 4]));
}

/// Validation is measured by nobody, so noise or quantization for it alone is not missed in training.
#[test]
fn injection_for_validation_alone_raises_no_alarm() {
    let only = PhaseSet::of(&[InjectPhase::Validation]);
    let mut recipe = small();
    recipe.noisy_ops.phases = only;
    assert_eq!(disagreements(&recipe, |_| {}), (0, vec![0; 4]));
    let mut recipe = small_quantized();
    recipe.fake_quant.phases = only;
    assert_eq!(disagreements(&recipe, |_| {}), (0, vec![0; 4]));
    let mut recipe = small_w4a4();
    recipe.fake_quant.phases = only;
    assert_eq!(disagreements(&recipe, |_| {}), (0, vec![0; 4]));
}

#[test]
fn dropped_multipliers_are_noticed() {
    assert_noticed(&small(), |plan| {
        plan.modules.iter_mut().filter(|m| m.aqn_multiplier > 0.0).for_each(|m| m.aqn_multiplier = 1.0)
    });
}

#[test]
fn multipliers_of_zero_are_noticed() {
    assert_noticed(&small(), |plan| plan.modules.iter_mut().for_each(|m| m.aqn_multiplier = 0.0));
}

#[test]
fn one_skipped_norm_is_noticed() {
    assert_noticed(&small(), |plan| {
        plan.modules.iter_mut().filter(|m| m.name == "model.norm").for_each(|m| m.aqn_multiplier = 0.0)
    });
}

#[test]
fn a_matmul_scale_of_zero_is_noticed() {
    assert_noticed(&small(), |plan| plan.modules.iter_mut().for_each(|m| m.matmul_error = 0.0));
}

#[test]
fn a_matmul_scale_of_four_percent_is_noticed() {
    assert_noticed(&small(), |plan| {
        plan.modules.iter_mut().filter(|m| m.matmul_error > 0.0).for_each(|m| m.matmul_error = 0.04)
    });
}

#[test]
fn one_skipped_linear_is_noticed() {
    let name = "model.layers.2.mlp.up_proj";
    assert_noticed(&small(), |plan| {
        plan.modules.iter_mut().filter(|m| m.name == name).for_each(|m| m.matmul_error = 0.0)
    });
}

#[test]
fn noise_where_none_is_planned_is_noticed() {
    assert_noticed(&small(), |plan| {
        plan.modules.iter_mut().filter(|m| m.name == "lm_head").for_each(|m| m.matmul_error = 0.05)
    });
}

#[test]
fn missing_quantization_is_noticed() {
    let recipe = small_quantized();
    let name = "model.layers.3.self_attn.o_proj";
    assert_noticed(&recipe, |plan| plan.modules.iter_mut().for_each(|m| m.weight_format = None));
    assert_noticed(&recipe, |plan| {
        plan.modules.iter_mut().filter(|m| m.name == name).for_each(|m| m.weight_format = None)
    });
}

#[test]
fn dropped_activations_are_noticed() {
    let recipe = small_w4a4();
    let name = "model.layers.3.mlp.down_proj";
    assert_noticed(&recipe, |plan| plan.modules.iter_mut().for_each(|m| m.activation_format = None));
    assert_noticed(&recipe, |plan| {
        plan.modules.iter_mut().filter(|m| m.name == name).for_each(|m| m.activation_format = None)
    });
    assert_noticed(&recipe, |plan| plan.quant_phases = PhaseSet::ALL.without(InjectPhase::OldLogprobs));
}

#[test]
fn another_format_or_scale_is_noticed() {
    let recipe = small_w4a4();
    let single = Some(Format::NVFP4_SINGLE_LEVEL);
    assert_noticed(&recipe, |plan| plan.modules[2].weight_format = single);
    assert_noticed(&recipe, |plan| plan.modules[2].activation_format = single);
    assert_noticed(&recipe, |plan| plan.activation_scale = ActivationScale::Token);
}

#[test]
fn noise_of_linears_at_another_sigma_is_noticed() {
    let recipe = small_quantized();
    assert_noticed(&recipe, |plan| plan.modules.iter_mut().for_each(|m| m.aqn_multiplier *= 1.1));
}
