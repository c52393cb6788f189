//! Keys and values of the tokens so far, per layer: [sequences, kv_heads, capacity, head_dim].
//!
//! Prompts are prefilled once and repeated for the members of their group (their noise keys are equal there).

use std::cell::RefCell;

use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

pub struct KvCache {
    layers: RefCell<Vec<Option<(Tensor, Tensor)>>>,
    prompt_of_row: Tensor, // i64 [sequences]
    capacity: i64,
}

/// The rows of one decode step: sequence r writes at positions[r] and sees everything up to it.
pub struct DecodeStep {
    rows: Tensor,      // i64 [sequences]
    positions: Tensor, // i64 [sequences]
    lengths: Tensor,   // i64 [sequences]
    length: i64,
}

impl DecodeStep {
    pub fn new(positions: &[usize], device: Device) -> Result<DecodeStep> {
        let length = positions.iter().max().map_or(0, |&p| p as i64 + 1);
        let host: Vec<i64> = positions.iter().map(|&p| p as i64).collect();
        let positions = Tensor::f_from_slice(&host)?.f_to_device(device)?;
        Ok(DecodeStep {
            rows: Tensor::f_arange(host.len() as i64, (Kind::Int64, device))?,
            lengths: positions.f_add_scalar(1)?,
            positions,
            length,
        })
    }

    /// i64 [sequences]: the position of each new token.
    pub fn positions(&self) -> &Tensor {
        &self.positions
    }

    /// i64 [sequences]: the places of the cache that each sequence sees.
    pub fn lengths(&self) -> &Tensor {
        &self.lengths
    }

    /// The largest of the lengths.
    pub fn longest(&self) -> i64 {
        self.length
    }
}

impl KvCache {
    /// `prompt_of_row[r]`: which prefilled prompt row r continues. `capacity`: longest sequence.
    pub fn new(layers: usize, prompt_of_row: &[usize], capacity: usize, device: Device) -> Result<KvCache> {
        let index: Vec<i64> = prompt_of_row.iter().map(|&p| p as i64).collect();
        Ok(KvCache {
            layers: RefCell::new((0..layers).map(|_| None).collect()),
            prompt_of_row: Tensor::f_from_slice(&index)?.f_to_device(device)?,
            capacity: capacity as i64,
        })
    }

    pub fn rows(&self) -> usize {
        self.prompt_of_row.size()[0] as usize
    }

    /// k, v [prompts, kv_heads, prompt length, head_dim] of the prefilled prompts.
    pub fn store_prefill(&self, layer: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        let place = |x: &Tensor| -> Result<Tensor> {
            let (_, heads, length, dim) = x.size4()?;
            let rows = self.prompt_of_row.size()[0];
            let full = Tensor::f_zeros([rows, heads, self.capacity, dim], (x.kind(), x.device()))?;
            full.f_narrow(2, 0, length)?.f_copy_(&x.f_index_select(0, &self.prompt_of_row)?)?;
            Ok(full)
        };
        self.layers.borrow_mut()[layer] = Some((place(k)?, place(v)?));
        Ok(())
    }

    /// Writes the new token's k, v [sequences, kv_heads, head_dim]; returns both up to the step's length.
    pub fn append(&self, layer: usize, k: &Tensor, v: &Tensor, step: &DecodeStep) -> Result<(Tensor, Tensor)> {
        let mut layers = self.layers.borrow_mut();
        let Some((keys, values)) = &mut layers[layer] else {
            return Err(Error::Runtime("decode before prefill".into()));
        };
        let index = [Some(&step.rows), None, Some(&step.positions)];
        let _ = keys.f_index_put_(&index, k, false)?;
        let _ = values.f_index_put_(&index, v, false)?;
        Ok((keys.f_narrow(2, 0, step.length)?, values.f_narrow(2, 0, step.length)?))
    }

    /// Keeps `rows` (positions in the current order) and drops the others.
    pub fn keep_rows(&mut self, rows: &[usize]) -> Result<()> {
        let index: Vec<i64> = rows.iter().map(|&r| r as i64).collect();
        let index = Tensor::f_from_slice(&index)?.f_to_device(self.prompt_of_row.device())?;
        for slot in self.layers.borrow_mut().iter_mut() {
            if let Some((k, v)) = slot.take() {
                *slot = Some((k.f_index_select(0, &index)?, v.f_index_select(0, &index)?));
            }
        }
        self.prompt_of_row = self.prompt_of_row.f_index_select(0, &index)?;
        Ok(())
    }
}
