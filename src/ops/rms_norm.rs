//! Root mean square norm of a residual stream, with the addition before it.
//!
//! s = round(x + delta), or x;  y = round(s / sqrt(mean(s^2) + eps) * w), all in f32, each rounded once to x's dtype.
//! dx = ddelta = ds + (the norm's gradient), dw = sum over tokens of dy * s / sqrt(mean(s^2) + eps).
//!
//! Shapes: x, delta, s, y [tokens, hidden] f32, bf16 or f16; w f32 [hidden], clean or with AQN. A second computation is the
//! first to the bit, gradients too.

use tch::{Kind, Tensor};

use super::autograd::{Backward, attach};
use super::cuda::launch::Executor;
use super::cuda::place::Place;
use super::cuda::rms_norm as cuda;
use crate::Result;

pub struct Normed {
    pub residual: Tensor, // s [tokens, hidden]
    pub y: Tensor,        // [tokens, hidden]
    /// Elements of y that differ from the norm with the clean weight: i64, one number, where it was asked for.
    pub changed: Option<Tensor>,
}

/// Differentiable in x, delta and `weight`. `clean`: count where y differs from the norm with this weight.
///
/// # Errors
/// `Runtime` for shapes and dtypes that do not fit.
pub fn rms_norm(
    x: &Tensor,
    delta: Option<&Tensor>,
    weight: &Tensor,
    clean: Option<&Tensor>,
    eps: f64,
) -> Result<Normed> {
    match Place::of(x) {
        Some(place) if cuda::is_supported(x.size().last().copied().unwrap_or(0)) => {
            on_device(place, x, delta, weight, clean, eps)
        }
        _ => definition(x, delta, weight, clean, eps),
    }
}

/// The same as a chain of torch's operations.
///
/// # Errors
/// Torch's, for shapes that do not fit.
pub fn definition(
    x: &Tensor,
    delta: Option<&Tensor>,
    weight: &Tensor,
    clean: Option<&Tensor>,
    eps: f64,
) -> Result<Normed> {
    let residual = match delta {
        Some(delta) => x.f_add(delta)?,
        None => x.shallow_clone(),
    };
    let wide = residual.f_to_kind(Kind::Float)?;
    let mean_square = wide.f_square()?.f_mean_dim([-1i64].as_slice(), true, Kind::Float)?;
    let normalized = wide.f_mul(&mean_square.f_add_scalar(eps)?.f_rsqrt()?)?;
    let y = normalized.f_mul(weight)?.f_to_kind(x.kind())?;
    let changed = match clean {
        Some(clean) => {
            let clean = normalized.f_mul(clean)?.f_to_kind(x.kind())?;
            Some(y.f_ne_tensor(&clean)?.f_sum(Kind::Int64)?)
        }
        None => None,
    };
    Ok(Normed { residual, y, changed })
}

/// The same by the kernels, on tensors of the executor's device.
///
/// # Errors
/// Those of [`cuda::forward`].
pub fn on_device<E: Executor + Copy + Send + 'static>(
    executor: E,
    x: &Tensor,
    delta: Option<&Tensor>,
    weight: &Tensor,
    clean: Option<&Tensor>,
    eps: f64,
) -> Result<Normed> {
    let made = tch::no_grad(|| -> Result<cuda::Normed> {
        let delta = delta.map(Tensor::f_contiguous).transpose()?;
        let norm = cuda::Norm { x: &x.f_contiguous()?, delta: delta.as_ref(), weight, clean, eps: eps as f32 };
        cuda::forward(&executor, &norm)
    })?;
    let changed = made.changed;
    let inputs: Vec<&Tensor> = [Some(x), delta, Some(weight)].into_iter().flatten().collect();
    let residual = made.residual.unwrap_or_else(|| x.shallow_clone());
    if inputs.iter().all(|input| !input.requires_grad()) {
        return Ok(Normed { residual, y: made.y, changed });
    }
    let operation = RmsNormBackward { executor, eps: eps as f32, has_delta: delta.is_some() };
    let saved = [&residual.detach(), &weight.detach()];
    let outputs: Vec<&Tensor> = if delta.is_some() { vec![&residual, &made.y] } else { vec![&made.y] };
    let mut attached = attach(&inputs, &saved, &outputs, operation)?.into_iter();
    // Torch counts its outputs: there are as many as went in.
    let residual = if delta.is_some() { attached.next().unwrap_or(residual) } else { residual };
    Ok(Normed { residual, y: attached.next().unwrap_or(made.y), changed })
}

struct RmsNormBackward<E> {
    executor: E,
    eps: f32,
    has_delta: bool,
}

impl<E: Executor + Send + 'static> Backward for RmsNormBackward<E> {
    fn backward(&self, saved: &[Tensor], grads: &[Option<Tensor>], needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let (s, weight) = (&saved[0], &saved[1]);
        let contiguous = |grad: &Option<Tensor>| -> Result<Option<Tensor>> {
            Ok(grad.as_ref().map(Tensor::f_contiguous).transpose()?)
        };
        let (ds, dy) = match self.has_delta {
            true => (contiguous(&grads[0])?, contiguous(&grads[1])?),
            false => (None, contiguous(&grads[0])?),
        };
        let (dx, dweight) = match dy {
            Some(dy) => {
                let wants_dweight = needs.last().copied().unwrap_or(false);
                let s = s.f_contiguous()?;
                let back = cuda::NormBackward { s: &s, dy: &dy, ds: ds.as_ref(), weight, eps: self.eps, wants_dweight };
                let gradients = cuda::backward(&self.executor, &back)?;
                (Some(gradients.dx), gradients.dweight)
            }
            None => (ds, None),
        };
        Ok(match self.has_delta {
            true => vec![dx.as_ref().map(Tensor::shallow_clone), dx, dweight],
            false => vec![dx, dweight],
        })
    }
}
