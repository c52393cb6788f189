//! Rotary position embedding: the halves (a, b) of every head of q and k become (a cos - b sin, b cos + a sin).
//!
//! In f32, one rounding to the dtype of q and k; the gradient is the rotation by the negative angle. Shapes: q [tokens, heads,
//! dim], k [tokens, kv_heads, dim] f32, bf16 or f16; cos and sin f32 [tokens, 1, dim], without gradient. A decode step's keys go
//! into the cache in the same launch, its values with them.

use tch::{Kind, Tensor};

use super::autograd::{Backward, attach};
use super::cuda::launch::Executor;
use super::cuda::place::Place;
pub use super::cuda::rotary::Append;
use super::cuda::rotary::{Rotation, rotate, rotate_and_append};
use crate::Result;

/// The rotated (q, k), differentiable in both.
///
/// # Errors
/// `Runtime` for shapes and dtypes that do not fit.
pub fn rotary(q: &Tensor, k: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<(Tensor, Tensor)> {
    match Place::of(q) {
        None => Ok((definition(q, cos, sin)?, definition(k, cos, sin)?)),
        Some(place) => on_device(place, q, k, cos, sin),
    }
}

/// The same by the kernels, on tensors of the executor's device.
///
/// # Errors
/// Those of [`rotate`].
pub fn on_device<E: Executor + Copy + Send + 'static>(
    executor: E,
    q: &Tensor,
    k: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (rotated_q, rotated_k) = tch::no_grad(|| -> Result<(Tensor, Tensor)> {
        rotate(&executor, &Rotation { q: &q.f_contiguous()?, k: &k.f_contiguous()?, cos, sin, is_back: false })
    })?;
    if !q.requires_grad() && !k.requires_grad() {
        return Ok((rotated_q, rotated_k));
    }
    let mut attached = attach(&[q, k], &[cos, sin], &[&rotated_q, &rotated_k], RotaryBackward(executor))?.into_iter();
    // Torch counts its outputs: there are as many as went in.
    Ok((attached.next().unwrap_or(rotated_q), attached.next().unwrap_or(rotated_k)))
}

/// The rotated q of a decode step; the rotated k and v are in the cache then. No gradient.
///
/// # Errors
/// As [`rotary`]; on a CPU for a position past the capacity too.
pub fn rotary_and_append(q: &Tensor, k: &Tensor, cos: &Tensor, sin: &Tensor, append: &Append) -> Result<Tensor> {
    let Some(place) = Place::of(q) else {
        let rows = Tensor::f_arange(k.size()[0], (Kind::Int64, q.device()))?;
        let index = [Some(&rows), None, Some(append.positions)];
        let _ = append.keys.shallow_clone().f_index_put_(&index, &definition(k, cos, sin)?, false)?;
        let _ = append.values.shallow_clone().f_index_put_(&index, append.v, false)?;
        return definition(q, cos, sin);
    };
    let (q, k, v) = (q.f_contiguous()?, k.f_contiguous()?, append.v.f_contiguous()?);
    let rotation = Rotation { q: &q, k: &k, cos, sin, is_back: false };
    rotate_and_append(&place, &rotation, &Append { v: &v, ..*append })
}

/// The same of x, q or k, as a chain of torch's operations.
///
/// # Errors
/// Torch's, for shapes that do not fit.
pub fn definition(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let wide = x.f_to_kind(Kind::Float)?;
    let halves = wide.f_chunk(2, -1)?;
    let turned = Tensor::f_cat(&[&halves[1].f_neg()?, &halves[0]], -1)?;
    let y = wide.f_mul(cos)?.f_add(&turned.f_mul(sin)?)?;
    Ok(y.f_to_kind(x.kind())?)
}

struct RotaryBackward<E>(E);

impl<E: Executor + Send + 'static> Backward for RotaryBackward<E> {
    fn backward(&self, saved: &[Tensor], grads: &[Option<Tensor>], _needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let [cos, sin] = saved else { return Ok(vec![None, None]) };
        let (Some(q), Some(k)) = (&grads[0], &grads[1]) else {
            // Keys without queries, or the reverse: not in attention, but right all the same.
            let alone = |grad: &Option<Tensor>| grad.as_ref().map(|g| definition(g, cos, &sin.f_neg()?)).transpose();
            return Ok(vec![alone(&grads[0])?, alone(&grads[1])?]);
        };
        let (q, k) = (q.f_contiguous()?, k.f_contiguous()?);
        let (dq, dk) = rotate(&self.0, &Rotation { q: &q, k: &k, cos, sin, is_back: true })?;
        Ok(vec![Some(dq), Some(dk)])
    }
}
