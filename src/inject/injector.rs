//! The plan at work: hands every product its draws and collects what was measured.

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;

use super::measured::{MatmulDirection, Measured, StepInjection};
use super::plan::{InjectionPlan, ModulePlan};
use super::section::{ActivationScale, ApplyTo, DrawMode, DwDraw, InjectPhase};
use crate::numerics::block_format::TensorScale;
use crate::numerics::format::Format;
use crate::numerics::noise_key::{Phase, Purpose, ROUNDED_ACTIVATION, ROUNDED_WEIGHT, row_key, stream};
use crate::numerics::tensor_error::TensorErrorSums;
use crate::ops::fake_quant::StochasticDraw;
use crate::ops::matmul_error::{ErrorDraw, RowKeys, SumsSink};
use crate::ops::noisy_linear::{NoisyLinearCall, ProductError, WeightGradientError};
use crate::{Error, Result};

/// How the input of a linear is quantized in one phase.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ActivationQuant {
    pub format: Format,
    pub scale: TensorScale,
    /// What stochastic rounding draws from, under the rows' token keys.
    pub stream: Option<u32>,
}

pub struct Injector {
    plan: InjectionPlan,
    activation_amax: BTreeMap<u32, f32>,
    sinks: Mutex<HashMap<(u32, MatmulDirection, Phase), SumsSink>>,
    measured: Mutex<Measured>,
}

impl Injector {
    /// Injects `applied` and measures it against `planned`: the same plan, except in tests of the check itself.
    /// `repeats`: how many rows may share one draw (the members of a group share their prompt's).
    pub fn applying(applied: InjectionPlan, planned: InjectionPlan, repeats: u64) -> Injector {
        let measured = Mutex::new(Measured::new(&planned).with_repeats(repeats));
        Injector { plan: applied, activation_amax: BTreeMap::new(), sinks: Mutex::new(HashMap::new()), measured }
    }

    pub fn plan(&self) -> &InjectionPlan {
        &self.plan
    }

    pub fn module(&self, index: u32) -> &ModulePlan {
        &self.plan.modules[index as usize]
    }

    /// Whether this phase computes with AQN's weights.
    pub fn aqn_applies(&self, phase: Phase) -> bool {
        self.plan.aqn_enabled
            && match phase {
                Phase::Rollout => true,
                Phase::OldLogprobs | Phase::Update => self.plan.aqn_apply_to == ApplyTo::RolloutAndUpdate,
                _ => false,
            }
    }

    /// The calibrated tensor amax of module inputs, by module index: what `activation_scale: static` quantizes with.
    pub fn set_activation_amax(&mut self, amax: BTreeMap<u32, f32>) {
        self.activation_amax = amax;
    }

    pub fn activation_amax(&self) -> &BTreeMap<u32, f32> {
        &self.activation_amax
    }

    /// How a module's input is quantized in `phase`; None where it stays as it is.
    pub fn activation(&self, index: u32, phase: Phase) -> Result<Option<ActivationQuant>> {
        let module = self.module(index);
        let Some(format) = module.activation_format.filter(|_| self.quantizes(phase)) else {
            return Ok(None);
        };
        let scale = match (self.plan.needs_activation_amax(module), self.activation_amax.get(&index)) {
            (false, _) => TensorScale::Row,
            (true, Some(&amax)) => TensorScale::Amax(amax),
            (true, None) => {
                return Err(Error::Runtime(format!("{}: its static activation scale was not calibrated", module.name)));
            }
        };
        let stream = match format.rounding.is_stochastic() {
            true => Some(stream(Purpose::StochasticRounding, self.draw_phase(phase), ROUNDED_ACTIVATION, index)?),
            false => None,
        };
        Ok(Some(ActivationQuant { format, scale, stream }))
    }

    /// Whether this phase computes with fake-quantized weights and activations.
    pub fn quantizes(&self, phase: Phase) -> bool {
        self.plan.quant_phases.contains(forward_phase(phase))
    }

