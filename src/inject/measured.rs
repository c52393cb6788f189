//! What was injected, measured from the tensors used: the rows of injection.jsonl and the injection keys
//! of metrics.jsonl. agreement.rs says whether it is what was planned.
//!
//! - AQN, per module: std(w' - w) over n elements against m_l*sigma; standard error planned/sqrt(2(n-1)).
//!   Also the share of the norm's rounded output that differs from the clean one.
//! - Matmul noise, per module, phase and direction: sqrt(sum error^2 / sum y^2) over rounded outputs
//!   against s; standard error s/sqrt(2 n_eff), n_eff = (sum y^2)^2 / sum y^4, since large outputs
//!   carry most of the sum.
//! - Quantization, per module: the error metrics of the weights, and of the first tokens of its input in each phase.

use serde_json::{Map, Value, json};

use super::plan::{InjectionPlan, ModuleKind, ModulePlan};
use super::section::{ActivationScale, InjectPhase};
use crate::numerics::error_law::{ErrorLaw, NoiseSums};
use crate::numerics::format::Format;
use crate::numerics::tensor_error::TensorErrorSums;

/// Which of the three products of a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MatmulDirection {
    Forward,
    Dx,
    Dw,
}

/// Accumulators of one training step (or one validation).
#[derive(Clone, Debug)]
pub struct Measured {
    pub(super) plan: InjectionPlan,
    pub(super) modules: Vec<ModuleSums>,
    repeats: u64,
}

#[derive(Clone, Debug, Default)]
pub(super) struct ModuleSums {
    pub(super) aqn: Option<AqnSums>,
    pub(super) changed: u64,
    pub(super) outputs: u64,
    /// By slot: a forward product in each phase, then dX, dW.
    pub(super) matmul: [MatmulSums; SLOTS],
    /// Kept from step to step: weights are quantized when they change.
    pub(super) quant: Option<QuantSums>,
    /// By phase of the pass.
    pub(super) activations: [Option<(QuantSums, ActivationScale)>; PHASES],
}

/// A quantized tensor: the format that was applied, and the error that it made.
#[derive(Clone, Copy, Debug)]
pub(super) struct QuantSums {
    pub(super) format: Format,
    pub(super) sums: TensorErrorSums,
}

impl QuantSums {
    /// nulls where nothing was quantized.
    fn json(planned: Option<Format>, quant: Option<QuantSums>) -> Value {
        let error = quant.map(|q| q.sums.finish());
        json!({
            "planned": planned,
            "format": quant.map(|q| q.format),
            "sqnr_db": error.map(|e| e.sqnr_db),
            "relative_error": error.map(|e| e.relative_error),
            "deadzone_ratio": error.map(|e| e.deadzone_ratio),
            "n": quant.map_or(0, |q| q.sums.elements),
            "nonfinite": quant.map_or(0, |q| q.sums.nonfinite),
        })
    }

