//! Measured noise by layer and step, from injection.jsonl.
//!
//! A cell pools the modules of a layer over an arm's seeds: root mean squares weighted by elements, so measured / planned
//! is sqrt(sum n measured^2 / sum n planned^2).

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};

use super::arms::Arm;
use super::{Figure, Group, Plot, curves};
use crate::Result;
use crate::analysis::plot::{HeatMap, Scale};
use crate::analysis::run_files::RunFiles;

/// More steps than this share columns: a cell stays a few pixels wide.
const MOST_COLUMNS: usize = 120;
/// Ends of the colour bar of a ratio; the least that holds 99 of 100 cells is taken.
const LIMITS: [f64; 5] = [1.02, 1.05, 1.1, 1.25, 2.0];
/// What belongs to no layer: the last norm, after all of them.
const FINAL: u32 = u32::MAX;

/// The part of a row of injection.jsonl that is shown.
#[derive(Deserialize)]
struct Row {
    step: u64,
    module: String,
    aqn: Option<Injected>,
    matmul: Option<Matmul>,
}

#[derive(Deserialize)]
struct Injected {
    planned: Option<f64>,
    measured: Option<f64>,
    n: u64,
}

#[derive(Deserialize)]
struct Matmul {
    rollout: Option<Injected>,
    old_logprobs: Option<Injected>,
    ref_logprobs: Option<Injected>,
    forward: Option<Injected>,
    recompute: Option<Injected>,
    dx: Option<Injected>,
    dw: Option<Injected>,
}

#[derive(Clone, Copy, Default)]
struct Sums {
    n: f64,
    planned_sq: f64,
    measured_sq: f64,
}

impl Sums {
    fn add(&mut self, injected: &Injected) {
        let planned = injected.planned.unwrap_or(f64::NAN);
        // What is planned but was not injected has no elements, and counts as one that measured 0.
        let n = if injected.n == 0 && planned != 0.0 { 1.0 } else { injected.n as f64 };
        self.n += n;
        self.planned_sq += n * planned * planned;
        self.measured_sq += n * injected.measured.unwrap_or(f64::NAN).powi(2);
    }

    fn merge(&mut self, other: &Sums) {
        self.n += other.n;
        self.planned_sq += other.planned_sq;
        self.measured_sq += other.measured_sq;
    }

    /// NaN where there was nothing to inject.
    fn measured(&self) -> f64 {
        (self.measured_sq / self.n).sqrt()
    }

    fn ratio(&self) -> f64 {
        (self.measured_sq / self.planned_sq).sqrt()
    }
}

#[derive(Clone, Copy, Default)]
struct Cell {
    aqn: Sums,
    forward: Sums,
    backward: Sums,
}

/// By (layer, step).
#[derive(Default)]
pub(super) struct LayerSums(BTreeMap<(u32, u64), Cell>);

impl LayerSums {
    pub(super) fn read(files: &RunFiles) -> Result<LayerSums> {
        let mut sums = LayerSums::default();
        for row in files.rows_as::<Row>("injection.jsonl")? {
            let cell = sums.0.entry((layer_of(&row.module), row.step)).or_default();
            row.aqn.iter().for_each(|aqn| cell.aqn.add(aqn));
            if let Some(m) = &row.matmul {
                let forward = [&m.rollout, &m.old_logprobs, &m.ref_logprobs, &m.forward, &m.recompute];
                forward.into_iter().flatten().for_each(|slot| cell.forward.add(slot));
                [&m.dx, &m.dw].into_iter().flatten().for_each(|slot| cell.backward.add(slot));
            }
        }
        Ok(sums)
    }
}

/// `model.layers.14.mlp.up_proj` is of layer 14.
fn layer_of(module: &str) -> u32 {
    let mut parts = module.split('.').skip_while(|part| *part != "layers").skip(1);
    parts.next().and_then(|number| number.parse().ok()).unwrap_or(FINAL)
}

/// (id, title, what of a cell, its value, whether that is a ratio)
type Shown = (&'static str, &'static str, fn(&Cell) -> &Sums, fn(&Sums) -> f64, bool);
const SHOWN: [Shown; 4] = [
    ("aqn_std", "AQN, measured standard deviation", |c| &c.aqn, Sums::measured, false),
    ("aqn_ratio", "AQN, measured / planned", |c| &c.aqn, Sums::ratio, true),
    ("matmul_forward_ratio", "Matmul noise forward, measured / planned", |c| &c.forward, Sums::ratio, true),
    ("matmul_backward_ratio", "Matmul noise backward, measured / planned", |c| &c.backward, Sums::ratio, true),
];

pub(super) fn group(arms: &[Arm]) -> Group {
    let mut figures = Vec::new();
    for (id, title, part, value, is_ratio) in SHOWN {
        let grids: Vec<Grid> = arms.iter().map(|arm| grid(arm, part, value)).collect();
        // One scale for all arms, so that they can be compared by eye.
        let Some(scale) = scale(&grids, is_ratio) else { continue };
        for (place, (arm, grid)) in arms.iter().zip(grids).enumerate() {
            let name = if arms.len() > 1 { format!("{title}: {}", arm.label) } else { title.to_string() };
            let id = format!("layers_{id}_{}", curves::file_name(&arm.label));
            figures.extend(figure(id, name, place, grid, scale));
        }
    }
    let note = "What the tensors used show, pooled over a layer's modules and an arm's seeds. In a map of measured / \
                planned the middle colour is exactly as planned; the noise of few elements strays from it by chance, and \
                the checks above take that into account. An empty cell: nothing was planned, nothing measured.";
    Group { id: "layers", title: "Layers", note: note.to_string(), figures }
}

