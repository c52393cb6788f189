//! The checks must agree with a correct step and disagree with every planted defect.

#![allow(clippy::unwrap_used)]
use super::*;
use crate::inject::measured::{MatmulDirection, StepInjection};
use crate::inject::plan::{InjectionPlan, ModuleKind, ModulePlan, qwen2_modules};
use crate::inject::section::{
    ActivationScale, FakeQuantSection, LayerSigmaConfig, NoiseInjectionSection, NoisyOpsSection, PhaseSet,
};
use crate::numerics::error_law::NoiseSums;
use crate::numerics::format::Format;
use crate::numerics::tensor_error::TensorErrorSums;
use serde_json::json;

const HIDDEN: u64 = 64;
const SIGMA: f64 = 0.01;
const MXFP4: Format = Format::MXFP4;
const NVFP4: Format = Format::NVFP4;

/// E9b's shape: 1.5 on layer 1, 0 on layer 2, 1.0 elsewhere.
fn plan() -> InjectionPlan {
    let config = LayerSigmaConfig { layer_multipliers: [(1, 1.5), (2, 0.0)].into(), ..Default::default() };
    let aqn = NoiseInjectionSection { enabled: true, layer_sigma_config: Some(config), ..Default::default() };
    let noise = NoisyOpsSection { enabled: true, ..Default::default() };
    let modules = qwen2_modules(4, HIDDEN as usize, 128, 4, 2, 16, 100);
    InjectionPlan::resolve(&aqn, &noise, &FakeQuantSection::default(), &modules, 0).unwrap()
}

/// A step in which each module gets `sigma_of` and each linear `scale`, with textbook normals.
fn step(plan: &InjectionPlan, sigma_of: impl Fn(&ModulePlan) -> f64, scale: f64) -> StepInjection {
    let mut measured = Measured::new(plan);
    let mut draw = Normals(1);
    for module in &plan.modules {
        let sigma = sigma_of(module);
        if module.kind == ModuleKind::Rmsnorm && sigma > 0.0 {
            let z: Vec<f64> = (0..HIDDEN).map(|_| sigma * draw.next()).collect();
            let (sum, sum_sq) = (z.iter().sum(), z.iter().map(|z| z * z).sum());
            measured.record_aqn(module.index, sigma, HIDDEN, sum, sum_sq);
            measured.record_norm_output(module.index, 900, 1000);
        }
        if module.matmul_error > 0.0 {
            let mut sums = NoiseSums { elements: 20_000, ..Default::default() };
            for _ in 0..sums.elements {
                let (y, z) = (draw.next(), draw.next());
                sums.error_sq += (y * scale * z).powi(2);
                sums.clean_sq += y * y;
                sums.clean_fourth += y.powi(4);
            }
            for phase in [InjectPhase::Rollout, InjectPhase::OldLogprobs, InjectPhase::Forward] {
                measured.record_matmul(module.index, MatmulDirection::Forward, phase, 1, &sums);
            }
            measured.record_matmul(module.index, MatmulDirection::Dx, InjectPhase::Backward, 1, &sums);
            measured.record_matmul(module.index, MatmulDirection::Dw, InjectPhase::Backward, 1, &sums);
        }
    }
    measured.finish_step(7, SIGMA)
}

/// Box-Muller over a multiplicative generator: nothing shared with numerics::generator.
struct Normals(u64);