    /// Over all of them, in dB.
    fn sqnr_db(all: impl Iterator<Item = QuantSums>) -> Value {
        let (x_sq, error_sq) = all.fold((0.0, 0.0), |(x, e), q| (x + q.sums.x_sq, e + q.sums.error_sq));
        json!(10.0 * (x_sq / error_sq).log10())
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct AqnSums {
    pub(super) sigma_effective: f64,
    pub(super) n: u64,
    pub(super) sum: f64,
    pub(super) sum_sq: f64,
}

impl AqnSums {
    pub(super) fn std(&self) -> f64 {
        let n = self.n as f64;
        if self.n < 2 {
            (self.sum_sq / n.max(1.0)).sqrt()
        } else {
            ((self.sum_sq - self.sum * self.sum / n).max(0.0) / (n - 1.0)).sqrt()
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct MatmulSums {
    pub(super) calls: u64,
    pub(super) sums: NoiseSums,
}

pub(super) const PHASES: usize = InjectPhase::ALL.len();
pub(super) const SLOTS: usize = 8;
pub(super) const DX: usize = 6;
pub(super) const DW: usize = 7;
pub(super) const SLOT_NAMES: [&str; SLOTS] =
    ["rollout", "validation", "old_logprobs", "ref_logprobs", "forward", "recompute", "dx", "dw"];

fn slot(direction: MatmulDirection, phase: InjectPhase) -> usize {
    match direction {
        MatmulDirection::Forward => phase as usize,
        MatmulDirection::Dx => DX,
        MatmulDirection::Dw => DW,
    }
}

/// The phase whose presence in the plan decides about a slot.
fn slot_phase(slot: usize) -> InjectPhase {
    InjectPhase::ALL.get(slot).copied().unwrap_or(InjectPhase::Backward)
}

/// What a step injected.
#[derive(Clone, Debug, Default)]
pub struct StepInjection {
    /// One object per module that something concerns, for injection.jsonl.
    pub rows: Vec<Value>,
    /// The injection keys of metrics.jsonl.
    pub summary: Map<String, Value>,
    /// One line each; empty when what was measured is what was planned.
    pub disagreements: Vec<String>,
}

impl Measured {
    pub fn new(plan: &InjectionPlan) -> Measured {
        Measured { modules: vec![ModuleSums::default(); plan.modules.len()], plan: plan.clone(), repeats: 1 }
    }

    /// How often one draw may enter the sums: the members of a group share the draws of their prompt,
    /// so that up to group_size rows are not independent. Widens the standard errors of matmul noise.
    pub fn with_repeats(mut self, repeats: u64) -> Measured {
        self.repeats = repeats.max(1);
        self
    }

    /// The perturbation of a module's weight: the sigma it was told to use (m_l*sigma), and over its n
    /// elements the sums of (w' - w) and (w' - w)^2. Once per step and module: all rollouts of a step
    /// share one draw, so a second record of the step is the same draw and is left out.
    pub fn record_aqn(&mut self, module_index: u32, sigma_effective: f64, n: u64, sum: f64, sum_sq: f64) {
        if let Some(module) = self.modules.get_mut(module_index as usize) {
            module.aqn.get_or_insert(AqnSums { sigma_effective, n, sum, sum_sq });
        }
    }

    /// Of `total` rounded output elements of a norm, `changed` differ from the clean ones.
    pub fn record_norm_output(&mut self, module_index: u32, changed: u64, total: u64) {
        if let Some(module) = self.modules.get_mut(module_index as usize) {
            module.changed += changed;
            module.outputs += total;
        }
    }

    /// Noisy products: `calls` of them, with the sum of their `sums`. `phase` is that of the pass; for
    /// dX and dW it is `Backward`.
    pub fn record_matmul(
        &mut self,
        module_index: u32,
        direction: MatmulDirection,
        phase: InjectPhase,
        calls: u64,
        sums: &NoiseSums,
    ) {
        if let Some(module) = self.modules.get_mut(module_index as usize) {
            let entry = &mut module.matmul[slot(direction, phase)];
            entry.calls += calls;
            entry.sums.merge(sums);
        }
    }

    /// The quantization of a module's weight to `format`; the newest counts.
    pub fn record_quant(&mut self, module_index: u32, format: Format, sums: &TensorErrorSums) {
        if let Some(module) = self.modules.get_mut(module_index as usize) {
            module.quant = Some(QuantSums { format, sums: *sums });
        }
    }

    /// Whether nothing is known yet of how this module's input was quantized in `phase` of this step.
    pub fn awaits_activation(&self, module_index: u32, phase: InjectPhase) -> bool {
        self.modules.get(module_index as usize).is_some_and(|m| m.activations[phase as usize].is_none())
    }

    /// The quantization of a module's input to `format` in a pass of `phase`.
    pub fn record_activation(
        &mut self,
        module_index: u32,
        phase: InjectPhase,
        format: Format,
        scale: ActivationScale,
        sums: &TensorErrorSums,
    ) {
        if let Some(module) = self.modules.get_mut(module_index as usize) {
            module.activations[phase as usize] = Some((QuantSums { format, sums: *sums }, scale));
        }
    }

    /// Rows, summary and disagreements of a step whose rollout used `sigma`; starts the next step.
    pub fn finish_step(&mut self, step: u64, sigma: f64) -> StepInjection {
        let sigma = if self.plan.aqn_enabled { sigma } else { 0.0 };
        let mut report = StepInjection { summary: self.summary(sigma), ..StepInjection::default() };
        for (module, sums) in self.plan.modules.iter().zip(&self.modules) {
            report.rows.extend(self.row(step, sigma, module, sums));
        }
        report.disagreements = self.disagreements(sigma);
        for module in &mut self.modules {
            *module = ModuleSums { quant: module.quant, ..ModuleSums::default() };
        }
        report
    }

    fn row(&self, step: u64, sigma: f64, module: &ModulePlan, sums: &ModuleSums) -> Option<Value> {
        let mut row = Map::new();
        row.insert("step".into(), json!(step));
        row.insert("module".into(), json!(module.name));
        row.insert("index".into(), json!(module.index));
        let about = row.len();
        let candidate = self.plan.aqn_enabled && (module.kind == ModuleKind::Rmsnorm || module.aqn_multiplier > 0.0);
        if candidate || sums.aqn.is_some() {
            let planned = module.aqn_multiplier * sigma;
            let n = sums.aqn.map_or(0, |a| a.n);
            row.insert(
                "aqn".into(),
                json!({
                    "multiplier": module.aqn_multiplier,
                    "planned": planned,
                    "effective": sums.aqn.map_or(0.0, |a| a.sigma_effective),
                    "measured": sums.aqn.map_or(0.0, |a| a.std()),
                    "standard_error": aqn_standard_error(planned, n),
                    "n": n,
                    "output_changed_ratio": ratio(sums.changed, sums.outputs),
                }),
            );
        }
        let recorded = sums.matmul.iter().any(|m| m.calls > 0);
        if module.matmul_error > 0.0 || recorded {
            let mut entry = Map::new();
            entry.insert("planned".into(), json!(module.matmul_error));
            for (i, m) in sums.matmul.iter().enumerate().filter(|(_, m)| m.calls > 0) {
                let planned = self.matmul_planned(module, i);
                entry.insert(
                    SLOT_NAMES[i].into(),
                    json!({
                        "planned": planned,
                        "measured": self.matmul_std(&m.sums),
                        "standard_error": self.matmul_standard_error(planned, &m.sums),
                        "n": m.sums.elements,
                        "calls": m.calls,
                    }),
                );
            }
            row.insert("matmul".into(), Value::Object(entry));
        }
        if module.weight_format.is_some() || sums.quant.is_some() {
            row.insert("quant".into(), QuantSums::json(module.weight_format, sums.quant));
        }
        if module.activation_format.is_some() || sums.activations.iter().any(Option::is_some) {
            let mut entry = Map::new();
            entry.insert("planned".into(), json!(module.activation_format));
            for (phase, (quant, scale)) in sums.activations.iter().enumerate().filter_map(|(i, a)| Some((i, (*a)?))) {
                let mut measured = QuantSums::json(self.activation_planned(module, phase), Some(quant));
                measured["scale"] = json!(scale);
                entry.insert(SLOT_NAMES[phase].into(), measured);
            }
            row.insert("quant_activations".into(), Value::Object(entry));
        }
        (row.len() > about).then_some(Value::Object(row))
    }

    fn summary(&self, sigma: f64) -> Map<String, Value> {
        let mut summary = Map::new();
        if self.plan.aqn_enabled {
            // Divided by its multiplier, every module measures sigma.
            let (mut n, mut sum_sq, mut modules, mut changed, mut outputs) = (0u64, 0.0, 0u64, 0u64, 0u64);
            for (module, sums) in self.plan.modules.iter().zip(&self.modules) {
                let Some(aqn) = sums.aqn.filter(|a| a.sum_sq > 0.0) else {
                    continue;
                };
                modules += 1;
                changed += sums.changed;
                outputs += sums.outputs;
                if module.aqn_multiplier > 0.0 {
                    n += aqn.n;
                    sum_sq += aqn.sum_sq / module.aqn_multiplier.powi(2);
                }
            }
            summary.insert("aqn/sigma".into(), json!(sigma));
            summary.insert("aqn/modules".into(), json!(modules));
            summary.insert("aqn/measured_std".into(), json!((sum_sq / n.max(1) as f64).sqrt()));
            summary.insert(
                "aqn/output_changed_ratio".into(),
                if modules == 0 { json!(0.0) } else { ratio(changed, outputs) },
            );
        }
        if !self.plan.matmul_phases.is_empty() {
            let (mut forward, mut backward) = (MatmulSums::default(), MatmulSums::default());
            for sums in &self.modules {
                for (i, m) in sums.matmul.iter().enumerate() {
                    let total = if i >= DX { &mut backward } else { &mut forward };
                    total.calls += m.calls;
                    total.sums.merge(&m.sums);
                }
            }
            summary.insert("noisy_ops/forward_calls".into(), json!(forward.calls));
            summary.insert("noisy_ops/backward_calls".into(), json!(backward.calls));
            summary.insert("noisy_ops/measured_std_forward".into(), json!(self.matmul_std(&forward.sums)));
            summary.insert("noisy_ops/measured_std_backward".into(), json!(self.matmul_std(&backward.sums)));
        }
        if !self.plan.quant_phases.is_empty() {
            let weights = self.modules.iter().filter_map(|m| m.quant);
            summary.insert("quant/sqnr_db".into(), QuantSums::sqnr_db(weights));
            if self.plan.modules.iter().any(|m| m.activation_format.is_some()) {
                let activations = self.modules.iter().flat_map(|m| m.activations).flatten().map(|(quant, _)| quant);
                summary.insert("quant/activation_sqnr_db".into(), QuantSums::sqnr_db(activations));
            }
        }
        summary
    }

    pub(super) fn matmul_planned(&self, module: &ModulePlan, slot: usize) -> f64 {
        let runs = match module.kind {
            // The reference policy is the base alone.
            ModuleKind::Adapter => slot != InjectPhase::RefLogprobs as usize,
            _ => slot != DW || !self.plan.frozen_base,
        };
        if runs && self.plan.matmul_phases.contains(slot_phase(slot)) { module.matmul_error } else { 0.0 }
    }

    pub(super) fn activation_planned(&self, module: &ModulePlan, phase: usize) -> Option<Format> {
        module.activation_format.filter(|_| self.plan.quant_phases.contains(InjectPhase::ALL[phase]))
    }

    /// Relative for the relative law, else the root mean square of the error itself.
    pub(super) fn matmul_std(&self, sums: &NoiseSums) -> f64 {
        match self.plan.error_law {
            ErrorLaw::RelativeGaussian => sums.relative_std(),
            ErrorLaw::AbsoluteGaussian | ErrorLaw::SystematicBias if sums.elements == 0 => 0.0,
            ErrorLaw::AbsoluteGaussian | ErrorLaw::SystematicBias => (sums.error_sq / sums.elements as f64).sqrt(),
        }
    }

    pub(super) fn matmul_standard_error(&self, planned: f64, sums: &NoiseSums) -> f64 {
        let repeats = (self.repeats as f64).sqrt();
        match self.plan.error_law {
            ErrorLaw::RelativeGaussian => repeats * sums.relative_std_error(planned),
            ErrorLaw::AbsoluteGaussian if sums.elements > 0 => repeats * planned / (2.0 * sums.elements as f64).sqrt(),
            ErrorLaw::AbsoluteGaussian | ErrorLaw::SystematicBias => 0.0,
        }
    }
}

/// planned/sqrt(2(n-1)): standard error of the std of n normals.
pub(super) fn aqn_standard_error(planned: f64, n: u64) -> f64 {
    if n < 2 { planned } else { planned / (2.0 * (n - 1) as f64).sqrt() }
}

/// null where nothing was counted.
fn ratio(part: u64, total: u64) -> Value {
    if total == 0 { Value::Null } else { json!(part as f64 / total as f64) }
}
