//! Whether what was measured is what was planned; a disagreement is one line of text.
//!
//! AQN is pooled over modules of equal planned multiplier and held within 5 standard errors; exactly 0
//! where 0 is planned, not 0 where it is not. Matmul noise is held within max(5 standard errors, 2 %) for
//! each module, phase and direction. Quantization must have happened where it is planned, to the planned format.

use std::collections::BTreeMap;

use super::measured::{AqnSums, DW, DX, Measured, SLOT_NAMES, SLOTS, aqn_standard_error};
use super::plan::ModuleKind;
use super::section::InjectPhase;
use crate::numerics::error_law::ErrorLaw;

const LIMIT_STANDARD_ERRORS: f64 = 5.0;
/// f32 rounding of w + m*sigma*z; matters only where there are very many elements.
const AQN_TOLERANCE: f64 = 1e-3;
pub(crate) const MATMUL_TOLERANCE: f64 = 0.02;
/// The measured error is that of rounded outputs: in bf16 the two roundings add about this much, in quadrature.
const BF16_ROUNDING: f64 = 0.0025;
/// w' of a linear is rounded to the product's dtype, which in bf16 adds a few per cent at small sigma.
const LINEAR_AQN_UPPER_TOLERANCE: f64 = 0.06;
/// Where a bias is added before the rounding (q, k, v), the rounding error belongs to y + b and can be
/// large against y; the measured error may then be above the planned one, never below.
const BIASED_UPPER_TOLERANCE: f64 = 1.0;

impl Measured {
    /// Every disagreement of a step whose rollout used `sigma`.
    pub(super) fn disagreements(&self, sigma: f64) -> Vec<String> {
        let mut out = Vec::new();
        self.check_aqn(sigma, &mut out);
        self.check_matmul(&mut out);
        self.check_matmul_elements(&mut out);
        self.check_quant(&mut out);
        self.check_activations(&mut out);
        out
    }

    fn check_aqn(&self, sigma: f64, out: &mut Vec<String>) {
        // By planned multiplier (its bits: equal means equal): modules pooled.
        let mut pools: BTreeMap<(u64, ModuleKind), AqnSums> = BTreeMap::new();
        for (module, sums) in self.plan.modules.iter().zip(&self.modules) {
            let (name, planned) = (&module.name, module.aqn_multiplier * sigma);
            let touched = sums.aqn.filter(|a| a.sum_sq != 0.0 || a.sigma_effective != 0.0);
            match (planned == 0.0, touched) {
                (true, None) => {
                    if sums.changed > 0 {
                        out.push(format!(
                            "aqn: {name}: planned 0, but {} of {} outputs changed",
                            sums.changed, sums.outputs
                        ));
                    }
                }
                (true, Some(aqn)) => out.push(format!("aqn: {name}: planned 0, measured {:.3e}", aqn.std())),
                (false, None) => {
                    out.push(format!("aqn: {name}: planned {planned:.3e}, measured 0: nothing was injected"))
                }
                (false, Some(aqn)) => {
                    if (aqn.sigma_effective / planned - 1.0).abs() > 1e-5 {
                        out.push(format!("aqn: {name}: planned {planned:.3e}, applied {:.3e}", aqn.sigma_effective));
                    }
                    // Even in bf16 about 100*sigma of the outputs change; none of very many is a defect.
                    if sums.changed == 0 && sums.outputs as f64 * planned >= 1.0 {
                        out.push(format!(
                            "aqn: {name}: planned {planned:.3e}, but none of {} outputs changed",
                            sums.outputs
                        ));
                    }
                    let zero = AqnSums { sigma_effective: 0.0, n: 0, sum: 0.0, sum_sq: 0.0 };
                    let pool = pools.entry((module.aqn_multiplier.to_bits(), module.kind)).or_insert(zero);
                    pool.n += aqn.n;
                    pool.sum += aqn.sum;
                    pool.sum_sq += aqn.sum_sq;
                }
            }
        }
        for ((bits, kind), pool) in pools {
            let multiplier = f64::from_bits(bits);
            let planned = multiplier * sigma;
            let (measured, error) = (pool.std(), aqn_standard_error(planned, pool.n));
            let tolerance = (LIMIT_STANDARD_ERRORS * error).max(AQN_TOLERANCE * planned);
            // A NaN agrees with nothing.
            let above = match kind {
                ModuleKind::Linear => tolerance.max(LINEAR_AQN_UPPER_TOLERANCE * planned),
                _ => tolerance,
            };
            let agrees = measured >= planned - tolerance && measured <= planned + above;
            if !agrees {
                out.push(format!(
                    "aqn: modules with multiplier {multiplier}: planned sigma {planned:.4e}, measured {measured:.4e} +- {error:.1e} over {} elements",
                    pool.n
                ));
            }
        }
    }