impl Normals {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    fn next(&mut self) -> f64 {
        let (a, b) = (self.uniform(), self.uniform());
        (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()
    }
}

#[test]
fn what_was_planned_agrees_and_is_reported() {
    let plan = plan();
    let report = step(&plan, |m| m.aqn_multiplier * SIGMA, 0.05);
    assert_eq!(report.disagreements, Vec::<String>::new());
    // 9 norms, 28 linears; embedding and head have nothing.
    assert_eq!(report.rows.len(), 9 + 28);
    let row = |name: &str| report.rows.iter().find(|r| r["module"] == name).unwrap();
    let aqn = &row("model.layers.1.input_layernorm")["aqn"];
    assert_eq!(aqn["planned"], 0.015);
    assert!((aqn["measured"].as_f64().unwrap() - 0.015).abs() < 4.0 * aqn["standard_error"].as_f64().unwrap());
    assert_eq!(row("model.layers.2.input_layernorm")["aqn"]["measured"], 0.0);
    let matmul = &row("model.layers.0.mlp.up_proj")["matmul"];
    for kind in ["rollout", "forward", "dx", "dw"] {
        assert!((matmul[kind]["measured"].as_f64().unwrap() / 0.05 - 1.0).abs() < 0.03, "{kind}");
    }
    let summary = &report.summary;
    assert_eq!((&summary["aqn/sigma"], &summary["aqn/modules"]), (&json!(SIGMA), &json!(7)));
    assert!((summary["aqn/measured_std"].as_f64().unwrap() / SIGMA - 1.0).abs() < 0.15);
    assert_eq!(summary["aqn/output_changed_ratio"], 0.9);
    assert_eq!((&summary["noisy_ops/forward_calls"], &summary["noisy_ops/backward_calls"]), (&json!(84), &json!(56)));
    assert!((summary["noisy_ops/measured_std_backward"].as_f64().unwrap() / 0.05 - 1.0).abs() < 0.02);
}

#[test]
fn dropped_multipliers_disagree() {
    let report = step(&plan(), |_| SIGMA, 0.05);
    assert!(
        report.disagreements.iter().any(|d| d.contains("layers.2.input_layernorm: planned 0")),
        "{:?}",
        report.disagreements
    );
    assert!(
        report.disagreements.iter().any(|d| d.contains("layers.1.input_layernorm: planned 1.500e-2, applied 1.000e-2"))
    );
}

#[test]
fn a_wrong_spread_disagrees_even_when_the_scale_is_claimed() {
    let plan = plan();
    let mut measured = Measured::new(&plan);
    for module in plan.modules.iter().filter(|m| m.aqn_multiplier > 0.0) {
        let planned = module.aqn_multiplier * SIGMA;
        measured.record_aqn(module.index, planned, 1000, 0.0, 1000.0 * (0.9 * planned).powi(2));
    }
    let report = measured.finish_step(1, SIGMA);
    assert_eq!(report.disagreements.iter().filter(|d| d.contains("modules with multiplier")).count(), 2);
}

#[test]
fn a_scale_of_zero_disagrees() {
    let report = step(&plan(), |m| m.aqn_multiplier * SIGMA, 0.0);
    // 28 linears in 3 forward phases and 2 backward products.
    assert_eq!(report.disagreements.len(), 28 * 5);
    assert!(report.disagreements[0].contains("planned 0.05, measured 0.00000"), "{}", report.disagreements[0]);
    let report = step(&plan(), |_| 0.0, 0.05);
    assert_eq!(report.disagreements.len(), 7);
    assert!(report.disagreements[0].contains("nothing was injected"));
}

#[test]
fn a_module_or_phase_left_out_or_added_disagrees() {
    let noise = NoisyOpsSection { enabled: true, phases: PhaseSet::of(&[InjectPhase::Rollout]), ..Default::default() };
    let modules = qwen2_modules(1, 64, 128, 4, 2, 16, 100);
    let plan =
        InjectionPlan::resolve(&NoiseInjectionSection::default(), &noise, &FakeQuantSection::default(), &modules, 0)
            .unwrap();
    let sums = NoiseSums { error_sq: 2500.0, clean_sq: 1e6, clean_fourth: 3e6, elements: 1_000_000 };
    let mut measured = Measured::new(&plan);
    for module in plan.modules.iter().filter(|m| m.matmul_error > 0.0).skip(1) {
        measured.record_matmul(module.index, MatmulDirection::Forward, InjectPhase::Rollout, 1, &sums);
    }
    measured.record_matmul(5, MatmulDirection::Forward, InjectPhase::Forward, 1, &sums);
    let report = measured.finish_step(1, 0.0);
    assert_eq!(report.disagreements.len(), 2, "{:?}", report.disagreements);
    assert!(report.disagreements[0].contains("q_proj (rollout): planned 0.05, but no noisy product ran"));
    assert!(report.disagreements[1].contains("o_proj (forward): planned 0, measured 5.0000e-2"));
    assert_eq!(measured.finish_step(2, 0.0).disagreements, ["noisy_ops: noise is planned, but no noisy product ran"]);
}

#[test]
fn a_product_that_was_not_measured_or_is_anothers_disagrees() {
    let plan = plan();
    let sums = |elements: u64| {
        let n = elements as f64;
        NoiseSums { error_sq: 0.0025 * n, clean_sq: n, clean_fourth: 3.0 * n, elements }
    };
    let step = |of: &dyn Fn(&ModulePlan) -> u64| {
        let mut measured = Measured::new(&plan);
        for module in plan.modules.iter().filter(|m| m.matmul_error > 0.0) {
            for direction in [MatmulDirection::Forward, MatmulDirection::Dx, MatmulDirection::Dw] {
                measured.record_matmul(module.index, direction, InjectPhase::Forward, 2, &sums(of(module)));
            }
        }
        let noise = measured.finish_step(1, SIGMA).disagreements.into_iter();
        noise.filter(|line| line.starts_with("noisy_ops")).collect::<Vec<String>>()
    };
    // Heads and widths differ within a layer, not from layer to layer.
    let right = |m: &ModulePlan| if m.name.ends_with("k_proj") { 20_000 } else { 40_000 };
    assert_eq!(step(&right), Vec::<String>::new());
    let lost = step(&|m: &ModulePlan| if m.name.ends_with("2.mlp.up_proj") { 0 } else { right(m) });
    assert_eq!(lost.len(), 3, "{lost:?}");
    assert!(lost[0].contains("layers.2.mlp.up_proj (forward): planned 0.05, but 2 products were not measured"));
    let less = step(&|m: &ModulePlan| if m.layer == Some(3) { right(m) / 2 } else { right(m) });
    assert_eq!(less.len(), 7 * 3, "{less:?}");
    let line =
        "layers.3.self_attn.q_proj (forward): 20000 elements measured, but 40000 of model.layers.0.self_attn.q_proj";
    assert!(less[0].contains(line), "{}", less[0]);
}

#[test]
fn quantization_that_did_not_happen_disagrees() {
    let quant = FakeQuantSection { enabled: true, ..Default::default() };
    let modules = qwen2_modules(1, 64, 128, 4, 2, 16, 100);
    let plan =
        InjectionPlan::resolve(&NoiseInjectionSection::default(), &NoisyOpsSection::default(), &quant, &modules, 0)
            .unwrap();
    let mut measured = Measured::new(&plan);
    let quantized: Vec<u32> = plan.modules.iter().filter(|m| m.weight_format.is_some()).map(|m| m.index).collect();
    for &index in &quantized {
        measured.record_quant(index, MXFP4, &TensorErrorSums { x_sq: 100.0, error_sq: 1.0, ..Default::default() });
    }
    let report = measured.finish_step(1, 0.0);
    assert!(report.disagreements.is_empty());
    assert_eq!(report.summary["quant/sqnr_db"], 20.0);
    measured.record_quant(quantized[0], MXFP4, &TensorErrorSums { x_sq: 100.0, ..Default::default() });
    assert_eq!(measured.finish_step(2, 0.0).disagreements.len(), 1);
    measured.record_quant(quantized[0], NVFP4, &TensorErrorSums { x_sq: 100.0, error_sq: 1.0, ..Default::default() });
    let report = measured.finish_step(3, 0.0);
    let q_proj = "model.layers.0.self_attn.q_proj";
    assert_eq!(report.disagreements, [format!("fake_quant: {q_proj}: planned mxfp4, but it was quantized to nvfp4")]);
    let quant = &report.rows[0]["quant"];
    assert_eq!((&quant["planned"], &quant["format"]), (&json!("mxfp4"), &json!("nvfp4")));
    assert_eq!(Measured::new(&plan).finish_step(1, 0.0).disagreements.len(), quantized.len());
}

/// Inputs of linears: each phase of training and each module, the format and the kind of scale.
#[test]
fn activations_that_were_not_quantized_as_planned_disagree() {
    let quant = FakeQuantSection { enabled: true, activations: Some(NVFP4), weights: None, ..Default::default() };
    let modules = qwen2_modules(1, 64, 128, 4, 2, 16, 100);
    let off = (NoiseInjectionSection::default(), NoisyOpsSection::default());
    let plan = InjectionPlan::resolve(&off.0, &off.1, &quant, &modules, 0).unwrap();
    let good = TensorErrorSums { x_sq: 1000.0, error_sq: 10.0, elements: 640, ..Default::default() };
    // One step in which `change` may alter what the input of (module, phase) got; None leaves it out.
    type Got = Option<(Format, ActivationScale, TensorErrorSums)>;
    let step = |change: &dyn Fn(&str, InjectPhase) -> Got| {
        let mut measured = Measured::new(&plan);
        for module in plan.modules.iter().filter(|m| m.kind == ModuleKind::Linear && m.name != "lm_head") {
            for phase in [InjectPhase::Rollout, InjectPhase::OldLogprobs, InjectPhase::Forward] {
                assert!(measured.awaits_activation(module.index, phase));
                if let Some((format, scale, sums)) = change(&module.name, phase) {
                    measured.record_activation(module.index, phase, format, scale, &sums);
                    assert!(!measured.awaits_activation(module.index, phase));
                }
            }
        }
        measured.finish_step(1, 0.0)
    };
    let (token, fixed) = (ActivationScale::Token, ActivationScale::Static);
    let report = step(&|_, _| Some((NVFP4, token, good)));
    assert_eq!(report.disagreements, Vec::<String>::new());
    assert_eq!(report.rows.len(), 7);
    let entry = &report.rows[0]["quant_activations"];
    assert_eq!((&entry["planned"], &entry["rollout"]["format"]), (&json!("nvfp4"), &json!("nvfp4")));
    assert_eq!((&entry["forward"]["sqnr_db"], &entry["forward"]["scale"]), (&json!(20.0), &json!("token")));
    assert_eq!((&entry["old_logprobs"]["n"], entry.get("dx")), (&json!(640), None));
    assert_eq!(report.summary["quant/activation_sqnr_db"], 20.0);

    assert_eq!(step(&|_, _| None).disagreements.len(), 7 * 3);
    let one = |d: StepInjection| {
        assert_eq!(d.disagreements.len(), 1, "{:?}", d.disagreements);
        d.disagreements[0].clone()
    };
    let is = |name: &str, phase| name.ends_with("up_proj") && phase == InjectPhase::Forward;
    let up = "fake_quant: input of model.layers.0.mlp.up_proj (forward): planned";
    let dropped = step(&|n, p| if is(n, p) { None } else { Some((NVFP4, token, good)) });
    assert_eq!(one(dropped), format!("{up} nvfp4, but it was not quantized"));
    let other = step(&|n, p| Some((if is(n, p) { MXFP4 } else { NVFP4 }, token, good)));
    assert_eq!(one(other), format!("{up} nvfp4, but it was quantized to mxfp4"));
    let scaled = step(&|n, p| Some((NVFP4, if is(n, p) { fixed } else { token }, good)));
    assert_eq!(one(scaled), format!("{up} scale token, applied static"));
    let exact = TensorErrorSums { error_sq: 0.0, ..good };
    let unchanged = step(&|n, p| Some((NVFP4, token, if is(n, p) { exact } else { good })));
    assert_eq!(one(unchanged), format!("{up} nvfp4, but it did not change"));

    let mut measured = Measured::new(&InjectionPlan { quant_phases: PhaseSet::EMPTY, ..plan.clone() });
    measured.record_activation(2, InjectPhase::RefLogprobs, NVFP4, token, &good);
    assert!(
        one(measured.finish_step(1, 0.0))
            .ends_with("q_proj (ref_logprobs): planned none, but it was quantized to nvfp4")
    );
}
