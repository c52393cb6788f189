//! Each experiment of the registry: recipe, sigma of every step, what each module gets.

use super::load;
use temper::config::Config;
use temper::inject::plan::{InjectionPlan, ModuleKind, ModulePlan};
use temper::inject::schedule::SigmaSchedule;
use temper::inject::section::{InjectPhase, PhaseSet};
use temper::model::config::Qwen2Config;
use temper::model::lora::{all_modules, elements};
use temper::model::section::Projection;
use temper::rl::section::{Advantage, Aggregation, RatioLevel};

fn plan(config: &Config) -> InjectionPlan {
    let shapes = Qwen2Config::preset(config.model.preset.as_deref().unwrap()).unwrap();
    config.injection_plan(&all_modules(&shapes, config.model.lora.as_ref())).unwrap()
}

fn schedule(config: &Config) -> SigmaSchedule {
    let rows = config.data.train_limit.unwrap_or(7473);
    config.sigma_schedule(config.steps_per_epoch(rows).unwrap()).unwrap()
}

struct Row {
    file: &'static str,
    steps: u64,
    /// Modules with AQN, their kind.
    aqn: usize,
    kind: ModuleKind,
    /// (sigma_start, sigma_end, clean steps) of the schedule as seen in its steps.
    sigma: (f64, f64, u64),
    error: f64,
    weights: Option<&'static str>,
}

#[test]
fn every_row_of_the_registry_resolves_to_what_it_says() {
    use ModuleKind::{Linear, Rmsnorm};
    let row = |file, steps, aqn, kind, sigma, error, weights| Row { file, steps, aqn, kind, sigma, error, weights };
    let off = (0.0, 0.0, 0);
    let e5c = (1e-2, 1e-5, 20);
    let rows = [
        row("baseline", 58, 0, Rmsnorm, off, 0.0, None),
        row("baseline_2ep", 116, 0, Rmsnorm, off, 0.0, None),
        row("mxfp4_only", 58, 0, Rmsnorm, off, 0.0, Some("mxfp4")),
        row("mxfp4_aqn", 58, 57, Rmsnorm, (0.05, 5e-4, 6), 0.0, Some("mxfp4")),
        row("1a", 174, 196, Linear, (0.05, 5e-4, 18), 0.0, Some("mxfp4")),
        row("1c", 174, 196, Linear, (0.005, 5e-5, 18), 0.0, Some("mxfp4")),
        row("1d", 174, 196, Linear, (0.001, 1e-5, 18), 0.0, Some("mxfp4")),
        row("1e", 174, 57, Rmsnorm, (0.05, 5e-4, 18), 0.0, Some("mxfp4")),
        row("nvfp4", 174, 57, Rmsnorm, (0.05, 5e-4, 18), 0.0, Some("nvfp4")),
        row("w4a4_mxfp4", 58, 0, Rmsnorm, off, 0.0, Some("mxfp4")),
        row("w4a4_nvfp4", 58, 0, Rmsnorm, off, 0.0, Some("nvfp4")),
        row("e5", 116, 0, Rmsnorm, off, 0.05, None),
        row("e5_forward", 116, 0, Rmsnorm, off, 0.05, None),
        row("e5_backward", 116, 0, Rmsnorm, off, 0.05, None),
        row("e5a", 116, 57, Rmsnorm, (0.05, 5e-4, 12), 0.05, None),
        row("e5b", 116, 57, Rmsnorm, (0.05, 5e-4, 20), 0.05, None),
        row("e5c", 116, 57, Rmsnorm, e5c, 0.05, None),
        row("e5d", 116, 57, Rmsnorm, (1e-2, 1e-4, 20), 0.05, None),
        row("e9a", 116, 8, Rmsnorm, e5c, 0.05, None),
        row("e9b", 116, 57, Rmsnorm, e5c, 0.05, None),
        row("e9c", 116, 8, Rmsnorm, e5c, 0.05, None),
        row("e5c_mini", 24, 57, Rmsnorm, (1e-2, 1e-5, 4), 0.05, None),
        row("e9a_mini", 24, 8, Rmsnorm, (1e-2, 1e-5, 4), 0.05, None),
        row("e9b_mini", 24, 57, Rmsnorm, (1e-2, 1e-5, 4), 0.05, None),
    ];
    for row in rows {
        let config = load(&format!("{}.yaml", row.file));
        assert_eq!(config.name, row.file);
        let (schedule, plan) = (schedule(&config), plan(&config));
        assert_eq!(schedule.total_steps(), row.steps, "{}", row.file);
        assert!(schedule.unused_keys().is_empty() && plan.notices.is_empty(), "{}", row.file);
        let noised: Vec<_> = plan.modules.iter().filter(|m| m.aqn_multiplier > 0.0).collect();
        assert_eq!(noised.len(), row.aqn, "{}", row.file);
        assert!(noised.iter().all(|m| m.kind == row.kind), "{}", row.file);
        let (start, end, clean) = row.sigma;
        if row.aqn > 0 {
            let sigma: Vec<f64> = (1..=row.steps).map(|step| schedule.sigma(step)).collect();
            assert_eq!(sigma.iter().filter(|s| **s == 0.0).count() as u64, clean, "{}", row.file);
            let largest = sigma.iter().copied().fold(0.0, f64::max);
            assert!((largest / start - 1.0).abs() < 1e-12, "{}: {largest}", row.file);
            assert!((sigma[row.steps as usize - 1] / end - 1.0).abs() < 1e-12, "{}", row.file);
        }
        for module in &plan.modules {
            let linear = module.kind == ModuleKind::Linear && module.name != "lm_head";
            assert_eq!(module.matmul_error, if linear { row.error } else { 0.0 }, "{} {}", row.file, module.name);
            let format = module.weight_format.map(|f| f.to_string());
            assert_eq!(format.as_deref(), row.weights.filter(|_| linear), "{} {}", row.file, module.name);
            let w4a4 = row.file.starts_with("w4a4");
            assert_eq!(module.activation_format, module.weight_format.filter(|_| w4a4), "{} {}", row.file, module.name);
        }
        assert_eq!(config.optimizer.lr, 5e-7);
        assert_eq!(
            (config.rollout.group_size, config.data.prompts_per_step / config.trainer.minibatch_prompts),
            (5, 4)
        );
    }
}