    fn check_matmul(&self, out: &mut Vec<String>) {
        let anywhere: Vec<bool> = (0..SLOTS).map(|i| self.modules.iter().any(|m| m.matmul[i].calls > 0)).collect();
        // Validation is measured by nobody.
        let training = self.plan.matmul_phases.without(InjectPhase::Validation);
        let planned_anywhere = self.plan.modules.iter().any(|m| m.matmul_error > 0.0) && !training.is_empty();
        if planned_anywhere && !anywhere.contains(&true) {
            out.push("noisy_ops: noise is planned, but no noisy product ran".to_string());
            return;
        }
        let missing =
            |slot: usize| !anywhere[slot] && self.plan.modules.iter().any(|m| self.matmul_planned(m, slot) > 0.0);
        if anywhere[InjectPhase::Forward as usize] && (missing(DX) || missing(DW)) {
            out.push("noisy_ops: backward noise is planned, but a backward product ran without it".to_string());
        }
        for (module, sums) in self.plan.modules.iter().zip(&self.modules) {
            for (i, m) in sums.matmul.iter().enumerate() {
                let (name, kind, planned) = (&module.name, SLOT_NAMES[i], self.matmul_planned(module, i));
                let measured = self.matmul_std(&m.sums);
                if planned == 0.0 {
                    if m.sums.error_sq != 0.0 {
                        out.push(format!("noisy_ops: {name} ({kind}): planned 0, measured {measured:.4e}"));
                    }
                    continue;
                }
                if m.calls == 0 {
                    if anywhere[i] {
                        out.push(format!("noisy_ops: {name} ({kind}): planned {planned}, but no noisy product ran"));
                    }
                    continue;
                }
                if m.sums.elements == 0 {
                    let calls = m.calls;
                    out.push(format!(
                        "noisy_ops: {name} ({kind}): planned {planned}, but {calls} products were not measured"
                    ));
                    continue;
                }
                // A product that is 0 everywhere (no gradient) has no relative error.
                if m.sums.clean_sq == 0.0 {
                    continue;
                }
                let error = self.matmul_standard_error(planned, &m.sums);
                let tolerance = (LIMIT_STANDARD_ERRORS * error).max(MATMUL_TOLERANCE * planned);
                let biased = i < DX && ["q_proj", "k_proj", "v_proj"].iter().any(|p| name.ends_with(p));
                let rounded = (planned * planned + BF16_ROUNDING * BF16_ROUNDING).sqrt() - planned;
                let tolerance_above = tolerance + rounded;
                let above =
                    if biased { tolerance_above.max(BIASED_UPPER_TOLERANCE * planned) } else { tolerance_above };
                let agrees = match self.plan.error_law {
                    ErrorLaw::RelativeGaussian => measured >= planned - tolerance && measured <= planned + above,
                    // Absolute errors can drown in the rounding of large outputs: only their absence is certain.
                    ErrorLaw::AbsoluteGaussian | ErrorLaw::SystematicBias => measured > 0.0,
                };
                if !agrees {
                    out.push(format!(
                        "noisy_ops: {name} ({kind}): planned {planned}, measured {measured:.5} +- {error:.1e} over {} elements",
                        m.sums.elements
                    ));
                }
            }
        }
    }

