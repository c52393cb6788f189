//! RMSNorm, with Adaptive Quantization Noise on its weight.
//!
//! y = w' * x / sqrt(mean(x^2) + eps): all in f32, one rounding to x's dtype. w' = w + m sigma z in the phases under AQN.

use std::cell::RefCell;

use tch::{Kind, Tensor};

use super::parameter::Parameter;
use super::pass::Pass;
use crate::Result;

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
        let x32 = x.f_to_kind(Kind::Float)?;
        let mean_square = x32.f_square()?.f_mean_dim([-1i64].as_slice(), true, Kind::Float)?;
        let normalized = x32.f_mul(&mean_square.f_add_scalar(self.eps)?.f_rsqrt()?)?;
        let noised = match pass.injector {
            Some(injector) if injector.aqn_applies(pass.phase) => {
                self.aqn_weight.borrow().as_ref().map(Tensor::shallow_clone)
            }
            _ => None,
        };
        let leaf = self.weight.leaf();
        let Some(noised) = noised else {
            return Ok(normalized.f_mul(leaf)?.f_to_kind(x.kind())?);
        };
        // leaf - leaf.detach() is exactly 0 and carries the gradient: the value is w' to the bit.
        let weight = if pass.differentiable { noised.f_add(&leaf.f_sub(&leaf.detach())?)? } else { noised };
        let y = normalized.f_mul(&weight)?.f_to_kind(x.kind())?;
        if pass.measure_norms
            && let Some(injector) = pass.injector
        {
            let clean = normalized.f_mul(self.weight.value())?.f_to_kind(x.kind())?;
            let changed = y.f_ne_tensor(&clean)?.f_sum(Kind::Int64)?;
            injector.record_norm_output(self.index, i64::try_from(changed)? as u64, y.numel() as u64);
        }
        Ok(y)
    }

    /// Sets or removes the noised weight that the phases under AQN use.
    pub fn set_aqn(&self, weight: Option<Tensor>) {
        *self.aqn_weight.borrow_mut() = weight;
    }
}
