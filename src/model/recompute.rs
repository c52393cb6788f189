//! Gradient checkpointing by blocks (Chen et al. 2016): a differentiable pass keeps what each block reads and nothing inside it;
//! on the way back every block is computed again, for its gradients.
//!
//! Noise is a function of keys, so the second computation is the first to the bit, and so are the gradients. It is measured
//! in the first alone. Memory: [tokens, hidden] for each block, and the inside of one block at a time.

use std::cell::RefCell;

use tch::Tensor;

use super::attention::{Attend, Rotary};
use super::pass::{BlockObserver, Pass};
use super::qwen2::Qwen2;
use crate::Result;
use crate::ops::autograd::run_backward;
use crate::ops::packed_attention::Packing;

/// A pass whose blocks are still to be gone back through.
pub struct Recompute<'a> {
    model: &'a Qwen2,
    ids: Tensor,       // i64 [tokens]
    positions: Tensor, // i64 [tokens]
    packing: Packing,
    pass: Pass<'a>,
    inputs: Vec<Tensor>, // of each block, [tokens, hidden]
    residual: Tensor,    // [tokens, hidden]; a leaf, to which the loss gives its gradient
}

/// Keeps every block's input.
#[derive(Default)]
struct Inputs(RefCell<Vec<Tensor>>);

impl BlockObserver for Inputs {
    fn observe(&self, _layer: usize, x: &Tensor, _y: &Tensor) -> Result<()> {
        self.0.borrow_mut().push(x.shallow_clone());
        Ok(())
    }
}

impl<'a> Recompute<'a> {
    /// The forward pass.
    pub fn forward(
        model: &'a Qwen2,
        ids: Tensor,
        positions: Tensor,
        packing: Packing,
        pass: Pass<'a>,
    ) -> Result<Recompute<'a>> {
        let kept = Inputs::default();
        let residual = {
            let _no_grad = tch::no_grad_guard();
            let attend = Attend::Full { packing: &packing, store: None };
            let keys = pass.keys.clone();
            let first =
                Pass { differentiable: false, to_recompute: true, observer: Some(&kept), ..pass.with_keys(keys) };
            model.residual(&ids, &positions, &attend, &first)?
        };
        let residual = residual.f_detach()?.f_set_requires_grad(true)?;
        Ok(Recompute { model, ids, positions, packing, pass, inputs: kept.0.into_inner(), residual })
    }

    /// The residual stream after the last block; the loss is to be made from it.
    pub fn residual(&self) -> &Tensor {
        &self.residual
    }

    /// Gradients of all parameters from `loss`, last block first.
    pub fn backward(mut self, loss: &Tensor) -> Result<()> {
        run_backward(loss)?;
        let mut gradient = self.residual.f_grad()?;
        let pass = Pass { recomputing: true, ..self.pass.with_keys(self.pass.keys.clone()) };
        let attend = Attend::Full { packing: &self.packing, store: None };
        let rotary = Rotary::new(&self.model.config, &self.positions)?;
        while let Some(x) = self.inputs.pop() {
            let x = x.f_detach()?.f_set_requires_grad(true)?;
            let y = self.model.block(self.inputs.len(), &x, &rotary, &attend, &pass)?;
            give(&y, &gradient)?;
            gradient = x.f_grad()?;
        }
        give(&self.model.embedded(&self.ids, &pass)?, &gradient)
    }
}

/// Backward through what made `y`, with `gradient` as y's: that of sum(y * gradient), to the bit.
fn give(y: &Tensor, gradient: &Tensor) -> Result<()> {
    run_backward(&y.f_mul(gradient)?.f_sum(y.kind())?)
}
