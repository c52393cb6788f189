//! How well faults are found: every kind, dense and sparse, planted at every layer of a model, several times; and false alarms on
//! healthy devices. Layers are run on clean inputs, so that a planted fault changes its own layer's statistics alone.

use serde::Serialize;
use tch::Tensor;

use super::device::Device;
use super::fault_finder::suspects;
use super::faults::{Observed, clean_residuals};
use super::planted::{FaultKind, Planted};
use super::prompts::Laid;
use crate::Result;

#[derive(Clone, Debug, Serialize)]
pub struct FaultRow {
    pub kind: FaultKind,
    pub sparse: bool,
    /// Planted faults that change anything: a clip of channels without large values does not.
    pub cases: usize,
    pub inert: usize,
    /// The layer is the first suspect.
    pub first: usize,
    /// And its kind is right.
    pub kind_right: usize,
    /// Another layer is among the suspects.
    pub others_accused: usize,
    /// The smallest of the tried severities from which on at least 95 % are found first; None if not at numerics.md's own.
    pub least_severity: Option<f64>,
}

/// Of the severity of numerics.md.
const FACTORS: [f64; 5] = [1.0, 0.3, 0.1, 0.03, 0.01];

/// `progress` is told of every layer.
///
/// # Errors
/// What libtorch answers.
pub fn fault_table(
    clean: &Device,
    laid: &[Laid],
    draws: u64,
    progress: &mut dyn FnMut() -> Result<()>,
) -> Result<Vec<FaultRow>> {
    let _no_grad = tch::no_grad_guard();
    let residuals = clean_residuals(clean, laid)?;
    let layers = clean.model.blocks.len();
    let part = |place: usize| -> Vec<Tensor> { residuals.iter().map(|of| of[place].shallow_clone()).collect() };
    let observed = |layer: usize, d: [Vec<Tensor>; 2]| Observed { x: part(layer), y: part(layer + 1), d };
    let healthy = (0..layers).map(|layer| observed(layer, [part(layer + 1), part(layer + 1)]).statistics());
    let healthy = healthy.collect::<Result<Vec<_>>>()?;
    // (kind, sparse, factor) -> counts
    let kinds = FaultKind::ALL.into_iter().flat_map(|kind| [false, true].map(|sparse| (kind, sparse)));
    let empty = |(kind, sparse)| FaultRow {
        kind,
        sparse,
        cases: 0,
        inert: 0,
        first: 0,
        kind_right: 0,
        others_accused: 0,
        least_severity: None,
    };
    let mut rows: Vec<[FaultRow; FACTORS.len()]> = kinds.map(|key| FACTORS.map(|_| empty(key))).collect();
    for layer in 0..layers {
        for row in &mut rows {
            for (row, factor) in row.iter_mut().zip(FACTORS) {
                for seed in 0..draws {
                    let severity = row.kind.severity() * factor;
                    let planted = Planted { kind: row.kind, severity, layer, sparse: row.sparse, seed };
                    let outputs = part(layer + 1);
                    let faulty = |run: u32| -> Result<Vec<Tensor>> {
                        laid.iter().zip(&outputs).map(|(prompt, y)| planted.apply(y, prompt.execution(run))).collect()
                    };
                    let mut statistics = healthy.clone();
                    statistics[layer] = observed(layer, [faulty(0)?, faulty(1)?]).statistics()?;
                    if statistics[layer] == healthy[layer] {
                        row.inert += 1;
                        continue;
                    }
                    let found = suspects(&statistics);
                    let first = found.first().filter(|suspect| suspect.layer == layer);
                    row.cases += 1;
                    row.first += usize::from(first.is_some());
                    row.kind_right += usize::from(first.is_some_and(|suspect| suspect.kind.is(row.kind)));
                    row.others_accused += usize::from(found.iter().any(|suspect| suspect.layer != layer));
                }
            }
        }
        progress()?;
    }
    let finish = |of_factors: [FaultRow; FACTORS.len()]| {
        let is_found = |row: &FaultRow| row.cases > 0 && row.first as f64 >= 0.95 * row.cases as f64;
        let found = of_factors.iter().take_while(|row| is_found(row)).count();
        let least = found.checked_sub(1).map(|last| of_factors[last].kind.severity() * FACTORS[last]);
        let [own, ..] = of_factors;
        FaultRow { least_severity: least, ..own }
    };
    Ok(rows.into_iter().map(finish).collect())
}
