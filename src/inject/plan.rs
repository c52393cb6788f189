//! The injection plan: for every module, what is injected into it.
//!
//! A pure function of the three sections and the model's module list; `temper plan` prints it, the
//! model reads it, and measured.rs compares it with what really happened.

use std::collections::BTreeSet;

use serde::Serialize;

pub use super::modules::{FUSED_PROJECTIONS, ModuleKind, ModuleSpec, adapter_modules, qwen2_modules};
use super::multipliers;
use super::schedule;
use super::section::{
    ActivationScale, ApplyTo, Compat, DrawMode, DwDraw, FakeQuantSection, InjectPhase, LayerType,
    NoiseInjectionSection, NoisyOpsSection, PhaseSet,
};
use super::selection::pattern_matches;
use crate::numerics::error_law::ErrorLaw;
use crate::numerics::format::{Format, Rounding};
use crate::{Result, bail_input, input_error};

/// What is injected into one module.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModulePlan {
    pub name: String,
    pub kind: ModuleKind,
    pub layer: Option<usize>,
    /// Position in the module list.
    pub index: u32,
    /// m_l of w' = w + m_l*sigma*z; 0 = AQN leaves the module alone.
    pub aqn_multiplier: f64,
    /// s of the matrix product's error; 0 = none.
    pub matmul_error: f64,
    pub weight_format: Option<Format>,
    pub activation_format: Option<Format>,
}

/// What is injected where, in which phases and with which draws.
#[derive(Clone, Debug, PartialEq)]
pub struct InjectionPlan {
    pub modules: Vec<ModulePlan>,
    pub seed: u64,
    pub error_law: ErrorLaw,
    /// Empty when matmul noise is off.
    pub matmul_phases: PhaseSet,
    /// Empty when quantization is off.
    pub quant_phases: PhaseSet,
    pub draw: DrawMode,
    pub dw_draw: DwDraw,
    pub aqn_apply_to: ApplyTo,
    pub aqn_enabled: bool,
    /// There are adapters: the model's own weights have no gradient.
    pub frozen_base: bool,
    pub activation_scale: ActivationScale,
    /// Fused siblings share one tensor amax.
    pub share_tensor_scale: bool,
    /// Known defects that the configuration reproduces on purpose, and what it leaves without effect.
    pub notices: Vec<String>,
}

impl InjectionPlan {
    /// Errors name the key: a layer beyond the model's, a pattern that matches no module, an enabled
    /// injection that selects nothing.
    pub fn resolve(
        aqn: &NoiseInjectionSection,
        noise: &NoisyOpsSection,
        quant: &FakeQuantSection,
        specs: &[ModuleSpec],
        seed: u64,
    ) -> Result<InjectionPlan> {
        let layers = specs.iter().filter_map(|m| m.layer).max().map_or(0, |last| last + 1);
        let aqn_filter = Filter::new("noise_injection", &aqn.target_modules, &aqn.exclude_modules);
        let noise_filter = Filter::new("noisy_ops", &noise.target_modules, &noise.exclude_modules);
        let quant_filter = Filter::new("fake_quant", &quant.target_modules, &quant.exclude_modules);
        let mut unmatched = Vec::new();
        // Adapters stand last, and only the error reaches them.
        let own = specs.iter().position(|spec| spec.kind == ModuleKind::Adapter).map_or(specs, |first| &specs[..first]);
        if aqn.enabled {
            aqn_filter.check(own, &mut unmatched)?;
            if let Some(config) = multipliers::in_force(aqn) {
                let last = config.layer_multipliers.keys().next_back().copied();
                check_layer("noise_injection.layer_sigma_config.layer_multipliers", last, layers)?;
            }
        }
        if noise.enabled {
            noise_filter.check(specs, &mut unmatched)?;
            check_layer("noisy_ops.layers", noise.layers.last(), layers)?;
        }
        if quant.enabled {
            quant_filter.check(own, &mut unmatched)?;
            check_layer("fake_quant.exclude_layers", quant.exclude_layers.last(), layers)?;
        }

        let modules: Vec<ModulePlan> = specs
            .iter()
            .enumerate()
            .map(|(index, spec)| {
                let linear = spec.kind == ModuleKind::Linear;
                let noised = match spec.kind {
                    ModuleKind::Rmsnorm => aqn.layer_types.contains(&LayerType::Rmsnorm),
                    ModuleKind::Linear => aqn.layer_types.contains(&LayerType::Linear),
                    ModuleKind::Embedding | ModuleKind::Adapter => false,
                };
                let noised = aqn.enabled && noised && aqn_filter.selects(spec);
                let computes = linear || noise.adapters && spec.kind == ModuleKind::Adapter;
                let erroneous =
                    noise.enabled && computes && noise.layers.contains(spec.layer) && noise_filter.selects(spec);
                let quantized =
                    quant.enabled && linear && quant_filter.selects(spec) && !excluded_layer(quant, spec.layer);
                ModulePlan {
                    name: spec.name.clone(),
                    kind: spec.kind,
                    layer: spec.layer,
                    index: index as u32,
                    aqn_multiplier: if noised { multipliers::multiplier(aqn, spec.layer) } else { 0.0 },
                    matmul_error: if erroneous { noise.error_scale } else { 0.0 },
                    weight_format: quant.weights.filter(|_| quantized),
                    activation_format: quant.activations.filter(|_| quantized),
                }
            })
            .collect();

        let none = |key: &str, what: &str| {
            input_error!("{key}: selects no module for {what}; check target_modules, exclude_modules and layers")
        };
        if aqn.enabled && modules.iter().all(|m| m.aqn_multiplier == 0.0) {
            return Err(none("noise_injection", "AQN (or every multiplier is 0)"));
        }
        if noise.enabled && noise.error_scale > 0.0 && modules.iter().all(|m| m.matmul_error == 0.0) {
            return Err(none("noisy_ops", "matmul noise"));
        }
        let adapters = &modules[own.len()..];
        let wanted = noise.enabled && noise.adapters && noise.error_scale > 0.0 && !adapters.is_empty();
        if wanted && adapters.iter().all(|m| m.matmul_error == 0.0) {
            return Err(none("noisy_ops.adapters", "the error of adapters"));
        }
        if quant.enabled && modules.iter().all(|m| m.weight_format.is_none() && m.activation_format.is_none()) {
            return Err(none("fake_quant", "quantization"));
        }
        Ok(InjectionPlan {
            modules,
            seed,
            error_law: noise.error_type,
            matmul_phases: if noise.enabled { noise.phases } else { PhaseSet::EMPTY },
            quant_phases: if quant.enabled { quant.phases } else { PhaseSet::EMPTY },
            draw: noise.draw,
            dw_draw: noise.dw_draw,
            aqn_apply_to: aqn.apply_to,
            aqn_enabled: aqn.enabled,
            frozen_base: own.len() < specs.len(),
            activation_scale: quant.activation_scale.unwrap_or(ActivationScale::Token),
            share_tensor_scale: quant.share_tensor_scale,
            notices: notices(aqn, noise, quant).into_iter().chain(unmatched).collect(),
        })
    }

