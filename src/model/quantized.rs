//! The fake-quantized weights of a model: made once per change of the weights, kept beside them.
//!
//! q/k/v and gate/up of a layer share one nvfp4 tensor amax, as deployment stores them fused, so that what was trained is
//! what is exported. Stochastic rounding draws anew for every optimizer update.

use tch::Kind;

use super::linear::Site;
use super::qwen2::{Module, Qwen2};
use crate::Result;
use crate::inject::injector::Injector;
use crate::numerics::format::Format;
use crate::numerics::noise_key::Phase;
use crate::ops::cuda::fake_quant::{Matrix, MatrixScale};
use crate::ops::cuda::launch::Executor;
use crate::ops::cuda::matmul::{PACKED_K, PackedWeight};
use crate::ops::cuda::place::Place;
use crate::ops::fake_quant::{Weight, fake_quant_weights};

/// Quantizes every planned weight that has no quantized copy yet.
pub fn quantize_weights(model: &Qwen2, injector: &Injector) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    let modules = model.modules();
    let trains = [Phase::Rollout, Phase::OldLogprobs, Phase::Update].iter().any(|&phase| injector.quantizes(phase));
    let mut batches: Vec<Batch> = Vec::new();
    // A frozen model is the reference policy, or one that is only evaluated: no step describes it. Nor does one describe
    // weights that only validation quantizes.
    let described = trains && model.parameters().iter().any(|parameter| parameter.master().is_some());
    for (index, module) in &modules {
        let Module::Linear(site, weight) = module else { continue };
        let Some(format) = injector.module(*index).weight_format.filter(|_| !site.is_quantized()) else { continue };
        let x = weight.value();
        let draw = injector.weight_rounding(*index, model.update_number(), x.size()[0] as usize)?;
        let siblings = injector.plan().tensor_scale_siblings(*index);
        let scale_group = siblings.first().copied().unwrap_or(*index) as usize;
        let weight = Weight { x, scale_group, draw };
        match batches.iter_mut().find(|batch| batch.format == format) {
            Some(batch) => {
                batch.sites.push((*index, site));
                batch.weights.push(weight);
            }
            None => batches.push(Batch { format, sites: vec![(*index, site)], weights: vec![weight] }),
        }
    }
    for Batch { format, sites, weights } in batches {
        for ((index, site), (quantized, sums)) in
            sites.iter().copied().zip(fake_quant_weights(&weights, format, described)?)
        {
            if let Some(sums) = sums {
                injector.record_quant(index, format, &sums);
            }
            site.set_quantized(quantized);
        }
        if let (Some(place), Kind::BFloat16) = (Place::of(model.head_weight().value()), model.kind()) {
            pack(&place, format, &sites, &weights)?;
        }
    }
    Ok(())
}

/// The same weights as codes, for products over few rows: those that such a product can read.
fn pack(executor: &dyn Executor, format: Format, sites: &[(u32, &Site)], weights: &[Weight]) -> Result<()> {
    if PackedWeight::layout_of(format).is_none() {
        return Ok(());
    }
    let matrices: Vec<Matrix> = weights
        .iter()
        .map(|weight| Matrix { x: weight.x, scale: MatrixScale::Group(weight.scale_group), draw: None })
        .collect();
    for ((_, site), packed) in sites.iter().zip(PackedWeight::quantize_all(executor, &matrices, format)?) {
        if 2 * packed.codes.size()[1] % PACKED_K == 0 {
            site.set_packed(packed);
        }
    }
    Ok(())
}

/// Weights of one format.
struct Batch<'a> {
    format: Format,
    sites: Vec<(u32, &'a Site)>, // with their module indices
    weights: Vec<Weight<'a>>,
}