    /// Every layer sees the same tokens. What a product did not measure, or another's sums, has the planned spread too.
    fn check_matmul_elements(&self, out: &mut Vec<String>) {
        let mut first: BTreeMap<(usize, &str), (&str, u64)> = BTreeMap::new();
        for (module, sums) in self.plan.modules.iter().zip(&self.modules) {
            let Some(layer) = module.layer else { continue };
            let of_every_layer = module.name.trim_start_matches(&format!("model.layers.{layer}."));
            for (i, m) in sums.matmul.iter().enumerate().filter(|(_, m)| m.sums.elements > 0) {
                let (name, elements) = (module.name.as_str(), m.sums.elements);
                let (other, expected) = *first.entry((i, of_every_layer)).or_insert((name, elements));
                if elements != expected {
                    let kind = SLOT_NAMES[i];
                    out.push(format!(
                        "noisy_ops: {name} ({kind}): {elements} elements measured, but {expected} of {other}"
                    ));
                }
            }
        }
    }

    fn check_quant(&self, out: &mut Vec<String>) {
        if self.plan.quant_phases.is_empty() && self.modules.iter().all(|m| m.quant.is_none()) {
            return;
        }
        let policy = [InjectPhase::Rollout, InjectPhase::OldLogprobs, InjectPhase::Forward];
        let in_training = policy.into_iter().any(|phase| self.plan.quant_phases.contains(phase));
        for (module, sums) in self.plan.modules.iter().zip(&self.modules) {
            let name = &module.name;
            match (module.weight_format, &sums.quant) {
                (Some(format), None) if in_training => {
                    out.push(format!("fake_quant: {name}: planned {format}, but it was not quantized"))
                }
                (Some(format), Some(q)) if q.format != format => {
                    out.push(format!("fake_quant: {name}: planned {format}, but it was quantized to {}", q.format))
                }
                (Some(format), Some(q)) if q.sums.error_sq == 0.0 && q.sums.x_sq > 0.0 => {
                    out.push(format!("fake_quant: {name}: planned {format}, but the weight did not change"));
                }
                (None, Some(q)) if q.sums.error_sq > 0.0 => {
                    out.push(format!("fake_quant: {name}: planned none, but it was quantized"))
                }
                _ => {}
            }
        }
    }

    fn check_activations(&self, out: &mut Vec<String>) {
        // Every training step has these; the reference policy only where the loss has a KL term.
        const ALWAYS: [InjectPhase; 3] = [InjectPhase::Rollout, InjectPhase::OldLogprobs, InjectPhase::Forward];
        for phase in [ALWAYS.as_slice(), &[InjectPhase::RefLogprobs]].concat() {
            let i = phase as usize;
            let ran = ALWAYS.contains(&phase) || self.modules.iter().any(|m| m.activations[i].is_some());
            for (module, sums) in self.plan.modules.iter().zip(&self.modules) {
                let (name, phase) = (&module.name, SLOT_NAMES[i]);
                let mut say = |text: String| out.push(format!("fake_quant: input of {name} ({phase}): {text}"));
                match (self.activation_planned(module, i), &sums.activations[i]) {
                    (Some(format), None) if ran => say(format!("planned {format}, but it was not quantized")),
                    (Some(format), Some((q, _))) if q.format != format => {
                        say(format!("planned {format}, but it was quantized to {}", q.format))
                    }
                    (Some(format), Some((_, scale)))
                        if format.has_tensor_scale() && *scale != self.plan.activation_scale =>
                    {
                        say(format!("planned scale {}, applied {}", self.plan.activation_scale.name(), scale.name()))
                    }
                    (Some(format), Some((q, _))) if q.sums.error_sq == 0.0 && q.sums.x_sq > 0.0 => {
                        say(format!("planned {format}, but it did not change"))
                    }
                    (None, Some((q, _))) => say(format!("planned none, but it was quantized to {}", q.format)),
                    _ => {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