    /// The modules (by index, `index` included) whose weights share one tensor amax with this one:
    /// q/k/v and gate/up of a layer, as deployment stores them fused. Only formats with a tensor scale
    /// have something to share.
    pub fn tensor_scale_siblings(&self, index: u32) -> Vec<u32> {
        let two_level =
            |m: &&ModulePlan| self.share_tensor_scale && m.weight_format.is_some_and(Format::has_tensor_scale);
        let Some(module) = self.modules.get(index as usize).filter(two_level) else {
            return vec![index];
        };
        let group = FUSED_PROJECTIONS.iter().find(|names| names.iter().any(|name| module.name.ends_with(name)));
        let Some(group) = group else {
            return vec![index];
        };
        let sibling = |m: &&ModulePlan| {
            m.layer == module.layer
                && m.weight_format == module.weight_format
                && group.iter().any(|name| m.name.ends_with(name))
        };
        self.modules.iter().filter(sibling).map(|m| m.index).collect()
    }

    /// Whether the input of this module is quantized with a calibrated tensor amax.
    pub fn needs_activation_amax(&self, module: &ModulePlan) -> bool {
        self.activation_scale == ActivationScale::Static
            && !self.quant_phases.is_empty()
            && module.activation_format.is_some_and(Format::has_tensor_scale)
    }

    /// Whether matmul noise is added in this phase.
    pub fn matmul_in(&self, phase: InjectPhase) -> bool {
        self.matmul_phases.contains(phase)
    }

    /// Whether weights and activations are quantized in this phase.
    pub fn quant_in(&self, phase: InjectPhase) -> bool {
        self.quant_phases.contains(phase)
    }
}

/// `target_modules` and `exclude_modules` of one section.
struct Filter<'a> {
    section: &'a str,
    targets: Option<&'a [String]>,
    exclusions: &'a [String],
}