/// The recipes of papers differ from the baseline in their algorithm alone; DAPO in its groups and reward too.
#[test]
fn the_papers_recipes_are_the_baseline_with_another_algorithm() {
    let baseline = load("baseline.yaml");
    for (name, advantage, ratio, clip, aggregation) in [
        ("dapo", Advantage::Grpo, RatioLevel::Token, (0.2, 0.28), Aggregation::TokenMean),
        ("dr_grpo", Advantage::DrGrpo, RatioLevel::Token, (0.2, 0.2), Aggregation::SumOverLmax),
        ("gspo", Advantage::Grpo, RatioLevel::Sequence, (3e-4, 4e-4), Aggregation::SequenceMean),
    ] {
        let config = load(&format!("{name}.yaml"));
        let algorithm = &config.algorithm;
        assert_eq!(
            (algorithm.advantage, algorithm.ratio, algorithm.aggregation),
            (advantage, ratio, aggregation),
            "{name}"
        );
        assert_eq!((algorithm.clip_low, algorithm.clip_high), clip, "{name}");
        assert_eq!((algorithm.dual_clip, algorithm.kl_coef), (None, 0.0), "{name}");
        assert_eq!(config.name, name);
        let mut same = config.clone();
        (same.algorithm, same.name) = (baseline.algorithm.clone(), baseline.name.clone());
        if name == "dapo" {
            assert_eq!((config.rollout.group_size, algorithm.dynamic_sampling.clone().unwrap().max_rounds), (8, 5));
            assert_eq!(config.reward.overlong.clone().unwrap().buffer_tokens, 256);
            (same.rollout, same.reward) = (baseline.rollout.clone(), baseline.reward.clone());
        }
        assert_eq!(same, baseline, "{name}");
        assert_eq!(schedule(&config).total_steps(), 58);
    }
}

/// r 32, alpha 16, lr 1e-5, warm-up 10, wd .1, and the plan of what they extend with adapters that nothing touches.
#[test]
fn lora_rows_are_their_base_with_adapters() {
    for (name, base, weights, steps) in [
        ("mxfp4_lora", "mxfp4_only", Some("mxfp4"), 58),
        ("nvfp4_lora", "mxfp4_only", Some("nvfp4"), 58),
        ("dapo_lora", "dapo", None, 58),
    ] {
        let (config, base) = (load(&format!("{name}.yaml")), load(&format!("{base}.yaml")));
        let lora = config.model.lora.clone().unwrap();
        assert_eq!((lora.rank, lora.alpha, &lora.targets[..]), (32, 16.0, &Projection::ALL[..]), "{name}");
        let optimizer = &config.optimizer;
        assert_eq!((optimizer.lr, optimizer.warmup_steps, optimizer.weight_decay), (1e-5, 10, 0.1), "{name}");
        assert_eq!(schedule(&config).total_steps(), steps, "{name}");
        let (plan, of_base) = (plan(&config), plan(&base));
        assert!(plan.frozen_base && plan.notices.is_empty(), "{name}");
        let (own, adapters) = plan.modules.split_at(of_base.modules.len());
        assert_eq!(adapters.len(), 2 * 7 * 28, "{name}");
        assert_eq!(plan.quant_phases, if weights.is_some() { PhaseSet::ALL } else { PhaseSet::EMPTY }, "{name}");
        let untouched = |m: &ModulePlan| (m.aqn_multiplier, m.matmul_error, m.weight_format, m.activation_format);
        assert!(adapters.iter().all(|m| untouched(m) == (0.0, 0.0, None, None)), "{name}");
        for module in own {
            let format = module.weight_format.map(|f| f.to_string());
            let linear = module.kind == ModuleKind::Linear && module.name != "lm_head";
            assert_eq!(format.as_deref(), weights.filter(|_| linear), "{name} {}", module.name);
        }
        let mut same = config.clone();
        same.model.lora = None;
        (same.name, same.optimizer, same.fake_quant) =
            (base.name.clone(), base.optimizer.clone(), base.fake_quant.clone());
        assert_eq!(same, base, "{name}");
    }
    // PEFT's count of trainable parameters of this adapter on Qwen2.5-1.5B.
    let shapes = Qwen2Config::preset("qwen2.5-1.5b").unwrap();
    assert_eq!(elements(&shapes, &load("mxfp4_lora.yaml").model.lora.unwrap()), 36_929_536);
}

