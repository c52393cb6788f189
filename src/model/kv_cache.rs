//! Keys and values of the tokens so far, per layer: [rows, kv_heads, capacity, head_dim]. A row is a sequence.
//!
//! The memory stays where it is while sequences come and go; it grows by whole steps of positions, one layer at a time.

use std::cell::RefCell;

use tch::{Device, Kind, Tensor};

use super::config::Qwen2Config;
use crate::Result;

/// Positions by which the capacity grows: on a GPU seldom, since a CUDA graph is captured anew.
pub fn growth(on_gpu: bool) -> usize {
    if on_gpu { 256 } else { 32 }
}

pub struct KvCache {
    layers: RefCell<Vec<(Tensor, Tensor)>>,
    capacity: usize,
    growth: usize,
}

/// Where the rows of a full pass go: token `source[i]` of the pass to position `positions[i]` of row `rows[i]`, so that one
/// prompt can stand in the rows of its whole group (their noise keys are equal there).
pub struct Places {
    source: Tensor,    // i64 [stored tokens]
    rows: Tensor,      // i64 [stored tokens]
    positions: Tensor, // i64 [stored tokens]
}

impl Places {
    /// `rows[i]` is to hold the pass's sequence `sequence_of_row[i]`; `lengths` are those of the pass's sequences.
    pub fn new(rows: &[usize], sequence_of_row: &[usize], lengths: &[usize], device: Device) -> Result<Places> {
        let mut starts = vec![0usize];
        lengths.iter().for_each(|length| starts.push(starts[starts.len() - 1] + length));
        let (mut source, mut row_of, mut positions) = (Vec::new(), Vec::new(), Vec::new());
        for (&row, &sequence) in rows.iter().zip(sequence_of_row) {
            for position in 0..lengths[sequence] {
                source.push((starts[sequence] + position) as i64);
                row_of.push(row as i64);
                positions.push(position as i64);
            }
        }
        let upload = |values: &[i64]| -> Result<Tensor> { Ok(Tensor::f_from_slice(values)?.f_to_device(device)?) };
        Ok(Places { source: upload(&source)?, rows: upload(&row_of)?, positions: upload(&positions)? })
    }
}

/// The rows of one decode step: row r writes at positions[r] and sees everything up to it.
pub struct DecodeStep {
    positions: Tensor, // i64 [rows]
    lengths: Tensor,   // i64 [rows]
    longest: i64,
}

impl DecodeStep {
    /// `longest`: no row sees more positions.
    pub fn new(positions: &Tensor, longest: usize) -> Result<DecodeStep> {
        Ok(DecodeStep {
            positions: positions.shallow_clone(),
            lengths: positions.f_add_scalar(1)?,
            longest: longest as i64,
        })
    }

    /// i64 [rows]: the position of each new token.
    pub fn positions(&self) -> &Tensor {
        &self.positions
    }

    /// i64 [rows]: the positions that each row sees.
    pub fn lengths(&self) -> &Tensor {
        &self.lengths
    }

    /// No length is larger.
    pub fn longest(&self) -> i64 {
        self.longest
    }
}

impl KvCache {
    /// Empty, for sequences of at most `positions` tokens at first.
    pub fn new(config: &Qwen2Config, rows: usize, positions: usize, kind: Kind, device: Device) -> Result<KvCache> {
        let growth = growth(device.is_cuda());
        let capacity = positions.next_multiple_of(growth);
        let (heads, dim) = (config.num_key_value_heads as i64, config.head_dim as i64);
        // Zeros: on a CPU a place that is masked still enters a product, with weight 0.
        let zeros = || Tensor::f_zeros([rows as i64, heads, capacity as i64, dim], (kind, device));
        let layers = (0..config.num_hidden_layers).map(|_| Ok((zeros()?, zeros()?))).collect::<Result<Vec<_>>>()?;
        Ok(KvCache { layers: RefCell::new(layers), capacity, growth })
    }

    /// Positions that there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Makes room for sequences of `positions` tokens; whether the memory moved for it.
    pub fn reserve(&mut self, positions: usize) -> Result<bool> {
        if positions <= self.capacity {
            return Ok(false);
        }
        let capacity = positions.next_multiple_of(self.growth);
        let grown = |old: &Tensor| -> Result<Tensor> {
            let (rows, heads, length, dim) = old.size4()?;
            let new = Tensor::f_zeros([rows, heads, capacity as i64, dim], (old.kind(), old.device()))?;
            new.f_narrow(2, 0, length)?.f_copy_(old)?;
            Ok(new)
        };
        for (keys, values) in self.layers.get_mut() {
            *keys = grown(keys)?;
            *values = grown(values)?;
        }
        self.capacity = capacity;
        Ok(true)
    }

    /// Stores what a full pass computed: k, v [tokens, kv_heads, head_dim].
    pub fn store(&self, layer: usize, k: &Tensor, v: &Tensor, places: &Places) -> Result<()> {
        let (keys, values) = &mut self.layers.borrow_mut()[layer];
        let index = [Some(&places.rows), None, Some(&places.positions)];
        let _ = keys.f_index_put_(&index, &k.f_index_select(0, &places.source)?, false)?;
        let _ = values.f_index_put_(&index, &v.f_index_select(0, &places.source)?, false)?;
        Ok(())
    }

    /// All keys and values of a layer, [rows, kv_heads, capacity, head_dim] each.
    pub fn of_layer(&self, layer: usize) -> (Tensor, Tensor) {
        let (keys, values) = &self.layers.borrow()[layer];
        (keys.shallow_clone(), values.shallow_clone())
    }

    /// Keeps `rows`, in this order, and drops the others.
    pub fn keep_rows(&mut self, rows: &Tensor) -> Result<()> {
        for (keys, values) in self.layers.get_mut() {
            *keys = keys.f_index_select(0, rows)?;
            *values = values.f_index_select(0, rows)?;
        }
        Ok(())
    }
}