impl<'a> Filter<'a> {
    fn new(section: &'a str, targets: &'a Option<Vec<String>>, exclusions: &'a [String]) -> Filter<'a> {
        Filter { section, targets: targets.as_deref(), exclusions }
    }

    fn selects(&self, spec: &ModuleSpec) -> bool {
        let any = |patterns: &[String]| patterns.iter().any(|pattern| selects_module(pattern, spec));
        self.targets.is_none_or(any) && !any(self.exclusions)
    }

    /// A target that matches nothing is a typing error, and would silently change the experiment. An exclusion that
    /// matches nothing excludes nothing: the original's lists name modules of other models, so it is only said.
    fn check(&self, specs: &[ModuleSpec], notices: &mut Vec<String>) -> Result<()> {
        let unmatched =
            |pattern: &&String| pattern.is_empty() || !specs.iter().any(|spec| selects_module(pattern, spec));
        if let Some(pattern) = self.targets.unwrap_or_default().iter().find(unmatched) {
            let names: BTreeSet<&str> = specs.iter().filter_map(|s| s.name.rsplit('.').next()).collect();
            let names: Vec<&str> = names.into_iter().collect();
            bail_input!(
                "{}.target_modules: `{pattern}` matches no module; the model has {}",
                self.section,
                names.join(", ")
            );
        }
        for pattern in self.exclusions.iter().filter(unmatched) {
            notices.push(format!("{}.exclude_modules: `{pattern}` matches no module of this model", self.section));
        }
        Ok(())
    }
}

/// A pattern on the name, or the name of a kind: `rmsnorm`, `linear`. What selects a linear selects its adapter.
fn selects_module(pattern: &str, spec: &ModuleSpec) -> bool {
    let is_adapter = spec.kind == ModuleKind::Adapter;
    match pattern.to_ascii_lowercase().as_str() {
        "rmsnorm" => spec.kind == ModuleKind::Rmsnorm,
        "linear" => spec.kind == ModuleKind::Linear || is_adapter,
        _ => {
            let linear = spec.name.rsplit_once('.').map_or("", |(linear, _)| linear);
            pattern_matches(pattern, &spec.name) || is_adapter && pattern_matches(pattern, linear)
        }
    }
}

fn excluded_layer(quant: &FakeQuantSection, layer: Option<usize>) -> bool {
    layer.is_some() && quant.exclude_layers.contains(layer)
}

fn check_layer(key: &str, last: Option<usize>, layers: usize) -> Result<()> {
    match last {
        Some(last) if last >= layers => bail_input!(
            "{key}: found layer {last}, expected 0 to {}: the model has {layers} layers",
            layers.saturating_sub(1)
        ),
        _ => Ok(()),
    }
}

/// Known defects reproduced on purpose, and keys without effect.
fn notices(aqn: &NoiseInjectionSection, noise: &NoisyOpsSection, quant: &FakeQuantSection) -> Vec<String> {
    const DEFECT: &str = "reproduces a known defect of the original";
    let mut notices = Vec::new();
    let mut say = |applies: bool, text: String| {
        if applies {
            notices.push(text);
        }
    };
    let original = aqn.enabled && aqn.compat == Some(Compat::Original);
    say(
        original && schedule::is_epoch_aware(aqn),
        format!("noise_injection.compat: original: {DEFECT}: epoch-aware sigma is 0 at every step"),
    );
    say(
        original && aqn.layer_sigma_config.is_some(),
        format!("noise_injection.compat: original: {DEFECT}: layer_sigma_config is ignored"),
    );
    say(
        aqn.enabled && aqn.layer_sigma_config.as_ref().is_some_and(|c| !c.enabled),
        "noise_injection.layer_sigma_config.enabled: false: its multipliers and base_sigma are not used".to_string(),
    );
    say(
        noise.enabled && !noise.exclude_modules.iter().any(|p| pattern_matches(p, "lm_head")),
        format!("noisy_ops.exclude_modules does not name lm_head: {DEFECT}: noise on the logits"),
    );
    say(
        noise.enabled && noise.dw_draw == DwDraw::PerMicrobatch,
        "noisy_ops.dw_draw: per_microbatch: as the original: trainer.microbatch_sequences is part of the experiment"
            .to_string(),
    );
    for (key, format) in [("weights", quant.weights), ("activations", quant.activations)] {
        say(
            quant.enabled && format == Some(Format::NVFP4_SINGLE_LEVEL),
            format!("fake_quant.{key}: nvfp4_single_level: {DEFECT}: no tensor scale"),
        );
        say(
            quant.enabled && format.is_some_and(|format| format.rounding == Rounding::HalfAway),
            format!("fake_quant.{key}: half_away: {DEFECT}: ties go away from zero"),
        );
    }
    say(
        quant.enabled && quant.activations.is_none() && quant.activation_scale == Some(ActivationScale::Static),
        "fake_quant.activation_scale: static: set, but no activations are quantized".to_string(),
    );
    say(
        quant.enabled && quant.calibration_prompts.is_some() && quant.activation_scale != Some(ActivationScale::Static),
        "fake_quant.calibration_prompts: set, but only activation_scale: static is calibrated".to_string(),
    );
    say(
        quant.enabled && !quant.share_tensor_scale && quant.weights.is_some_and(Format::has_tensor_scale),
        "fake_quant.share_tensor_scale: false: q/k/v and gate/up have a tensor scale each; deployed models and `temper quantize` share one"
            .to_string(),
    );
    say(
        noise.enabled && noise.error_scale == 0.0,
        "noisy_ops.error_scale: 0: matmul noise is enabled but adds nothing".to_string(),
    );
    notices
}

#[cfg(test)]
mod tests;
