//! Fake-quantizes the weights of a checkpoint: the same names, shapes and dtypes, other values.
//!
//! Quantized: every floating tensor of two or more dimensions, over its last one ([.., K] seen as [rows, K]), unless a
//! component of its name is excluded; values are rounded once to the stored dtype. q/k/v and gate/up of one layer
//! share a tensor amax, as they do in training (numerics.md section 2, fused siblings); every other tensor has its
//! own. Rows stream through in pieces (pieces.rs): memory does not grow with the tensor.

pub mod pack;
mod pieces;

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Checkpoint, StoredDtype, TensorSink, TensorSpec, is_readable_float};
use crate::inject::plan::FUSED_PROJECTIONS;
use crate::numerics::block_format::TensorScale;
use crate::numerics::format::Format;
use crate::numerics::tensor_error::{TensorError, TensorErrorSums};
use crate::{Result, bail_input};
use pieces::Pieces;

/// Names of modules that stay as they are unless a user says otherwise.
pub const DEFAULT_EXCLUDED: [&str; 2] = ["lm_head", "embed_tokens"];

/// What quantization did to one tensor.
#[derive(Clone, Debug, Serialize)]
pub struct QuantizedTensor {
    pub name: String,
    pub format: Format,
    pub dtype: String,
    pub shape: Vec<usize>,
    #[serde(flatten)]
    pub error: TensorError,
    /// Blocks that held NaN or infinity and became NaN.
    pub nonfinite_blocks: usize,
}

/// Tensors to be written, quantized on the way.
pub trait TensorSource {
    fn specs(&self) -> &[TensorSpec];

    /// Writes tensor `index`; what was done, or `None` where it is a copy or a part that another index reports.
    /// `progress` gets the bytes of each piece of the input read; its error ends the work.
    fn fill(
        &self,
        index: usize,
        sink: &mut TensorSink,
        progress: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Option<QuantizedTensor>>;
}

/// A checkpoint seen through a format: gives the bytes of every tensor, quantized where it should be.
pub struct Quantizer<'a> {
    checkpoint: &'a Checkpoint,
    format: Format,
    /// Every tensor, in natural order of names (layer 2 before layer 10).
    pub specs: Vec<TensorSpec>,
    quantized: Vec<bool>,
    shared_amax: BTreeMap<String, f32>,
}

