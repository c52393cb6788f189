//! Prints what a run achieved, from its files: the source of truth, also for a run that was resumed.

use std::path::Path;

use comfy_table::{Table, presets};
use serde_json::{Value, json};

use super::Global;
use crate::Result;
use crate::analysis::run_files::{RunFiles, correct};
use crate::analysis::statistics::wilson_interval;
use crate::rl::evaluation::Condition;

/// First and last validation side by side, with n and 95 % Wilson intervals.
pub fn print(run_dir: &Path, global: &Global) -> Result<()> {
    let run = RunFiles::read(run_dir)?;
    let (disagreeing_steps, stopped) = (run.disagreeing_steps().len(), &run.stopped);
    let (Some(first), Some(last)) = (run.validations.first(), run.validations.last()) else {
        return Ok(());
    };
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_header(["accuracy".to_string(), heading(first, "before"), heading(last, "after"), "n".to_string()]);
    let mut results = Vec::new();
    for condition in Condition::ALL {
        let name = condition.name();
        let (Some((before, n)), Some((after, _))) = (correct(first, condition), correct(last, condition)) else {
            continue;
        };
        table.add_row([name.to_string(), cell(before, n), cell(after, n), n.to_string()]);
        results.push(json!({
            "condition": name, "n": n,
            "before": accuracy(before, n), "after": accuracy(after, n),
        }));
    }
    if global.json {
        let value = json!({
            "run_dir": run_dir, "conditions": results, "steps": last["step"],
            "disagreeing_steps": disagreeing_steps, "stopped": stopped,
        });
        return super::print(value);
    }
    let mut text = format!("{table}\nrun directory: {}", run_dir.display());
    if let Some(stopped) = stopped {
        text += &format!("\nended by {stopped}");
    }
    if disagreeing_steps > 0 {
        text += &format!(
            "\nWARNING: in {disagreeing_steps} steps the measured noise disagreed with the plan (see injection.jsonl)"
        );
    }
    super::print(text)
}

/// The share of right answers.
pub fn share((correct, n): (u64, u64)) -> f64 {
    correct as f64 / n.max(1) as f64
}

/// Only a validation of step 0 was before training.
fn heading(row: &Value, word: &str) -> String {
    match (row["step"].as_u64(), word) {
        (Some(0), "before") => "before".to_string(),
        (Some(step), _) => format!("after step {step}"),
        (None, _) => word.to_string(),
    }
}

fn cell(correct: u64, n: u64) -> String {
    let (low, high) = wilson_interval(correct, n);
    format!("{:.1} % [{:.1}, {:.1}]", 100.0 * share((correct, n)), 100.0 * low, 100.0 * high)
}

/// One condition's result as JSON.
pub fn accuracy(correct: u64, n: u64) -> Value {
    let (low, high) = wilson_interval(correct, n);
    json!({"correct": correct, "accuracy": share((correct, n)), "ci95": [low, high]})
}
