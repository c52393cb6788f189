//! Runs side by side: accuracies per arm and condition, every arm against the baseline, and what makes them incomparable.
//!
//! Runs of one name and configuration hash are an arm; they differ by their seeds. What is compared is the last validation.

mod arms;
mod pairs;
pub mod render;

use serde::Serialize;

pub use arms::{Arm, ArmCondition, RunCondition, RunResult};
pub use pairs::{Figures, Method, Pair, SeedTest};

use super::arms::{KeyDifference, config_differences, group};
use super::run_files::RunFiles;
use super::warnings;
use crate::{Result, bail_input};

#[derive(Debug, Serialize)]
pub struct Comparison {
    /// The arm that the others are held against.
    pub baseline: String,
    pub arms: Vec<Arm>,
    pub pairs: Vec<Pair>,
    pub config_differences: Vec<KeyDifference>,
    /// What speaks against comparing these runs, or for doubt in the result.
    pub warnings: Vec<String>,
    /// How the figures are to be read.
    pub notes: Vec<String>,
}

impl Comparison {
    /// `baseline`: the name of an arm; None is the first run's.
    ///
    /// # Errors
    /// `Error::Input`: no run with a validation, a run that is given twice, no such baseline, marks that contradict the
    /// counts beside them.
    pub fn of(runs: &[&RunFiles], baseline: Option<&str>) -> Result<Comparison> {
        let mut grouped = group(runs.iter().copied().filter(|run| !run.conditions().is_empty()))?;
        if grouped.is_empty() {
            bail_input!("found no run with a validation among {}, expected at least one", runs.len());
        }
        let names = || grouped.iter().map(|arm| arm.name.as_str()).collect::<Vec<_>>().join(", ");
        let place = match baseline {
            None => 0,
            Some(wanted) => match grouped.iter().position(|arm| arm.name == wanted) {
                Some(place) => place,
                None => bail_input!("--baseline {wanted}: no arm of this name; the arms are {}", names()),
            },
        };
        // The baseline stands first, the others in the order in which they were given.
        grouped[..=place].rotate_right(1);
        let arms = grouped.iter().map(arms::arm).collect::<Result<Vec<Arm>>>()?;
        let pairs = pairs::against_baseline(&arms)?;
        let left_out = warnings::not_validated(runs.iter().copied());
        let warnings = left_out.into_iter().chain(warnings::of(&grouped));
        Ok(Comparison {
            baseline: arms[0].arm.clone(),
            notes: notes(&pairs),
            config_differences: config_differences(&grouped),
            warnings: warnings.map(|warning| warning.1).collect(),
            arms,
            pairs,
        })
    }
}

fn notes(pairs: &[Pair]) -> Vec<String> {
    let mut notes = vec![
        "accuracy: of the last validation, with Wilson's 95 % interval; best: the highest of all validations, which is optimistic, since the same questions chose it".to_string(),
    ];
    if pairs.is_empty() {
        return notes;
    }
    let has = |method: Method| pairs.iter().any(|pair| pair.figures.method == method);
    notes.push(format!(
        "Holm: over the family of all {} tests of this table, every arm and condition; the tests of single seeds are not adjusted",
        pairs.iter().filter(|pair| pair.figures.p.is_some()).count()
    ));
    if has(Method::TwoWay) || has(Method::TwoWayUnpaired) {
        notes.push(
            "several seeds: interval and p from the spread over seeds and questions, by Student's t with as many degrees of freedom as the seeds give; bootstrap: percentiles of 10000 resamples of seeds and questions, too narrow for fewer than about 10 seeds that differ".to_string(),
        );
    }
    if has(Method::McNemar) {
        notes.push("one seed: McNemar's mid-p, interval of Agresti and Min; both are about these two checkpoints, not about the arms".to_string());
    }
    notes.push(
        "detectable: the difference that a two-sided test at 5 % would find with about 80 % probability, (t_0.975 + t_0.80) SE; one seed: SE = sqrt(discordant questions) / n".to_string(),
    );
    notes
}
