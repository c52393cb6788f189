//! The original system's comparison of formats: the metrics of every linear under NVFP4, MXFP4 and its own variant of
//! NVFP4 without a tensor scale, and which format wins each metric in how many linears.

use serde::Serialize;

use super::super::Checkpoint;
use super::super::quantize::{DEFAULT_EXCLUDED, QuantizedTensor, Quantizer, mean_error};
use crate::Result;
use crate::numerics::format::Format;
use crate::numerics::tensor_error::{METRICS, Metric, TensorError};

pub const FORMATS: [Format; 3] = [Format::NVFP4, Format::MXFP4, Format::NVFP4_SINGLE_LEVEL];

#[derive(Clone, Debug, Serialize)]
pub struct FormatTable {
    pub formats: Vec<FormatResult>,
    pub metrics: Vec<MetricWinner>,
}

#[derive(Clone, Debug, Serialize)]
pub struct FormatResult {
    pub format: Format,
    pub mean: TensorError,
    pub tensors: Vec<QuantizedTensor>,
}

/// Who is best in one metric.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MetricWinner {
    pub metric: &'static str,
    /// Mean over the linears, by format.
    pub means: Vec<f64>,
    /// In how many linears a format is best, by format; equals share no win.
    pub wins: Vec<usize>,
    /// The format that is best in most linears.
    pub winner: Format,
    pub linears: usize,
}

/// Measures every linear of `model` under each format.
pub fn format_table(model: &Checkpoint, progress: &mut dyn FnMut(&str) -> Result<()>) -> Result<FormatTable> {
    let quantizers = FORMATS.map(|format| Quantizer::new(model, format, &DEFAULT_EXCLUDED));
    let quantizers = quantizers.into_iter().collect::<Result<Vec<_>>>()?;
    let mut found = Vec::new();
    for (index, spec) in quantizers[0].specs.iter().enumerate() {
        progress(&spec.name)?;
        found.extend(Quantizer::measure(&quantizers, index, &mut |_| Ok(()))?);
    }
    let of_format = |format| {
        let tensors: Vec<QuantizedTensor> = found.iter().filter(|tensor| tensor.format == format).cloned().collect();
        FormatResult { format, mean: mean_error(&tensors), tensors }
    };
    let formats: Vec<FormatResult> = FORMATS.map(of_format).into();
    // The original's table has no saturation.
    let shown = METRICS.iter().filter(|metric| metric.name != "saturation_ratio");
    let metrics = shown.map(|metric| winner(&formats, metric)).collect();
    Ok(FormatTable { formats, metrics })
}

fn winner(formats: &[FormatResult], metric: &Metric) -> MetricWinner {
    let linears = formats.first().map_or(0, |format| format.tensors.len());
    let mut wins = vec![0; formats.len()];
    for linear in 0..linears {
        let costs: Vec<f64> = formats.iter().map(|format| metric.cost(&format.tensors[linear].error)).collect();
        let best = (0..costs.len()).find(|&i| (0..costs.len()).all(|j| i == j || costs[i] < costs[j]));
        if let Some(best) = best {
            wins[best] += 1;
        }
    }
    // The first of equals.
    let most = wins.iter().copied().max().unwrap_or(0);
    let winner = wins.iter().position(|&count| count == most).unwrap_or(0);
    let means = formats.iter().map(|format| (metric.value)(&format.mean)).collect();
    MetricWinner { metric: metric.name, means, wins, winner: formats[winner].format, linears }
}
