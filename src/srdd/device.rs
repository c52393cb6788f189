//! A model's layers on some arithmetic: the clean model, the model under an injection plan, and either with a planted fault. What a
//! search for faults may run.

use tch::Tensor;

use super::planted::Planted;
use super::prompts::Laid;
use crate::Result;
use crate::inject::injector::Injector;
use crate::model::pass::Pass;
use crate::model::quantized::quantize_weights;
use crate::model::qwen2::Qwen2;
use crate::numerics::noise_key::Phase;

#[derive(Clone, Copy)]
pub struct Device<'a> {
    pub model: &'a Qwen2,
    /// None: exact arithmetic.
    injector: Option<&'a Injector>,
    planted: Option<Planted>,
}

impl<'a> Device<'a> {
    /// # Errors
    /// What libtorch answers while the plan's weights are quantized.
    pub fn new(model: &'a Qwen2, injector: Option<&'a Injector>, planted: Option<Planted>) -> Result<Device<'a>> {
        if let Some(injector) = injector.filter(|injector| injector.quantizes(Phase::Validation)) {
            quantize_weights(model, injector)?;
        }
        Ok(Device { model, injector, planted })
    }

    /// Layer `layer`'s output [tokens, hidden] for the input x; `run` numbers the executions, of which each has noise of its own.
    pub fn block(&self, layer: usize, x: &Tensor, laid: &Laid, run: u32) -> Result<Tensor> {
        let keys = laid.keys(run)?;
        let pass = match self.injector {
            Some(injector) => Pass::injected(injector, Phase::Validation, keys),
            None => Pass::clean(keys),
        };
        let y = self.model.block(layer, x, &laid.rotary, &laid.attend(), &pass)?;
        match &self.planted {
            Some(planted) if planted.layer == layer => planted.apply(&y, laid.execution(run)),
            _ => Ok(y),
        }
    }

    /// What every layer reads as the model runs from its embedding, then what the last one gives: layers + 1 of [tokens, hidden].
    pub fn residuals(&self, laid: &Laid, run: u32) -> Result<Vec<Tensor>> {
        let mut all = vec![self.model.embedded(&laid.ids, &Pass::clean(laid.keys(run)?))?];
        for layer in 0..self.model.blocks.len() {
            let next = self.block(layer, &all[layer], laid, run)?;
            all.push(next);
        }
        Ok(all)
    }
}
