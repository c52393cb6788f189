//! Accuracy before and after training, by arm and condition: Wilson's interval of each run, mean and standard error over
//! seeds, difference to the first arm paired by seed.

use serde::Serialize;
use serde_json::Value;

use super::arms::{Arm, Run};
use crate::analysis::run_files::correct;
use crate::analysis::statistics::{mean_and_standard_error, wilson_interval};
use crate::rl::evaluation::Condition;

/// One arm under one condition.
#[derive(Serialize)]
pub(super) struct Row {
    arm: String,
    colour: usize,
    condition: &'static str,
    seeds: usize,
    n: u64,
    before: String,
    after: String,
    /// Of accuracy over training, in points.
    change: String,
    /// To the first arm, in points; empty in its own row.
    difference: String,
    each: Vec<Each>,
}

/// One run under one condition, after training.
#[derive(Serialize)]
struct Each {
    seed: u64,
    step: u64,
    correct: u64,
    n: u64,
    accuracy: String,
    interval: String,
    /// Where they lie in the table's picture, 0 to 100.
    low: f64,
    at: f64,
    high: f64,
}

#[derive(Serialize)]
pub(super) struct Accuracies {
    rows: Vec<Row>,
    /// Ends of the picture's axis, in %.
    from: f64,
    to: f64,
}

pub(super) fn accuracies(arms: &[Arm]) -> Accuracies {
    let (from, to) = axis(arms);
    let mut rows = Vec::new();
    for condition in Condition::ALL {
        for (colour, arm) in arms.iter().enumerate() {
            rows.extend(row(arms, colour, arm, condition, (from, to)));
        }
    }
    Accuracies { rows, from, to }
}

fn row(arms: &[Arm], colour: usize, arm: &Arm, condition: Condition, axis: (f64, f64)) -> Option<Row> {
    let each: Vec<Each> = arm.runs.iter().filter_map(|run| each(run, condition, axis)).collect();
    let (_, n, _) = arm.runs.iter().find_map(|run| last(run, condition))?;
    let paired: Vec<f64> = arm
        .runs
        .iter()
        .filter_map(|run| {
            let twin = arms[0].runs.iter().find(|first| first.files.seed == run.files.seed)?;
            Some(percent(last(run, condition)?) - percent(last(twin, condition)?))
        })
        .collect();
    let change = |run: &Run| Some(percent(last(run, condition)?) - percent(first(run, condition)?));
    Some(Row {
        arm: arm.label.clone(),
        colour,
        condition: condition.name(),
        seeds: each.len(),
        n,
        before: of_runs(arm, first, condition),
        after: of_runs(arm, last, condition),
        change: signed(&arm.runs.iter().filter_map(change).collect::<Vec<_>>()),
        difference: match (colour, paired.is_empty()) {
            (0, _) => String::new(),
            (_, true) => "no common seed".to_string(),
            _ => signed(&paired),
        },
        each,
    })
}

type Counted = fn(&Run, Condition) -> Option<(u64, u64, u64)>;

/// (right, questions, step) of the validation before the first step.
fn first(run: &Run, condition: Condition) -> Option<(u64, u64, u64)> {
    counted(run.files.validations.first().filter(|row| row["step"] == 0)?, condition)
}

/// The same of the last validation.
fn last(run: &Run, condition: Condition) -> Option<(u64, u64, u64)> {
    counted(run.files.validations.last()?, condition)
}

fn counted(row: &Value, condition: Condition) -> Option<(u64, u64, u64)> {
    let (correct, n) = correct(row, condition)?;
    Some((correct, n, row["step"].as_u64()?))
}

fn percent((correct, n, _): (u64, u64, u64)) -> f64 {
    100.0 * correct as f64 / n.max(1) as f64
}

/// Mean and standard error over seeds; of one run Wilson's interval.
fn of_runs(arm: &Arm, counted: Counted, condition: Condition) -> String {
    let found: Vec<(u64, u64, u64)> = arm.runs.iter().filter_map(|run| counted(run, condition)).collect();
    let shares: Vec<f64> = found.iter().copied().map(percent).collect();
    match (found.as_slice(), mean_and_standard_error(&shares)) {
        ([(k, n, _)], _) => format!("{:.1} {}", shares[0], interval(*k, *n)),
        (_, Some(all)) => format!("{:.1} ± {:.1}", all.mean, all.standard_error),
        (_, None) => "–".to_string(),
    }
}

fn signed(values: &[f64]) -> String {
    match mean_and_standard_error(values) {
        Some(all) if all.n > 1 => format!("{:+.1} ± {:.1}", all.mean, all.standard_error),
        Some(all) => format!("{:+.1}", all.mean),
        None => "–".to_string(),
    }
}

fn interval(correct: u64, n: u64) -> String {
    let (low, high) = wilson_interval(correct, n);
    format!("[{:.1}, {:.1}]", 100.0 * low, 100.0 * high)
}

fn each(run: &Run, condition: Condition, (from, to): (f64, f64)) -> Option<Each> {
    let (correct, n, step) = last(run, condition)?;
    let place = |percent: f64| ((percent - from) / (to - from) * 1e4).round() / 100.0;
    let (low, high) = wilson_interval(correct, n);
    Some(Each {
        seed: run.files.seed,
        step,
        correct,
        n,
        accuracy: format!("{:.1}", percent((correct, n, step))),
        interval: interval(correct, n),
        low: place(100.0 * low),
        at: place(percent((correct, n, step))),
        high: place(100.0 * high),
    })
}

/// Tens that hold every interval.
fn axis(arms: &[Arm]) -> (f64, f64) {
    let runs = || arms.iter().flat_map(|arm| &arm.runs);
    let found = runs().flat_map(|run| Condition::ALL.into_iter().filter_map(|condition| last(run, condition)));
    let ends = found.map(|(correct, n, _)| wilson_interval(correct, n));
    let (low, high) = ends.fold((1.0f64, 0.0f64), |(low, high), end| (low.min(end.0), high.max(end.1)));
    if low >= high { (0.0, 100.0) } else { ((10.0 * low).floor() * 10.0, (10.0 * high).ceil() * 10.0) }
}
