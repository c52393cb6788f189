//! Adaptive Quantization Noise on a model: the noised weights of one training step, and what was measured of them.
//!
//! w' = w + m_l sigma z (norms) or Q(w) + m_l sigma z (linears), a fresh draw per training step that all tokens share.
//! The clean weights are never overwritten: w' lives beside them until [`clear`].

use tch::Kind;

use super::quantized::quantize_weights;
use super::qwen2::{Module, Qwen2};
use crate::Result;
use crate::inject::injector::Injector;
use crate::numerics::noise_key::{Phase, Purpose, row_key, stream};
use crate::ops::matmul_error::RowKeys;
use crate::ops::perturb::{Perturbation, perturb};

/// Gives every planned module its w' for `step`; with sigma 0 or multiplier 0 a module stays alone.
pub fn apply(model: &Qwen2, injector: &Injector, step: u32, sigma: f64) -> Result<()> {
    clear(model);
    let plan = injector.plan();
    if !plan.aqn_enabled {
        return Ok(());
    }
    let _no_grad = tch::no_grad_guard();
    let quantizes = injector.quantizes(Phase::Rollout);
    if quantizes {
        quantize_weights(model, injector)?;
    }
    let modules = model.modules();
    let mut noised = Vec::new();
    for (index, module) in &modules {
        let scale = (injector.module(*index).aqn_multiplier * sigma) as f32;
        if scale == 0.0 {
            continue;
        }
        // A norm's w' stays f32, a linear's is in the dtype that the product reads.
        let weight = match module {
            Module::Norm(norm) => norm.weight.value().f_to_kind(Kind::Float)?,
            Module::Linear(site, weight) if quantizes => site.quantized(weight),
            Module::Linear(_, weight) => weight.value().shallow_clone(),
        };
        let rows = if matches!(module, Module::Norm(_)) { 1 } else { weight.size()[0] as usize };
        let keys = RowKeys::consecutive(row_key(step, 0), rows);
        let stream = stream(Purpose::Aqn, Phase::Rollout, 0, *index)?;
        noised.push((*index, module, Perturbation { weight, scale, stream, keys }));
    }
    let (places, weights): (Vec<_>, Vec<_>) =
        noised.into_iter().map(|(i, module, w)| ((i, module, w.scale), w)).unzip();
    for ((index, module, scale), made) in places.into_iter().zip(perturb(&weights, plan.seed)?) {
        injector.record_aqn(index, f64::from(scale), made.elements, made.sum, made.sum_sq);
        match module {
            Module::Norm(norm) => norm.set_aqn(Some(made.weight)),
            Module::Linear(site, _) => site.set_aqn(Some(made.weight)),
        }
    }
    Ok(())
}

/// Back to the clean weights.
pub fn clear(model: &Qwen2) {
    for (_, module) in model.modules() {
        match module {
            Module::Norm(norm) => norm.set_aqn(None),
            Module::Linear(site, _) => site.set_aqn(None),
        }
    }
}
