//! Adaptive Quantization Noise on a model: the noised weights of one training step, and what was measured of them.
//!
//! w' = w + m_l sigma z (norms) or Q(w) + m_l sigma z (linears), a fresh draw per training step that all tokens share.
//! The clean weights are never overwritten: w' lives beside them until [`clear`].

use tch::{Kind, Tensor};

use super::quantized::quantize_weights;
use super::qwen2::{Module, Qwen2};
use crate::Result;
use crate::inject::injector::Injector;
use crate::numerics::noise_key::{Phase, Purpose, row_key, stream};
use crate::ops::matmul_error::RowKeys;
use crate::ops::perturb::perturb;

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
    for (index, module) in model.modules() {
        let scale = (injector.module(index).aqn_multiplier * sigma) as f32;
        if scale == 0.0 {
            continue;
        }
        let stream = stream(Purpose::Aqn, Phase::Rollout, 0, index)?;
        // w f32 [rows, cols] -> w' in `kind`, the dtype that the product reads; measured on what it reads.
        let noised = |w: &Tensor, rows: i64, kind: Kind| -> Result<Tensor> {
            let w = w.f_to_kind(Kind::Float)?;
            let keys = RowKeys::new((0..rows as u32).map(|row| row_key(step, row)).collect());
            let noised = perturb(&w, scale, plan.seed, stream, &keys)?.f_to_kind(kind)?;
            let difference = noised.f_to_kind(Kind::Double)?.f_sub(&w)?;
            let sum = f64::try_from(difference.f_sum(Kind::Double)?)?;
            let sum_sq = f64::try_from(difference.f_square()?.f_sum(Kind::Double)?)?;
            injector.record_aqn(index, f64::from(scale), w.numel() as u64, sum, sum_sq);
            Ok(noised)
        };
        match module {
            Module::Norm(norm) => norm.set_aqn(Some(noised(norm.weight.value(), 1, Kind::Float)?)),
            Module::Linear(site, weight) => {
                let base = if quantizes { site.quantized(weight) } else { weight.value().shallow_clone() };
                let rows = base.size()[0];
                site.set_aqn(Some(noised(&base, rows, model.kind())?));
            }
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