/// Between them every phase has the error once.
#[test]
fn forward_and_backward_error_are_the_two_halves_of_e5() {
    let phases = |file: &str| plan(&load(file)).matmul_phases;
    let [forward, backward] = ["e5_forward.yaml", "e5_backward.yaml"].map(phases);
    for phase in InjectPhase::ALL {
        assert_eq!(backward.contains(phase), phase == InjectPhase::Backward);
        assert_ne!(forward.contains(phase), backward.contains(phase), "{phase:?}");
    }
}

/// "off or AQN": the W4A4 files carry mxfp4_aqn's schedule, switched off.
#[test]
fn w4a4_takes_aqn_with_one_key() {
    for name in ["w4a4_mxfp4", "w4a4_nvfp4"] {
        let on = ["noise_injection.enabled=true".to_string()];
        let config = temper::config::load(&super::registry_file(&format!("{name}.yaml")), &on).unwrap();
        assert_eq!(config.noise_injection, load("mxfp4_aqn.yaml").noise_injection);
    }
}

/// The long runs on quantized weights end when they collapse, as 1a and nvfp4 were reported to.
#[test]
fn the_long_quantized_runs_have_stop_rules() {
    for file in ["1a", "1c", "1d", "1e", "nvfp4"] {
        let rules = load(&format!("{file}.yaml")).trainer.stop_rules;
        let found: Vec<_> = rules.iter().map(|r| (r.metric.as_str(), r.above, r.below, r.after_step)).collect();
        let expected = [("entropy", Some(1.0), None, 19), ("val/acc_quantized", None, Some(0.3), 40)];
        assert_eq!(found, expected, "{file}");
    }
}

#[test]
fn e5c_has_its_116_sigmas() {
    let schedule = schedule(&load("e5c.yaml"));
    let table: [(u64, f64); 12] = [
        (10, 0.0),
        (10, 1e-2),
        (9, 4.217e-3),
        (10, 1.778e-3),
        (10, 7.499e-4),
        (9, 3.162e-4),
        (10, 0.0),
        (10, 3.162e-4),
        (9, 1.334e-4),
        (10, 5.623e-5),
        (10, 2.371e-5),
        (9, 1e-5),
    ];
    let expected: Vec<f64> = table.iter().flat_map(|&(steps, sigma)| (0..steps).map(move |_| sigma)).collect();
    assert_eq!(expected.len(), 116);
    for (u, &sigma) in expected.iter().enumerate() {
        let found = schedule.sigma(u as u64 + 1);
        assert!((found - sigma).abs() <= 5e-4 * sigma, "u = {u}: {found} against {sigma}");
    }
}

#[test]
fn e9_multipliers_are_those_of_the_layer_tables() {
    for (file, of) in [
        ("e9a.yaml", (|layer| f64::from((14..18).contains(&layer))) as fn(usize) -> f64),
        ("e9b.yaml", |layer| match layer {
            14..18 => 1.5,
            10..14 | 18..22 => 1.2,
            _ => 1.0,
        }),
        ("e9c.yaml", |layer| if (14..18).contains(&layer) { 1.5 } else { 0.0 }),
        ("e9a_mini.yaml", |layer| f64::from((14..18).contains(&layer))),
    ] {
        for module in plan(&load(file)).modules.iter().filter(|m| m.kind == ModuleKind::Rmsnorm) {
            // The final norm has no layer and takes the default, which is layer 0's.
            assert_eq!(module.aqn_multiplier, of(module.layer.unwrap_or(0)), "{file} {}", module.name);
        }
    }
}

#[test]
fn quickstart_and_debug_need_no_data() {
    for (file, rows, steps) in [("quickstart.yaml", 192, 24), ("debug.yaml", 24, 12)] {
        let config = load(file);
        assert_eq!(config.data.generated.train_problems, rows);
        let steps_per_epoch = config.steps_per_epoch(rows).unwrap();
        let schedule = config.sigma_schedule(steps_per_epoch).unwrap();
        assert_eq!(schedule.total_steps(), steps);
        assert_eq!(
            plan(&config).modules.iter().filter(|m| m.aqn_multiplier > 0.0).count(),
            if file == "debug.yaml" { 9 } else { 57 }
        );
        // Every stage of both epochs is visited.
        let mut stages: Vec<(u64, u64)> = (1..=steps).map(|t| (schedule.epoch(t), schedule.stage(t))).collect();
        stages.dedup();
        assert_eq!(stages.len(), 12, "{file}");
    }
}
