//! The straight-through estimator: the value of one tensor with the gradient of another, dx = dy.
//!
//! Shapes: x and `value` alike, any dtype; the result is `value` to the bit.

use tch::Tensor;

use super::autograd::{Backward, attach};
use crate::Result;

struct StraightThrough;

impl Backward for StraightThrough {
    fn backward(&self, _saved: &[Tensor], grads: &[Option<Tensor>], _needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![grads[0].as_ref().map(Tensor::shallow_clone)])
    }
}

/// `value` (made from x without gradient) as a differentiable function of x whose derivative is 1.
pub fn straight_through(x: &Tensor, value: Tensor) -> Result<Tensor> {
    if !x.requires_grad() {
        return Ok(value);
    }
    let outputs = attach(&[x], &[], &[&value], StraightThrough)?;
    Ok(outputs.into_iter().next().unwrap_or(value))
}
