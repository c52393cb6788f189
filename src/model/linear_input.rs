//! What a linear reads under the plan: x, or Q(x) where activations are quantized.
//!
//! The gradient is straight-through: dX = dY Q(W) reaches x as if there were no rounding, dW = dY^T Q(x) reads what the
//! product read. With a scale per token, a row of Q(x) depends on that row alone.

use std::cell::RefCell;

use tch::Tensor;

use super::pass::Pass;
use crate::Result;
use crate::inject::injector::ActivationQuant;
use crate::ops::fake_quant::{StochasticDraw, error_sums, fake_quant};
use crate::ops::straight_through::straight_through;

/// Rows of an input whose quantization is measured: enough for its error, and cheap.
const MEASURED_ROWS: i64 = 64;

/// The input of one linear, or of several that read the same.
pub struct LinearInput<'a> {
    x: &'a Tensor, // [tokens, in]
    /// The newest Q(x) and how it was made: q, k, v ask for the same, and so do gate and up.
    quantized: RefCell<Option<(ActivationQuant, Tensor)>>,
}

impl<'a> LinearInput<'a> {
    pub fn new(x: &'a Tensor) -> LinearInput<'a> {
        LinearInput { x, quantized: RefCell::new(None) }
    }

    pub fn x(&self) -> &Tensor {
        self.x
    }

    /// What the product of module `index` reads in this pass: [tokens, in] in x's dtype.
    pub fn read(&self, index: u32, pass: &Pass) -> Result<Tensor> {
        if let Some(calibration) = pass.calibration {
            calibration.observe(index, self.x)?;
        }
        let Some(injector) = pass.injector.filter(|_| pass.fake_quant) else {
            return Ok(self.x.shallow_clone());
        };
        let Some(how) = injector.activation(index, pass.phase)? else {
            return Ok(self.x.shallow_clone());
        };
        let mut newest = self.quantized.borrow_mut();
        let quantized = match &*newest {
            Some((made, quantized)) if *made == how => quantized.shallow_clone(),
            _ => {
                let seed = injector.plan().seed;
                let draw = how.stream.map(|stream| StochasticDraw { seed, stream, keys: pass.keys.clone() });
                let value = fake_quant(&self.x.detach().f_contiguous()?, how.format, how.scale, draw.as_ref())?;
                let quantized = straight_through(self.x, value)?;
                *newest = Some((how, quantized.shallow_clone()));
                quantized
            }
        };
        if injector.awaits_activation(index, pass.phase) {
            let rows = quantized.size()[0].min(MEASURED_ROWS);
            let first = |t: &Tensor| -> Result<Tensor> { Ok(t.detach().f_narrow(0, 0, rows)?) };
            injector.record_activation(index, pass.phase, how, &error_sums(&first(self.x)?, &first(&quantized)?)?);
        }
        Ok(quantized)
    }
}
