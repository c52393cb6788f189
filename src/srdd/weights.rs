//! What formats would do to a checkpoint's weights: the metrics of numerics.md section 3 for every linear weight. Tensors
//! stream from the memory map, so that memory does not grow with the model.

use std::collections::BTreeMap;

use serde::Serialize;

use super::summary::{Entry, FormatSummary, by_format, layer_of, wins};
use crate::model::checkpoint::Checkpoint;
use crate::model::checkpoint::quantize::{DEFAULT_EXCLUDED, QuantizedTensor, Quantizer, mean_error};
use crate::numerics::format::Format;
use crate::numerics::tensor_error::TensorError;
use crate::{Result, bail_input};

#[derive(Clone, Debug, Serialize)]
pub struct WeightScan {
    /// Every linear weight in every format.
    pub tensors: Vec<QuantizedTensor>,
    /// Of the first format.
    pub mean: TensorError,
    pub formats: Vec<FormatSummary>,
    /// By metric and format: in how many layers the format is best.
    pub wins: BTreeMap<&'static str, BTreeMap<String, usize>>,
    /// Blocks with NaN or infinity, in the first format.
    pub nonfinite_blocks: usize,
}

/// Bytes that `progress` of [`scan_weights`] is told of, or a few more: what is not quantized counts as well.
pub fn bytes_to_read(checkpoint: &Checkpoint) -> u64 {
    let tensors = checkpoint.names().filter_map(|name| checkpoint.tensor(name).ok());
    tensors.filter(|t| t.shape.len() >= 2).map(|t| t.data.len() as u64).sum::<u64>()
}

/// `progress` is told the bytes of each piece; its error ends the scan.
///
/// # Errors
/// `Input` for a weight that cannot be read or quantized, or where there is none.
pub fn scan_weights(
    checkpoint: &Checkpoint,
    formats: &[Format],
    progress: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<WeightScan> {
    let quantizers = formats.iter().map(|&format| Quantizer::new(checkpoint, format, &DEFAULT_EXCLUDED));
    let quantizers = quantizers.collect::<Result<Vec<_>>>()?;
    let tensors = quantizers.first().map_or(0, |quantizer| quantizer.specs.len());
    let mut found = Vec::new();
    for index in 0..tensors {
        found.extend(Quantizer::measure(&quantizers, index, progress)?);
    }
    if found.is_empty() {
        bail_input!("{}: found no weight of two or more dimensions to scan", checkpoint.file_of("").display());
    }
    let entries = found.iter().map(|t| Entry { layer: layer_of(&t.name), format: t.format, error: t.error });
    let formats = by_format(&entries.collect::<Vec<_>>());
    let of_first: Vec<QuantizedTensor> = found.iter().filter(|t| t.format == formats[0].format).cloned().collect();
    Ok(WeightScan {
        mean: mean_error(&of_first),
        nonfinite_blocks: of_first.iter().map(|t| t.nonfinite_blocks).sum(),
        wins: wins(&formats),
        formats,
        tensors: found,
    })
}