/// An arm's values by layer and column.
struct Grid {
    layers: Vec<u32>,
    per_column: u64,
    /// By layer.
    values: Vec<Vec<f64>>,
}

fn grid(arm: &Arm, part: fn(&Cell) -> &Sums, value: fn(&Sums) -> f64) -> Grid {
    let all = || arm.runs.iter().flat_map(|run| &run.layers.0);
    let last_step = all().map(|((_, step), _)| *step).max().unwrap_or(0);
    let per_column = last_step.div_ceil(MOST_COLUMNS as u64).max(1);
    let column_of = |step: u64| (step.max(1) - 1) / per_column;
    let mut pooled: BTreeMap<(u32, u64), Sums> = BTreeMap::new();
    for ((layer, step), cell) in all() {
        let sums = part(cell);
        if sums.n > 0.0 {
            pooled.entry((*layer, column_of(*step))).or_default().merge(sums);
        }
    }
    let mut layers: Vec<u32> = pooled.keys().map(|(layer, _)| *layer).collect();
    layers.dedup();
    let cell = |layer: u32, column: u64| pooled.get(&(layer, column)).map_or(f64::NAN, value);
    let row = |layer: &u32| (0..=column_of(last_step)).map(|column| cell(*layer, column)).collect();
    Grid { values: layers.iter().map(row).collect(), layers, per_column }
}

/// None where nothing was injected.
fn scale(grids: &[Grid], is_ratio: bool) -> Option<Scale> {
    let values: Vec<f64> =
        grids.iter().flat_map(|grid| grid.values.iter().flatten()).copied().filter(|v| !v.is_nan()).collect();
    if is_ratio {
        return (!values.is_empty()).then(|| Scale::Ratio { limit: limit(&values) });
    }
    let positive = || values.iter().copied().filter(|v| *v > 0.0);
    let (low, high) = (positive().reduce(f64::min)?, positive().reduce(f64::max)?);
    Some(Scale::Logarithmic { low, high })
}

fn limit(ratios: &[f64]) -> f64 {
    let mut distances: Vec<f64> = ratios.iter().map(|r| r.max(1.0 / r.max(1e-9))).collect();
    distances.sort_by(f64::total_cmp);
    let most = distances.get(distances.len() * 99 / 100).copied().unwrap_or(1.0);
    LIMITS.into_iter().find(|limit| most <= *limit).unwrap_or(LIMITS[LIMITS.len() - 1])
}

fn figure(id: String, title: String, place: usize, grid: Grid, scale: Scale) -> Option<Figure> {
    let note = match scale {
        Scale::Ratio { limit } => format!("Colours end at 1/{limit} and {limit}."),
        Scale::Logarithmic { .. } => "Logarithmic colours.".to_string(),
    };
    let columns: Vec<u64> = (0..grid.values.first()?.len() as u64).map(|c| c * grid.per_column + 1).collect();
    let rows: Vec<String> =
        grid.layers.iter().map(|layer| if *layer == FINAL { "final".to_string() } else { layer.to_string() }).collect();
    let short = |v: &f64| curves::rounded(*v, 4);
    let cells: Vec<Vec<Value>> = grid.values.iter().map(|row| row.iter().map(short).collect()).collect();
    let values = json!({"columns": columns, "rows": rows, "cells": cells});
    let x_label = match grid.per_column {
        1 => "step".to_string(),
        n => format!("step ({n} to a column)"),
    };
    let map = HeatMap {
        title: title.clone(),
        x_label,
        y_label: "layer".to_string(),
        columns: columns.iter().map(|c| *c as f64).collect(),
        rows,
        values: grid.values,
        scale,
    };
    let figure = Figure {
        id,
        title,
        unit: String::new(),
        note,
        arm: Some(place),
        last: Vec::new(),
        values,
        plot: Plot::Map(map),
    };
    (!figure.plot.is_empty()).then_some(figure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_have_their_layer_and_what_has_none_comes_last() {
        assert_eq!(layer_of("model.layers.14.self_attn.q_proj"), 14);
        assert_eq!(layer_of("model.norm"), FINAL);
        assert_eq!(layer_of("lm_head"), FINAL);
    }

    #[test]
    fn pooling_weighs_by_elements() {
        let mut sums = Sums::default();
        for (planned, measured, n) in [(0.1, 0.1, 300), (0.2, 0.1, 100)] {
            sums.add(&Injected { planned: Some(planned), measured: Some(measured), n });
        }
        // sqrt(400 * 0.01 / (300 * 0.01 + 100 * 0.04)) = sqrt(4/7)
        assert!((sums.ratio() - (4.0f64 / 7.0).sqrt()).abs() < 1e-12);
        assert!((sums.measured() - 0.1).abs() < 1e-12);
        // Planned and dropped on the way: 0, and not nothing. Neither planned nor injected: nothing.
        let mut dropped = Sums::default();
        dropped.add(&Injected { planned: Some(0.1), measured: Some(0.0), n: 0 });
        assert_eq!(dropped.ratio(), 0.0);
        let mut none = Sums::default();
        none.add(&Injected { planned: Some(0.0), measured: Some(0.0), n: 0 });
        assert!(none.ratio().is_nan() && none.n == 0.0);
    }

    #[test]
    fn colours_reach_as_far_as_most_cells() {
        assert_eq!(limit(&[1.0, 0.99, 1.01]), 1.02);
        assert_eq!(limit(&[0.5, 1.0]), 2.0);
        assert_eq!(limit(&[0.0]), 2.0);
    }
}
