//! The gate of an MLP: h = round(gate * sigmoid(gate)), y = round(h * up), each computed in f32 and rounded to the dtype.
//!
//! dup = round(dy * h), dgate = round(round(dy * up) * sigma (1 + gate (1 - sigma))), sigma = sigmoid(gate). Shapes: gate, up, y
//! [tokens, intermediate], f32, bf16 or f16. CPU and GPU differ by their exponential, one or two units of f32's last place.

use tch::Tensor;

use super::autograd::{Backward, attach};
use super::cuda::launch::Executor;
use super::cuda::place::Place;
use super::cuda::swiglu as cuda;
use crate::Result;

/// Differentiable in both.
///
/// # Errors
/// `Runtime` for shapes and dtypes that do not fit.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    match Place::of(gate) {
        None => definition(gate, up),
        Some(place) => on_device(place, gate, up),
    }
}

/// The same by the kernels, on tensors of the executor's device.
///
/// # Errors
/// Those of [`cuda::forward`].
pub fn on_device<E: Executor + Copy + Send + 'static>(executor: E, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (gate_there, up_there) = (gate.detach().f_contiguous()?, up.detach().f_contiguous()?);
    let y = tch::no_grad(|| cuda::forward(&executor, &gate_there, &up_there))?;
    if !gate.requires_grad() && !up.requires_grad() {
        return Ok(y);
    }
    let outputs = attach(&[gate, up], &[&gate_there, &up_there], &[&y], SwigluBackward(executor))?;
    Ok(outputs.into_iter().next().unwrap_or(y))
}

/// The same as a chain of torch's operations.
///
/// # Errors
/// Torch's, for shapes that do not fit.
pub fn definition(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    Ok(gate.f_silu()?.f_mul(up)?)
}

struct SwigluBackward<E>(E);

impl<E: Executor + Send + 'static> Backward for SwigluBackward<E> {
    fn backward(&self, saved: &[Tensor], grads: &[Option<Tensor>], _needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let Some(dy) = &grads[0] else { return Ok(vec![None, None]) };
        let (dgate, dup) = cuda::backward(&self.0, &saved[0], &saved[1], &dy.f_contiguous()?)?;
        Ok(vec![Some(dgate), Some(dup)])
    }
}
