//! What a forward pass needs to know besides its input: which phase it is, what is injected, whose rows it computes.

use tch::Tensor;

use super::calibration::Calibration;
use crate::Result;
use crate::inject::injector::Injector;
use crate::numerics::noise_key::{Phase, token_key};
use crate::ops::matmul_error::RowKeys;

/// Sees the residual stream on its way.
pub trait BlockObserver {
    /// x, y [tokens, hidden]: what block `layer` read and gave.
    fn observe(&self, layer: usize, x: &Tensor, y: &Tensor) -> Result<()>;
}

/// One forward pass over flattened rows (no padding): row r is the token with key `keys[r]`.
pub struct Pass<'a> {
    pub injector: Option<&'a Injector>,
    pub phase: Phase,
    pub matmul_error: bool,
    pub fake_quant: bool,
    /// A backward pass will follow.
    pub differentiable: bool,
    /// The same rows will go through again, for their gradients, and shall have the same bits then.
    pub to_recompute: bool,
    /// The same rows went through before and were measured then: measure nothing.
    pub recomputing: bool,
    /// Number of the dW draw under `dw_draw: per_microbatch`.
    pub microbatch_draw: u32,
    /// Compare every noised norm's output with its clean one (doubles the norms' cost).
    pub measure_norms: bool,
    /// Told of every linear's input.
    pub calibration: Option<&'a Calibration<'a>>,
    /// Told of every block's input and output.
    pub observer: Option<&'a dyn BlockObserver>,
    pub keys: RowKeys, // [rows]
}

impl<'a> Pass<'a> {
    /// Nothing injected, no gradient.
    pub fn clean(keys: RowKeys) -> Pass<'static> {
        Pass {
            injector: None,
            phase: Phase::Validation,
            matmul_error: false,
            fake_quant: false,
            differentiable: false,
            to_recompute: false,
            recomputing: false,
            microbatch_draw: 0,
            measure_norms: false,
            calibration: None,
            observer: None,
            keys,
        }
    }

    pub fn injected(injector: &'a Injector, phase: Phase, keys: RowKeys) -> Pass<'a> {
        Pass { injector: Some(injector), phase, matmul_error: true, fake_quant: true, ..Pass::clean(keys) }
    }

    /// Whether it is part of a training step: then it takes the products that a pass with gradients takes, to the bit.
    pub fn is_trained(&self) -> bool {
        self.differentiable || self.to_recompute || self.recomputing
    }

    /// The same pass over other rows.
    pub fn with_keys(&self, keys: RowKeys) -> Pass<'a> {
        Pass { keys, ..*self }
    }
}

/// Names a prompt: noise keys derive from it (numerics.md section 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PromptUid {
    pub step: u32,          // training step, or noise_key::VALIDATION_STEP
    pub dataset_index: u32, // position in the data set
}

/// A prompt with its response so far; `ids[..prompt_len]` is the prompt.
#[derive(Clone, Debug)]
pub struct Sequence {
    pub uid: PromptUid,
    pub member: u32, // group member, from 0
    pub ids: Vec<u32>,
    pub prompt_len: usize,
}

impl Sequence {
    /// The token key of position p: the prompt's at prompt positions, the sequence's after it.
    pub fn key(&self, position: usize) -> Result<u64> {
        let member = if position < self.prompt_len { 0 } else { 1 + self.member };
        token_key(self.uid.step, self.uid.dataset_index, member, position as u32)
    }

    /// The keys of all positions.
    pub fn keys(&self) -> Result<Vec<u64>> {
        (0..self.ids.len()).map(|p| self.key(p)).collect()
    }

    /// (prompt, response) tokens.
    pub fn lengths(&self) -> (usize, usize) {
        (self.prompt_len, self.response().len())
    }

    pub fn response(&self) -> &[u32] {
        &self.ids[self.prompt_len..]
    }
}

/// Token ids as an i64 tensor on `device`.
pub fn ids_tensor(ids: &[u32], device: tch::Device) -> Result<Tensor> {
    let ids: Vec<i64> = ids.iter().map(|&i| i64::from(i)).collect();
    Ok(Tensor::f_from_slice(&ids)?.f_to_device(device)?)
}

/// Row numbers as an i64 tensor on `device`.
pub fn rows_tensor(rows: &[usize], device: tch::Device) -> Result<Tensor> {
    let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
    Ok(Tensor::f_from_slice(&rows)?.f_to_device(device)?)
}
