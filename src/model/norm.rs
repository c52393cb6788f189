//! RMSNorm, with Adaptive Quantization Noise on its weight.
//!
//! The product of ops/rms_norm.rs with w' = w + m sigma z in the phases under AQN, with w in the others.

use std::cell::RefCell;

use tch::Tensor;

use super::parameter::Parameter;
use super::pass::Pass;
use crate::Result;
use crate::ops::rms_norm::{Normed, rms_norm};

pub struct RmsNorm {
    pub index: u32,        // position in the model's module list
    pub weight: Parameter, // [hidden] f32
    eps: f64,
    aqn_weight: RefCell<Option<Tensor>>,
}

impl RmsNorm {
    pub fn new(index: u32, weight: Parameter, eps: f64) -> RmsNorm {
        RmsNorm { index, weight, eps, aqn_weight: RefCell::new(None) }
    }

    /// x [tokens, hidden] -> [tokens, hidden].
    pub fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        Ok(self.normed(x, None, pass)?.y)
    }

    /// x, delta [tokens, hidden] -> x + delta, or x, and its norm.
    pub fn forward_after(&self, x: &Tensor, delta: Option<&Tensor>, pass: &Pass) -> Result<(Tensor, Tensor)> {
        let Normed { residual, y, .. } = self.normed(x, delta, pass)?;
        Ok((residual, y))
    }

    fn normed(&self, x: &Tensor, delta: Option<&Tensor>, pass: &Pass) -> Result<Normed> {
        let noised = match pass.injector {
            Some(injector) if injector.aqn_applies(pass.phase) => {
                self.aqn_weight.borrow().as_ref().map(Tensor::shallow_clone)
            }
            _ => None,
        };
        let leaf = if pass.differentiable { self.weight.leaf() } else { self.weight.value() };
        let Some(noised) = noised else {
            return rms_norm(x, delta, leaf, None, self.eps);
        };
        // leaf - leaf.detach() is exactly 0 and carries the gradient: the value is w' to the bit.
        let weight = if pass.differentiable { noised.f_add(&leaf.f_sub(&leaf.detach())?)? } else { noised };
        let measuring = pass.injector.filter(|_| pass.measure_norms);
        let normed = rms_norm(x, delta, &weight, measuring.map(|_| self.weight.value()), self.eps)?;
        if let (Some(injector), Some(changed)) = (measuring, &normed.changed) {
            injector.record_norm_output(self.index, i64::try_from(changed)? as u64, normed.y.numel() as u64);
        }
        Ok(normed)
    }

    /// Sets or removes the noised weight that the phases under AQN use.
    pub fn set_aqn(&self, weight: Option<Tensor>) {
        *self.aqn_weight.borrow_mut() = weight;
    }
}
