//! The plan against hand-written expectations on the 1.5B model's module list.

#![allow(clippy::unwrap_used)]
use super::*;
use crate::inject::section::{LayerSet, LayerSigmaConfig};
use crate::numerics::format::Format;

fn qwen() -> Vec<ModuleSpec> {
    qwen2_modules(28, 1536, 8960, 12, 2, 128, 151_936)
}

fn resolve(aqn: &NoiseInjectionSection, noise: &NoisyOpsSection, quant: &FakeQuantSection) -> Result<InjectionPlan> {
    InjectionPlan::resolve(aqn, noise, quant, &qwen(), 0)
}

#[test]
fn the_module_list_is_that_of_the_noise_keys() {
    let modules = qwen();
    assert_eq!(modules.len(), 1 + 28 * 9 + 2);
    assert_eq!(modules[1].name, "model.layers.0.input_layernorm");
    assert_eq!(modules[9].name, "model.layers.0.mlp.down_proj");
    assert_eq!((modules[9].in_features, modules[9].out_features), (8960, 1536));
    assert_eq!((modules[3].in_features, modules[3].out_features), (1536, 256));
    assert_eq!(modules[253].name, "model.norm");
    assert_eq!(modules[254].name, "lm_head");
    assert_eq!(modules.iter().filter(|m| m.kind == ModuleKind::Rmsnorm).count(), 57);
}

#[test]
fn the_head_and_the_embedding_are_spared_by_default() {
    let aqn = NoiseInjectionSection { enabled: true, layer_types: vec![LayerType::Linear], ..Default::default() };
    let noise = NoisyOpsSection { enabled: true, ..Default::default() };
    let quant = FakeQuantSection { enabled: true, ..Default::default() };
    let plan = resolve(&aqn, &noise, &quant).unwrap();
    assert!(plan.notices.is_empty());
    for module in &plan.modules {
        let injected = module.kind == ModuleKind::Linear && module.name != "lm_head";
        assert_eq!(module.aqn_multiplier, f64::from(injected), "{}", module.name);
        assert_eq!(module.matmul_error, if injected { 0.05 } else { 0.0 }, "{}", module.name);
        assert_eq!(module.weight_format, injected.then_some(Format::MXFP4));
    }
    let noise = NoisyOpsSection { exclude_modules: vec![], ..noise };
    let plan = resolve(&aqn, &noise, &quant).unwrap();
    assert_eq!(plan.modules[254].matmul_error, 0.05);
    assert!(plan.notices[0].contains("lm_head"));
}

#[test]
fn layers_patterns_and_multipliers_select_what_they_say() {
    let config =
        LayerSigmaConfig { default_multiplier: 0.0, layer_multipliers: [(14, 1.5)].into(), ..Default::default() };
    let aqn = NoiseInjectionSection { enabled: true, layer_sigma_config: Some(config), ..Default::default() };
    let noise = NoisyOpsSection {
        enabled: true,
        layers: LayerSet::Only([3].into()),
        target_modules: Some(vec!["mlp".to_string()]),
        ..Default::default()
    };
    let plan = resolve(&aqn, &noise, &FakeQuantSection::default()).unwrap();
    let noised: Vec<&str> = plan.modules.iter().filter(|m| m.aqn_multiplier != 0.0).map(|m| m.name.as_str()).collect();
    assert_eq!(noised, ["model.layers.14.input_layernorm", "model.layers.14.post_attention_layernorm"]);
    let erroneous: Vec<&str> = plan.modules.iter().filter(|m| m.matmul_error != 0.0).map(|m| m.name.as_str()).collect();
    assert_eq!(
        erroneous,
        ["model.layers.3.mlp.gate_proj", "model.layers.3.mlp.up_proj", "model.layers.3.mlp.down_proj"]
    );
    assert!(plan.quant_phases.is_empty() && plan.modules.iter().all(|m| m.weight_format.is_none()));
}

#[test]
fn what_selects_nothing_is_an_error() {
    let off = (NoiseInjectionSection::default(), NoisyOpsSection::default(), FakeQuantSection::default());
    let config = LayerSigmaConfig { layer_multipliers: [(28, 1.0)].into(), ..Default::default() };
    let aqn = NoiseInjectionSection { enabled: true, layer_sigma_config: Some(config), ..Default::default() };
    let error = resolve(&aqn, &off.1, &off.2).unwrap_err().to_string();
    assert!(error.contains("layer_multipliers: found layer 28, expected 0 to 27"), "{error}");
    let noise =
        NoisyOpsSection { enabled: true, target_modules: Some(vec!["q_porj".to_string()]), ..Default::default() };
    let error = resolve(&off.0, &noise, &off.2).unwrap_err().to_string();
    assert!(error.contains("noisy_ops.target_modules: `q_porj` matches no module"), "{error}");
    let noise = NoisyOpsSection { enabled: true, layers: LayerSet::Only([99].into()), ..Default::default() };
    assert!(resolve(&off.0, &noise, &off.2).unwrap_err().to_string().contains("noisy_ops.layers: found layer 99"));
    let noise = NoisyOpsSection { enabled: true, target_modules: Some(vec!["norm".to_string()]), ..Default::default() };
    assert!(resolve(&off.0, &noise, &off.2).unwrap_err().to_string().contains("selects no module"));
}

#[test]
fn compat_ignores_multipliers_and_says_so() {
    let config =
        LayerSigmaConfig { default_multiplier: 0.0, layer_multipliers: [(14, 1.5)].into(), ..Default::default() };
    let aqn = NoiseInjectionSection {
        enabled: true,
        compat: Some(Compat::Original),
        layer_sigma_config: Some(config),
        ..Default::default()
    };
    let plan = resolve(&aqn, &NoisyOpsSection::default(), &FakeQuantSection::default()).unwrap();
    assert!(plan.modules.iter().filter(|m| m.kind == ModuleKind::Rmsnorm).all(|m| m.aqn_multiplier == 1.0));
    assert_eq!(plan.notices.len(), 2);
}

#[test]
fn fused_siblings_share_a_tensor_scale_only_where_there_is_one() {
    let off = (NoiseInjectionSection::default(), NoisyOpsSection::default());
    let quant = FakeQuantSection { enabled: true, weights: Some(Format::NVFP4), ..Default::default() };
    let plan = resolve(&off.0, &off.1, &quant).unwrap();
    assert_eq!(plan.tensor_scale_siblings(3), [2, 3, 4]);
    assert_eq!(plan.tensor_scale_siblings(7), [7, 8]);
    assert_eq!(plan.tensor_scale_siblings(5), [5]);
    let plan = resolve(&off.0, &off.1, &FakeQuantSection { enabled: true, ..Default::default() }).unwrap();
    assert_eq!(plan.tensor_scale_siblings(3), [3]);
}