    /// The draws of one linear's products in `phase`. `microbatch_draw` numbers dW's draw under `per_microbatch`.
    pub fn linear_call(
        &self,
        index: u32,
        phase: Phase,
        keys: &RowKeys,
        differentiable: bool,
        microbatch_draw: u32,
        out_features: usize,
    ) -> NoisyLinearCall {
        let forward_on = self.plan.matmul_phases.contains(forward_phase(phase));
        let backward_on = differentiable && self.plan.matmul_phases.contains(InjectPhase::Backward);
        let per_microbatch = self.plan.dw_draw == DwDraw::PerMicrobatch;
        let error = |direction, on: bool| self.product_error(index, direction, phase, on);
        NoisyLinearCall {
            keys: keys.clone(),
            differentiable,
            forward: error(MatmulDirection::Forward, forward_on),
            dx: error(MatmulDirection::Dx, backward_on),
            dw: (backward_on && per_microbatch).then(|| WeightGradientError {
                error: error(MatmulDirection::Dw, true),
                keys: out_feature_keys(microbatch_draw, out_features),
            }),
        }
    }

    /// dW's error on the accumulated gradient of one optimizer update (`dw_draw: per_update`), else None.
    pub fn update_gradient_error(&self, index: u32, update: u32, out_features: usize) -> Option<WeightGradientError> {
        let on = self.plan.dw_draw == DwDraw::PerUpdate && self.plan.matmul_phases.contains(InjectPhase::Backward);
        let error = self.product_error(index, MatmulDirection::Dw, Phase::Update, on);
        error.draw.is_some().then(|| WeightGradientError { error, keys: out_feature_keys(update, out_features) })
    }

    /// What the stochastic rounding of a module's weight draws from after `update` optimizer updates; None where its
    /// format draws nothing.
    pub fn weight_rounding(&self, index: u32, update: u32, rows: usize) -> Result<Option<StochasticDraw>> {
        if !self.module(index).weight_format.is_some_and(|format| format.rounding.is_stochastic()) {
            return Ok(None);
        }
        let stream = stream(Purpose::StochasticRounding, Phase::Shared, ROUNDED_WEIGHT, index)?;
        Ok(Some(StochasticDraw { seed: self.plan.seed, stream, keys: out_feature_keys(update, rows) }))
    }

    fn product_error(&self, index: u32, direction: MatmulDirection, phase: Phase, on: bool) -> ProductError {
        let module = self.module(index);
        if !on || module.matmul_error == 0.0 {
            return ProductError::default();
        }
        let (purpose, number) = match direction {
            MatmulDirection::Forward => (Purpose::MatmulForward, 0),
            MatmulDirection::Dx => (Purpose::MatmulDx, 1),
            MatmulDirection::Dw => (Purpose::MatmulDw, 2),
        };
        // Module indices are checked against the field's range when the plan is made.
        let Ok(stream) = stream(purpose, self.draw_phase(phase), number, index) else {
            return ProductError::default();
        };
        let draw =
            ErrorDraw { law: self.plan.error_law, scale: module.matmul_error as f32, seed: self.plan.seed, stream };
        ProductError { draw: Some(draw), sink: self.sink(index, direction, phase) }
    }

    /// Shared draws: rollout, old log-probs and update use one draw; the reference and validation keep their own.
    fn draw_phase(&self, phase: Phase) -> Phase {
        match (self.plan.draw, phase) {
            (DrawMode::Shared, Phase::Rollout | Phase::OldLogprobs | Phase::Update) => Phase::Shared,
            _ => phase,
        }
    }

    /// Validation is measured by nobody: injection.jsonl describes training steps.
    fn sink(&self, index: u32, direction: MatmulDirection, phase: Phase) -> Option<SumsSink> {
        if phase == Phase::Validation {
            return None;
        }
        let mut sinks = self.sinks.lock().unwrap_or_else(|p| p.into_inner());
        Some(sinks.entry((index, direction, phase)).or_default().clone())
    }

