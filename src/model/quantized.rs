//! The fake-quantized weights of a model: made once per change of the weights, kept beside them.
//!
//! q/k/v and gate/up of a layer share one nvfp4 tensor amax, as deployment stores them fused, so that what was trained is
//! what is exported. Stochastic rounding draws anew for every optimizer update.

use super::qwen2::{Module, Qwen2};
use crate::Result;
use crate::inject::injector::Injector;
use crate::numerics::block_format::TensorScale;
use crate::numerics::noise_key::Phase;
use crate::ops::fake_quant::{amax, fake_quant, fake_quant_with_errors};

/// Quantizes every planned weight that has no quantized copy yet.
pub fn quantize_weights(model: &Qwen2, injector: &Injector) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    let modules = model.modules();
    let trains = [Phase::Rollout, Phase::OldLogprobs, Phase::Update].iter().any(|&phase| injector.quantizes(phase));
    for (index, module) in &modules {
        let Module::Linear(site, weight) = module else { continue };
        let Some(format) = injector.module(*index).weight_format.filter(|_| !site.is_quantized()) else { continue };
        let siblings = injector.plan().tensor_scale_siblings(*index);
        let scale = if siblings.len() > 1 {
            let mut shared = 0f32;
            for (other, module) in &modules {
                if let (true, Module::Linear(_, weight)) = (siblings.contains(other), module) {
                    shared = shared.max(amax(weight.value(), format)?);
                }
            }
            TensorScale::Amax(shared)
        } else {
            TensorScale::Tensor
        };
        let rows = weight.value().size()[0] as usize;
        let draw = injector.weight_rounding(*index, model.update_number(), rows)?;
        // A frozen model is the reference policy, or one that is only evaluated: no step describes it. Nor does one
        // describe weights that only validation quantizes.
        if weight.master().is_some() && trains {
            let (quantized, sums) = fake_quant_with_errors(weight.value(), format, scale, draw.as_ref())?;
            injector.record_quant(*index, format, &sums);
            site.set_quantized(quantized);
        } else {
            site.set_quantized(fake_quant(weight.value(), format, scale, draw.as_ref())?);
        }
    }
    Ok(())
}