impl<'a> Quantizer<'a> {
    /// # Errors
    /// A tensor to be quantized that is stored in a dtype other than F32, BF16 and F16, or (2-D tiles) whose matrices are
    /// no whole tiles high where there are several.
    pub fn new(checkpoint: &'a Checkpoint, format: Format, excluded: &[&str]) -> Result<Quantizer<'a>> {
        if let Some(layout) = checkpoint.packed_layout() {
            bail_input!(
                "{}: found packed weights ({layout}), expected weights that are not quantized: quantizing them once more \
                 only adds error",
                checkpoint.path().display()
            );
        }
        let mut names: Vec<&str> = checkpoint.names().collect();
        names.sort_by_key(|name| natural_key(name));
        let (mut specs, mut quantized) = (Vec::new(), Vec::new());
        for name in names {
            let tensor = checkpoint.tensor(name)?;
            let chosen = tensor.shape.len() >= 2
                && is_floating(tensor.dtype)
                && !name.split('.').any(|component| excluded.contains(&component));
            if chosen && !is_readable_float(tensor.dtype) {
                bail_input!(
                    "{}: tensor {name}: found dtype {}, expected F32, BF16 or F16",
                    checkpoint.file_of(name).display(),
                    tensor.dtype
                );
            }
            let (size, leading) = (format.block_rows(), &tensor.shape[..tensor.shape.len().saturating_sub(1)]);
            if chosen && leading.len() > 1 && leading.last().is_some_and(|rows| rows % size != 0) {
                bail_input!(
                    "{}: tensor {name}: found {:?}, expected a multiple of {size} rows: a tile of {format} would reach \
                     into the next matrix",
                    checkpoint.file_of(name).display(),
                    tensor.shape
                );
            }
            specs.push(TensorSpec::new(name, tensor.dtype, tensor.shape));
            quantized.push(chosen && tensor.elements() > 0);
        }
        let mut quantizer = Quantizer { checkpoint, format, specs, quantized, shared_amax: BTreeMap::new() };
        if format.has_tensor_scale() {
            quantizer.find_shared_amax()?;
        }
        Ok(quantizer)
    }

    /// What quantizing tensor `index` would do in each quantizer's format, all of one checkpoint, writing nothing; nothing where
    /// it would be copied. `progress` as in [`TensorSource::fill`].
    pub fn measure(
        quantizers: &[Quantizer],
        index: usize,
        progress: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<QuantizedTensor>> {
        let chosen: Vec<&Quantizer> = quantizers.iter().filter(|quantizer| quantizer.quantized[index]).collect();
        let Some(first) = chosen.first() else { return Ok(Vec::new()) };
        let formats = chosen.iter().map(|q| Ok((q.format, q.tensor_scale(index)?))).collect::<Result<Vec<_>>>()?;
        let measured = first.pieces(index)?.measure(index as u32, &formats, progress)?;
        let found = chosen.iter().zip(measured).map(|(q, (sums, nonfinite))| q.found(index, &sums, nonfinite));
        Ok(found.collect())
    }

    fn pieces(&self, index: usize) -> Result<Pieces<'_>> {
        let tensor = self.checkpoint.tensor(&self.specs[index].name)?;
        Ok(Pieces { checkpoint: self.checkpoint, tensor, format: self.format })
    }

    /// Where tensor `index` takes its tensor scale from: its group's amax, its own, or none.
    fn tensor_scale(&self, index: usize) -> Result<TensorScale> {
        let shared = fused_group(&self.specs[index].name).and_then(|group| self.shared_amax.get(&group));
        Ok(match shared {
            Some(&amax) => TensorScale::Amax(amax),
            None if self.format.has_tensor_scale() => TensorScale::Amax(self.pieces(index)?.amax()?),
            None => TensorScale::Tensor,
        })
    }

    fn found(&self, index: usize, sums: &TensorErrorSums, nonfinite_blocks: usize) -> QuantizedTensor {
        let spec = &self.specs[index];
        QuantizedTensor {
            name: spec.name.clone(),
            format: self.format,
            dtype: spec.dtype.to_string(),
            shape: spec.shape.clone(),
            error: sums.finish(),
            nonfinite_blocks,
        }
    }

    fn find_shared_amax(&mut self) -> Result<()> {
        for (spec, _) in self.specs.iter().zip(&self.quantized).filter(|(_, quantized)| **quantized) {
            let Some(group) = fused_group(&spec.name) else {
                continue;
            };
            let tensor = self.checkpoint.tensor(&spec.name)?;
            let amax = Pieces { checkpoint: self.checkpoint, tensor, format: self.format }.amax()?;
            let shared = self.shared_amax.entry(group).or_insert(0.0);
            *shared = shared.max(amax);
        }
        Ok(())
    }
}

impl TensorSource for Quantizer<'_> {
    fn specs(&self) -> &[TensorSpec] {
        &self.specs
    }

    fn fill(
        &self,
        index: usize,
        sink: &mut TensorSink,
        progress: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Option<QuantizedTensor>> {
        let pieces = self.pieces(index)?;
        if !self.quantized[index] {
            pieces.copy(sink, progress)?;
            return Ok(None);
        }
        let (sums, nonfinite_blocks) = pieces.quantize(index as u32, self.tensor_scale(index)?, sink, progress)?;
        Ok(Some(self.found(index, &sums, nonfinite_blocks)))
    }
}

/// Mean over tensors of each metric.
pub fn mean_error(tensors: &[QuantizedTensor]) -> TensorError {
    TensorError::mean(&tensors.iter().map(|t| &t.error).collect::<Vec<_>>())
}

/// `model.layers.3.self_attn.k_proj.weight` -> `model.layers.3.self_attn.q_proj`: the group's first sibling.
pub(super) fn fused_group(name: &str) -> Option<String> {
    let module = name.strip_suffix(".weight")?;
    let (parent, projection) = module.rsplit_once('.')?;
    let group = FUSED_PROJECTIONS.iter().find(|group| group.contains(&projection))?;
    Some(format!("{parent}.{}", group[0]))
}

fn is_floating(dtype: StoredDtype) -> bool {
    use StoredDtype::{BF16, F8_E4M3, F8_E5M2, F16, F32, F64};
    matches!(dtype, F64 | F32 | F16 | BF16 | F8_E4M3 | F8_E5M2)
}

/// Sorts numbers in a name as numbers.
pub(super) fn natural_key(name: &str) -> Vec<(u64, String)> {
    name.split('.').map(|part| part.parse().map_or((u64::MAX, part.to_string()), |n| (n, String::new()))).collect()
}
