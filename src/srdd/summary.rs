//! Means over layers, and in how many layers each format wins, by each metric.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::numerics::format::Format;
use crate::numerics::tensor_error::{METRICS, Metric, TensorError};

/// The error of a format in one tensor or one layer's output.
pub struct Entry {
    /// None: a tensor outside the layers.
    pub layer: Option<usize>,
    pub format: Format,
    pub error: TensorError,
}

#[derive(Clone, Debug, Serialize)]
pub struct FormatSummary {
    pub format: Format,
    /// Over all entries.
    pub mean: TensorError,
    pub layers: Vec<LayerMean>,
}

#[derive(Clone, Debug, Serialize)]
pub struct LayerMean {
    pub layer: usize,
    /// Over the layer's entries.
    pub mean: TensorError,
}

/// Each format's means, in the order of their first entry.
pub fn by_format(entries: &[Entry]) -> Vec<FormatSummary> {
    let mut formats: Vec<Format> = Vec::new();
    for entry in entries {
        if !formats.contains(&entry.format) {
            formats.push(entry.format);
        }
    }
    let summary = |format: Format| {
        let own: Vec<&Entry> = entries.iter().filter(|entry| entry.format == format).collect();
        let mut of_layers: BTreeMap<usize, Vec<&TensorError>> = BTreeMap::new();
        for entry in &own {
            if let Some(layer) = entry.layer {
                of_layers.entry(layer).or_default().push(&entry.error);
            }
        }
        let layers = of_layers.into_iter().map(|(layer, errors)| LayerMean { layer, mean: TensorError::mean(&errors) });
        let errors: Vec<&TensorError> = own.iter().map(|entry| &entry.error).collect();
        FormatSummary { format, mean: TensorError::mean(&errors), layers: layers.collect() }
    };
    formats.into_iter().map(summary).collect()
}

/// By metric and format: in how many layers it alone is best. Empty for fewer than two formats.
pub fn wins(formats: &[FormatSummary]) -> BTreeMap<&'static str, BTreeMap<String, usize>> {
    let Some(first) = formats.first().filter(|_| formats.len() > 1) else { return BTreeMap::new() };
    let of_metric = |metric: &Metric| {
        let mut won: BTreeMap<String, usize> = formats.iter().map(|f| (f.format.to_string(), 0)).collect();
        for place in 0..first.layers.len() {
            let costs: Vec<f64> = formats.iter().map(|f| metric.cost(&f.layers[place].mean)).collect();
            let least = costs.iter().copied().fold(f64::INFINITY, f64::min);
            let mut best = costs.iter().zip(formats).filter(|(cost, _)| **cost == least);
            if let (Some((_, format)), None) = (best.next(), best.next()) {
                *won.entry(format.format.to_string()).or_default() += 1;
            }
        }
        (metric.name, won)
    };
    METRICS.iter().map(of_metric).collect()
}

/// `model.layers.3.mlp.up_proj.weight` -> 3.
pub fn layer_of(name: &str) -> Option<usize> {
    let mut parts = name.split('.').skip_while(|part| *part != "layers");
    parts.nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn entry(layer: usize, format: Format, error: f32) -> Entry {
        let x = [1.0, -2.0, 3.0, 4.0];
        let q = x.map(|v| v * (1.0 + error));
        let sums = crate::numerics::tensor_error::TensorErrorSums::of(&x, &q, 0);
        Entry { layer: Some(layer), format, error: sums.finish() }
    }

    #[test]
    fn a_format_wins_the_layers_in_which_it_alone_is_best() {
        let (a, b) = (Format::MXFP4, Format::NVFP4);
        let entries = [
            entry(0, a, 0.1),
            entry(0, b, 0.2),
            entry(1, a, 0.3),
            entry(1, b, 0.2),
            entry(2, a, 0.5),
            entry(2, b, 0.5),
        ];
        let formats = by_format(&entries);
        let won = &wins(&formats)["sqnr_db"];
        assert_eq!((won["mxfp4"], won["nvfp4"]), (1, 1));
        assert_eq!(formats[0].layers.iter().map(|l| l.layer).collect::<Vec<_>>(), [0, 1, 2]);
        assert!((formats[0].mean.relative_error - 0.3).abs() < 1e-6);
        assert!(wins(&formats[..1]).is_empty());
    }

    #[test]
    fn layers_are_read_from_names() {
        assert_eq!(layer_of("model.layers.13.mlp.up_proj.weight"), Some(13));
        assert_eq!(layer_of("model.embed_tokens.weight"), None);
        assert_eq!(layer_of("layers"), None);
    }
}
