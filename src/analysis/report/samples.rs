//! Some completions at the first, middle and last step of an arm's first seed.

use serde::Serialize;
use serde_json::Value;

use super::arms::Arm;

const PER_STEP: usize = 3;
/// A long one is cut, and says so.
const MOST_CHARACTERS: usize = 1500;

#[derive(Serialize)]
pub(super) struct OfArm {
    arm: String,
    colour: usize,
    seed: u64,
    steps: Vec<OfStep>,
}

#[derive(Serialize)]
struct OfStep {
    step: u64,
    completions: Vec<Completion>,
}

#[derive(Serialize)]
struct Completion {
    question: Option<u64>,
    reward: f64,
    advantage: f64,
    finished: bool,
    text: String,
    left_out: usize,
}

pub(super) fn samples(arms: &[Arm]) -> Vec<OfArm> {
    let of_arm = |(colour, arm): (usize, &Arm)| {
        let run = arm.runs.iter().find(|run| !run.samples.is_empty())?;
        let mut steps: Vec<u64> = run.samples.iter().filter_map(|row| row["step"].as_u64()).collect();
        steps.dedup();
        let mut chosen = vec![*steps.first()?, steps[steps.len() / 2], *steps.last()?];
        chosen.dedup();
        let steps = chosen.into_iter().map(|step| OfStep {
            step,
            completions: run.samples.iter().filter(|row| row["step"] == step).take(PER_STEP).map(completion).collect(),
        });
        Some(OfArm { arm: arm.label.clone(), colour, seed: run.files.seed, steps: steps.collect() })
    };
    arms.iter().enumerate().filter_map(of_arm).collect()
}

fn completion(row: &Value) -> Completion {
    let whole = row["response"].as_str().unwrap_or_default();
    let text: String = whole.chars().take(MOST_CHARACTERS).collect();
    Completion {
        question: row["dataset_index"].as_u64(),
        reward: row["reward"].as_f64().unwrap_or(f64::NAN),
        advantage: row["advantage"].as_f64().unwrap_or(f64::NAN),
        finished: row["finished"] == true,
        left_out: whole.chars().count() - text.chars().count(),
        text,
    }
}