    fn measured(&self) -> std::sync::MutexGuard<'_, Measured> {
        self.measured.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// Of w' - w of one module: `n` elements, their sum and sum of squares; `sigma` = multiplier times sigma as used.
    pub fn record_aqn(&self, index: u32, sigma: f64, n: u64, sum: f64, sum_sq: f64) {
        self.measured().record_aqn(index, sigma, n, sum, sum_sq);
    }

    pub fn record_norm_output(&self, index: u32, changed: u64, total: u64) {
        self.measured().record_norm_output(index, changed, total);
    }

    pub fn record_quant(&self, index: u32, format: Format, sums: &TensorErrorSums) {
        self.measured().record_quant(index, format, sums);
    }

    /// Whether the quantization of this module's input is yet to be recorded for `phase` of this step.
    pub fn awaits_activation(&self, index: u32, phase: Phase) -> bool {
        phase != Phase::Validation && self.measured().awaits_activation(index, forward_phase(phase))
    }

    /// What quantizing the input of a module in `phase` did, over some of its rows.
    pub fn record_activation(&self, index: u32, phase: Phase, applied: ActivationQuant, sums: &TensorErrorSums) {
        let scale = match applied.scale {
            TensorScale::Row => ActivationScale::Token,
            _ => ActivationScale::Static,
        };
        self.measured().record_activation(index, forward_phase(phase), applied.format, scale, sums);
    }

    /// The forward products of `phase` ran again, in a CUDA graph.
    pub fn count_replay(&self, phase: Phase) {
        let sinks = self.sinks.lock().unwrap_or_else(|p| p.into_inner());
        let forward =
            sinks.iter().filter(|((_, direction, of), _)| *direction == MatmulDirection::Forward && *of == phase);
        forward.for_each(|(_, sink)| sink.count_replay());
    }

    /// What was measured of products so far stays, whatever [`forget`](Injector::forget) drops.
    pub fn settle(&self) {
        self.sinks.lock().unwrap_or_else(|p| p.into_inner()).values().for_each(SumsSink::settle);
    }

    /// Drops what was measured of products since [`settle`](Injector::settle): that work is done again, with the same draws.
    pub fn forget(&self) {
        self.sinks.lock().unwrap_or_else(|p| p.into_inner()).values().for_each(SumsSink::forget);
    }

    /// Closes a training step: planned against measured, per module.
    pub fn finish_step(&self, step: u64, sigma: f64) -> Result<StepInjection> {
        let mut sinks: Vec<_> = {
            let sinks = self.sinks.lock().unwrap_or_else(|p| p.into_inner());
            sinks.iter().map(|(key, sink)| (*key, sink.clone())).collect()
        };
        sinks.sort_by_key(|((index, direction, phase), _)| (*index, *direction as u8, *phase as u8));
        let taken = SumsSink::take_all(&sinks.iter().map(|(_, sink)| sink.clone()).collect::<Vec<_>>())?;
        let mut measured = self.measured();
        for (((index, direction, phase), _), (calls, sums)) in sinks.into_iter().zip(taken) {
            if calls > 0 {
                let phase = match direction {
                    MatmulDirection::Forward => forward_phase(phase),
                    MatmulDirection::Dx | MatmulDirection::Dw => InjectPhase::Backward,
                };
                measured.record_matmul(index, direction, phase, calls, &sums);
            }
        }
        Ok(measured.finish_step(step, sigma))
    }
}

fn forward_phase(phase: Phase) -> InjectPhase {
    match phase {
        Phase::OldLogprobs => InjectPhase::OldLogprobs,
        Phase::RefLogprobs => InjectPhase::RefLogprobs,
        Phase::Validation => InjectPhase::Validation,
        Phase::Update => InjectPhase::Forward,
        Phase::Rollout | Phase::Shared => InjectPhase::Rollout,
    }
}

fn out_feature_keys(counter: u32, out_features: usize) -> RowKeys {
    RowKeys::consecutive(row_key(counter, 0), out_features)
}
