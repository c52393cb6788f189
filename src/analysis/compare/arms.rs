//! What each run of an arm reached, and all of them.

use std::path::PathBuf;

use serde::Serialize;
use serde_json::Value;

use crate::Result;
use crate::analysis::arms;
use crate::analysis::run_files::{RunFiles, correct};
use crate::analysis::statistics::{mean_and_standard_error, wilson_interval};
use crate::rl::evaluation::Condition;

#[derive(Debug, Serialize)]
pub struct Arm {
    /// The runs' name; with the configuration's hash where another arm has the same name.
    pub arm: String,
    pub config_hash: String,
    /// By seed.
    pub runs: Vec<RunResult>,
    /// Over seeds.
    pub conditions: Vec<ArmCondition>,
}

#[derive(Debug, Serialize)]
pub struct RunResult {
    pub path: PathBuf,
    pub seed: u64,
    pub last_step: u64,
    /// Steps of the whole run; None where the files do not tell.
    pub total_steps: Option<u64>,
    pub conditions: Vec<RunCondition>,
    /// Runs with the same text answered the same questions.
    #[serde(skip)]
    pub questions: String,
}

#[derive(Debug, Serialize)]
pub struct RunCondition {
    pub condition: Condition,
    pub step: u64,
    pub correct: u64,
    pub n: u64,
    pub accuracy: f64,
    pub ci95: (f64, f64),
    pub best_step: u64,
    pub best_accuracy: f64,
    /// One per question; None where metrics.jsonl has none.
    #[serde(skip)]
    pub marks: Option<Vec<bool>>,
}

#[derive(Debug, Serialize)]
pub struct ArmCondition {
    pub condition: Condition,
    pub seeds: usize,
    pub mean: f64,
    /// None for one seed.
    pub standard_error: Option<f64>,
    /// Student's t over seeds, within 0..1; None for one seed, and where all are equal.
    pub ci95: Option<(f64, f64)>,
}

impl RunResult {
    pub fn condition(&self, condition: Condition) -> Option<&RunCondition> {
        self.conditions.iter().find(|found| found.condition == condition)
    }
}

pub fn arm(arm: &arms::Arm<&RunFiles>) -> Result<Arm> {
    let runs = arm.runs.iter().map(|run| result(run)).collect::<Result<Vec<RunResult>>>()?;
    let over_seeds = |condition: Condition| {
        let each: Vec<f64> = runs.iter().filter_map(|run| Some(run.condition(condition)?.accuracy)).collect();
        let mean = mean_and_standard_error(&each)?;
        let standard_error = Some(mean.standard_error).filter(|e| e.is_finite());
        // Seeds that agree by chance say nothing of how far others would lie.
        let ci95 = mean.interval().filter(|(low, high)| low < high).map(|(low, high)| (low.max(0.0), high.min(1.0)));
        Some(ArmCondition { condition, seeds: mean.n, mean: mean.mean, standard_error, ci95 })
    };
    let conditions = Condition::ALL.into_iter().filter_map(over_seeds).collect();
    Ok(Arm { arm: arm.name.clone(), config_hash: arm.first().config_hash.clone(), runs, conditions })
}

fn result(run: &RunFiles) -> Result<RunResult> {
    let conditions = run.conditions().into_iter().filter_map(|c| of_condition(run, c).transpose());
    Ok(RunResult {
        path: run.path.clone(),
        seed: run.seed,
        last_step: run.last_step(),
        total_steps: run.planned_steps(),
        conditions: conditions.collect::<Result<_>>()?,
        questions: run.questions(),
    })
}

/// None where the last validation has not this condition.
fn of_condition(run: &RunFiles, condition: Condition) -> Result<Option<RunCondition>> {
    let share = |(correct, n): (u64, u64)| correct as f64 / n.max(1) as f64;
    let step = |row: &Value| row["step"].as_u64().unwrap_or(0);
    let Some((last, (right, n))) = run.validations.last().and_then(|row| Some((row, correct(row, condition)?))) else {
        return Ok(None);
    };
    // The first of equals.
    let mut best = (step(last), f64::NEG_INFINITY);
    for row in &run.validations {
        if let Some(accuracy) = correct(row, condition).map(share).filter(|accuracy| *accuracy > best.1) {
            best = (step(row), accuracy);
        }
    }
    let marks = run.marks(condition).map(|marks| marks.bytes().map(|mark| mark == b'1').collect::<Vec<bool>>());
    Ok(Some(RunCondition {
        condition,
        step: step(last),
        correct: right,
        n,
        accuracy: share((right, n)),
        ci95: wilson_interval(right, n),
        best_step: best.0,
        best_accuracy: best.1,
        marks,
    }))
}
