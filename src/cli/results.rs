//! Prints what a run achieved, from its metrics.jsonl: the source of truth, also for a run that was resumed.

use std::path::Path;

use comfy_table::{Table, presets};
use serde_json::{Value, json};

use super::Global;
use crate::analysis::statistics::wilson_interval;
use crate::rl::evaluation::Condition;
use crate::{Error, Result, input_error};

/// The rows of metrics.jsonl, in order.
fn metrics(run_dir: &Path) -> Result<Vec<Value>> {
    let path = run_dir.join("metrics.jsonl");
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let mut rows = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let row: Value =
            serde_json::from_str(line).map_err(|e| input_error!("{} line {}: {e}", path.display(), number + 1))?;
        rows.push(row);
    }
    Ok(rows)
}

/// First and last validation side by side, with n and 95 % Wilson intervals.
pub fn print(run_dir: &Path, global: &Global) -> Result<()> {
    let rows = metrics(run_dir)?;
    let disagreeing_steps = rows.iter().filter(|row| row["injection/disagreements"].as_u64().unwrap_or(0) > 0).count();
    let validations: Vec<&Value> = rows.iter().filter(|row| row["kind"] == "val").collect();
    let (Some(first), Some(last)) = (validations.first(), validations.last()) else {
        return Ok(());
    };
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_header(["accuracy".to_string(), heading(first, "before"), heading(last, "after"), "n".to_string()]);
    let mut results = Vec::new();
    for condition in Condition::ALL {
        let name = condition.name();
        let (Some((before, n)), Some((after, _))) = (counts(first, name), counts(last, name)) else {
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
            "disagreeing_steps": disagreeing_steps,
        });
        return super::print(value);
    }
    let mut text = format!("{table}\nrun directory: {}", run_dir.display());
    if disagreeing_steps > 0 {
        text += &format!(
            "\nWARNING: in {disagreeing_steps} steps the measured noise disagreed with the plan (see injection.jsonl)"
        );
    }
    super::print(text)
}

/// The share of right answers of the last validation under `condition`; None where there is none.
pub fn last_accuracy(run_dir: &Path, condition: Condition) -> Result<Option<f64>> {
    let rows = metrics(run_dir)?;
    let last = rows.iter().rev().find(|row| row["kind"] == "val");
    let found = last.and_then(|row| counts(row, condition.name()));
    Ok(found.map(|(correct, n)| correct as f64 / n.max(1) as f64))
}

/// Only a validation of step 0 was before training.
fn heading(row: &Value, word: &str) -> String {
    match (row["step"].as_u64(), word) {
        (Some(0), "before") => "before".to_string(),
        (Some(step), _) => format!("after step {step}"),
        (None, _) => word.to_string(),
    }
}

fn counts(row: &Value, condition: &str) -> Option<(u64, u64)> {
    Some((row[format!("val/correct_{condition}")].as_u64()?, row["val/n"].as_u64()?))
}

fn cell(correct: u64, n: u64) -> String {
    let (low, high) = wilson_interval(correct, n);
    format!("{:.1} % [{:.1}, {:.1}]", 100.0 * correct as f64 / n.max(1) as f64, 100.0 * low, 100.0 * high)
}

/// One condition's result as JSON.
pub fn accuracy(correct: u64, n: u64) -> Value {
    let (low, high) = wilson_interval(correct, n);
    json!({"correct": correct, "accuracy": correct as f64 / n.max(1) as f64, "ci95": [low, high]})
}
