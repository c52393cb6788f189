//! The charts of `temper scan --plots`: each metric over layers.

use std::path::Path;

use super::scan::Found;
use crate::analysis::plot::{self, LineChart};
use crate::numerics::tensor_error::TensorError;
use crate::srdd::summary::FormatSummary;
use crate::{Error, Result};

/// (metric, label of its axis, what is drawn of it)
type Shown = (&'static str, &'static str, fn(&TensorError) -> f64);
const SHOWN: [Shown; 3] = [
    ("sqnr_db", "SQNR, dB", |e| e.sqnr_db),
    ("relative_error", "relative error, %", |e| 100.0 * e.relative_error),
    ("deadzone", "elements that become 0, %", |e| 100.0 * e.deadzone_ratio),
];

/// Writes them, in SVG and PNG, into `directory`, which is made if need be.
pub fn write(found: &Found, directory: &Path) -> Result<()> {
    std::fs::create_dir_all(directory).map_err(|e| Error::io(directory, e))?;
    let mut charts: Vec<(String, LineChart)> = Vec::new();
    if let Some(scan) = &found.weights {
        charts.extend(of_formats("weights", &scan.formats));
    }
    if let Some(scan) = &found.activations {
        charts.extend(of_formats("activations", &scan.formats));
    }
    if !found.sensitivity.is_empty() {
        let line = |arm: &crate::srdd::sensitivity::Sensitivity| {
            (arm.arm.clone(), arm.layers.iter().map(|l| (l.layer as f64, l.shift.kl)).collect())
        };
        let lines = found.sensitivity.iter().map(line).collect();
        charts.push(("sensitivity_kl".into(), chart("output, one layer at a time".into(), "KL, nats", lines)));
    }
    if let Some(changes) = &found.changes {
        let values = changes.layers.iter().map(|l| (l.layer as f64, l.change.relative_change)).collect();
        let lines = vec![("relative change".to_string(), values)];
        charts.push(("changes".into(), chart("changes of weights".into(), "|after - before| / |before|", lines)));
    }
    charts.iter().try_for_each(|(name, chart)| plot::write(chart, &directory.join(name)))
}

fn of_formats(part: &str, formats: &[FormatSummary]) -> Vec<(String, LineChart)> {
    let of_metric = |(name, label, value): Shown| {
        let line = |summary: &FormatSummary| {
            let values = summary.layers.iter().map(|l| (l.layer as f64, value(&l.mean)));
            (summary.format.to_string(), values.collect())
        };
        (format!("{part}_{name}"), chart(format!("{part} by layer"), label, formats.iter().map(line).collect()))
    };
    SHOWN.map(of_metric).into()
}

fn chart(title: String, y_label: &str, lines: Vec<(String, Vec<(f64, f64)>)>) -> LineChart {
    LineChart::of_lines(title, "layer", y_label, lines)
}
