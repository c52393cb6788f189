//! Rows of the embedding table; the gradient is added to the table's own f32 buffer (shared with a tied lm_head).
//!
//! y[t] = W[id[t]]; dW[id[t]] += dy[t] in f32. Shapes: ids i64 [tokens], W [vocab, hidden], y [tokens, hidden].

use tch::{Kind, Tensor};

use super::autograd::{Backward, attach};
use crate::Result;

struct EmbeddingBackward {
    gradient: Tensor, // f32 [vocab, hidden]
}

impl Backward for EmbeddingBackward {
    fn backward(&self, saved: &[Tensor], grads: &[Option<Tensor>], _needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        if let Some(dy) = &grads[0] {
            let dy = dy.f_to_kind(Kind::Float)?;
            let _ = self.gradient.shallow_clone().f_index_add_(0, &saved[0], &dy)?;
        }
        Ok(vec![None])
    }
}

/// `anchor`: the table's f32 master (a leaf) and its gradient buffer; None for a frozen table.
pub fn embedding(
    ids: &Tensor,
    weight: &Tensor,
    anchor: Option<(&Tensor, &Tensor)>,
    differentiable: bool,
) -> Result<Tensor> {
    let out = tch::no_grad(|| weight.f_index_select(0, ids))?;
    match anchor {
        Some((master, gradient)) if differentiable => {
            let operation = EmbeddingBackward { gradient: gradient.shallow_clone() };
            let outputs = attach(&[master], &[ids], &[&out], operation)?;
            Ok(outputs.into_iter().next().unwrap_or(out))
        }
        _ => Ok(out),
    }
}
