//! The tests that `compare` makes between the arms, as a table of the page.

use serde::Serialize;

use super::Table;
use super::arms::Arm;
use super::trust::texts;
use crate::Result;
use crate::analysis::compare::{Comparison, Pair, render};
use crate::analysis::run_files::RunFiles;
use crate::analysis::warnings::{About, Warning};

#[derive(Serialize)]
pub(super) struct Tests {
    /// None where no two arms can be held against each other.
    table: Option<Table>,
    /// What speaks against comparing these runs, besides what the head says.
    warnings: Vec<String>,
    /// How the figures are to be read.
    notes: Vec<String>,
}

/// None where there is nothing to say: no pair of arms, and nothing that speaks against comparing.
pub(super) fn tests_between(arms: &[Arm], warnings: &[Warning]) -> Result<Option<Tests>> {
    let against = texts(warnings, About::Comparison);
    let validated = |arm: &&Arm| arm.runs.iter().any(|run| !run.files.validations.is_empty());
    if arms.iter().filter(validated).count() < 2 {
        let alone = Tests { table: None, warnings: against, notes: Vec::new() };
        let several = arms.iter().map(|arm| arm.runs.len()).sum::<usize>() > 1;
        return Ok((several && !alone.warnings.is_empty()).then_some(alone));
    }
    // In the page's order, so that its first arm is the baseline.
    let runs: Vec<&RunFiles> = arms.iter().flat_map(|arm| &arm.runs).map(|run| &run.files).collect();
    let comparison = Comparison::of(&runs, None)?;
    let header = [
        "arm",
        "condition",
        "seeds",
        "n",
        "difference, points",
        "95 % interval",
        "p",
        "p (Holm)",
        "detectable, points",
    ];
    let rows: Vec<_> = comparison.pairs.iter().map(|pair| row(pair, &comparison.baseline)).collect();
    let table = (!rows.is_empty()).then(|| Table { header: header.map(str::to_string).into(), rows });
    let tests = Tests { table, warnings: against, notes: comparison.notes };
    Ok((tests.table.is_some() || !tests.warnings.is_empty()).then_some(tests))
}

fn row(pair: &Pair, baseline: &str) -> Vec<String> {
    let points = |share: f64| format!("{:+.1}", 100.0 * share);
    let figures = &pair.figures;
    let (arm, base) = figures.seeds;
    vec![
        format!("{} - {baseline}", pair.arm),
        pair.condition.name().to_string(),
        if arm == base { arm.to_string() } else { format!("{arm}, {base}") },
        pair.n.to_string(),
        points(figures.difference),
        figures.ci95.map_or_else(String::new, |(low, high)| format!("[{}, {}]", points(low), points(high))),
        render::probability(figures.p),
        render::probability(pair.p_holm),
        pair.minimum_detectable_difference.map_or_else(String::new, |share| format!("{:.1}", 100.0 * share)),
    ]
}
