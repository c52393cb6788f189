//! A comparison as text, Markdown and CSV.

use comfy_table::presets;

use super::{Arm, ArmCondition, Comparison, Pair, RunCondition, RunResult};
use crate::analysis::arms::{KeyDifference, plain};
use crate::rl::evaluation::Condition;

struct Table {
    title: String,
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

/// For a terminal.
pub fn text(comparison: &Comparison) -> String {
    let mut parts: Vec<String> = tables(comparison)
        .into_iter()
        .map(|table| {
            let mut drawn = comfy_table::Table::new();
            drawn.load_style(presets::NOTHING).set_header(&table.header).add_rows(&table.rows);
            let lines: Vec<String> = drawn.to_string().lines().map(|line| line.trim_end().to_string()).collect();
            format!("{}\n{}", table.title, lines.join("\n"))
        })
        .collect();
    parts.push(comparison.notes.iter().map(|note| format!("note: {note}")).collect::<Vec<_>>().join("\n"));
    if !comparison.warnings.is_empty() {
        let lines: Vec<String> = comparison.warnings.iter().map(|warning| format!("WARNING: {warning}")).collect();
        parts.push(lines.join("\n"));
    }
    parts.join("\n\n")
}

pub fn markdown(comparison: &Comparison) -> String {
    let line = |cells: &[String]| {
        format!("| {} |", cells.iter().map(|cell| cell.replace('|', "\\|")).collect::<Vec<_>>().join(" | "))
    };
    let mut parts: Vec<String> = tables(comparison)
        .into_iter()
        .map(|table| {
            let rule = format!("|{}", "---|".repeat(table.header.len()));
            let rows: Vec<String> = table.rows.iter().map(|row| line(row)).collect();
            format!("**{}**\n\n{}\n{rule}\n{}", table.title, line(&table.header), rows.join("\n"))
        })
        .collect();
    let items = |prefix: &str, texts: &[String]| {
        texts.iter().map(|text| format!("- {prefix}{text}")).collect::<Vec<_>>().join("\n")
    };
    parts.push(items("", &comparison.notes));
    if !comparison.warnings.is_empty() {
        parts.push(items("**Warning:** ", &comparison.warnings));
    }
    parts.join("\n\n")
}

/// One row a run and condition, then one an arm and condition with its comparison; accuracies are shares, in full.
pub fn csv(comparison: &Comparison) -> String {
    const HEADER: &str = "level,arm,seed,condition,step,correct,n,accuracy,ci95_low,ci95_high,best_step,best_accuracy,\
        seeds,standard_error,difference,difference_low,difference_high,p,p_holm,bootstrap_low,bootstrap_high,\
        minimum_detectable_difference";
    let mut lines = vec![HEADER.to_string()];
    for arm in &comparison.arms {
        for (run, found) in each_run(arm) {
            lines.push(csv_line(&[
                text_cell("run"),
                text_cell(&arm.arm),
                run.seed.to_string(),
                found.condition.name().to_string(),
                found.step.to_string(),
                found.correct.to_string(),
                found.n.to_string(),
                found.accuracy.to_string(),
                found.ci95.0.to_string(),
                found.ci95.1.to_string(),
                found.best_step.to_string(),
                found.best_accuracy.to_string(),
            ]));
        }
    }
    for arm in &comparison.arms {
        for found in &arm.conditions {
            let pair = comparison.pairs.iter().find(|p| p.arm == arm.arm && p.condition == found.condition);
            lines.push(csv_line(&arm_cells(arm, found, pair)));
        }
    }
    lines.join("\n")
}

fn arm_cells(arm: &Arm, found: &ArmCondition, pair: Option<&Pair>) -> Vec<String> {
    let number = |value: Option<f64>| value.map_or_else(String::new, |value| value.to_string());
    let figures = pair.map(|pair| &pair.figures);
    let interval = figures.and_then(|figures| figures.ci95);
    let bootstrap = figures.and_then(|figures| figures.bootstrap_ci95);
    let mut cells = vec![text_cell("arm"), text_cell(&arm.arm), String::new(), found.condition.name().to_string()];
    cells.extend([String::new(), String::new(), pair.map_or_else(String::new, |pair| pair.n.to_string())]);
    cells.extend([Some(found.mean), found.ci95.map(|c| c.0), found.ci95.map(|c| c.1)].map(number));
    cells.extend([String::new(), String::new(), found.seeds.to_string(), number(found.standard_error)]);
    cells.extend(
        [
            figures.map(|f| f.difference),
            interval.map(|i| i.0),
            interval.map(|i| i.1),
            figures.and_then(|f| f.p),
            pair.and_then(|pair| pair.p_holm),
            bootstrap.map(|b| b.0),
            bootstrap.map(|b| b.1),
            pair.and_then(|pair| pair.minimum_detectable_difference),
        ]
        .map(number),
    );
    cells
}

/// Every row has all columns.
fn csv_line(cells: &[String]) -> String {
    const COLUMNS: usize = 22;
    let mut cells = cells.to_vec();
    cells.resize(COLUMNS, String::new());
    cells.join(",")
}

fn text_cell(text: &str) -> String {
    if text.contains(['"', ',']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text.to_string() }
}

fn tables(comparison: &Comparison) -> Vec<Table> {
    let mut tables = vec![runs(comparison), arms(comparison)];
    if !comparison.pairs.is_empty() {
        tables.push(pairs(comparison));
    }
    if comparison.pairs.iter().any(|pair| !pair.by_seed.is_empty()) {
        tables.push(by_seed(comparison));
    }
    if !comparison.config_differences.is_empty() {
        tables.push(config_differences(comparison));
    }
    tables
}

fn runs(comparison: &Comparison) -> Table {
    let row = |arm: &Arm, run: &RunResult, found: &RunCondition| {
        vec![
            arm.arm.clone(),
            run.seed.to_string(),
            found.condition.name().to_string(),
            found.step.to_string(),
            format!("{} / {}", found.correct, found.n),
            percent(found.accuracy),
            interval(found.ci95),
            format!("{} (step {})", percent(found.best_accuracy), found.best_step),
        ]
    };
    let rows =
        comparison.arms.iter().flat_map(|arm| each_run(arm).map(move |(run, found)| row(arm, run, found))).collect();
    let header = ["arm", "seed", "condition", "step", "correct", "accuracy, %", "95 % interval", "best, %"];
    table("runs", &header, rows)
}

fn arms(comparison: &Comparison) -> Table {
    let row = |arm: &Arm, found: &ArmCondition| {
        vec![
            arm.arm.clone(),
            found.condition.name().to_string(),
            found.seeds.to_string(),
            percent(found.mean),
            found.standard_error.map_or_else(nothing, percent),
            found.ci95.map_or_else(nothing, interval),
        ]
    };
    let rows = comparison.arms.iter().flat_map(|arm| arm.conditions.iter().map(move |found| row(arm, found))).collect();
    table("arms, over seeds", &["arm", "condition", "seeds", "mean, %", "standard error", "95 % interval (t)"], rows)
}

fn pairs(comparison: &Comparison) -> Table {
    let row = |pair: &Pair| {
        let figures = &pair.figures;
        let seeds = match figures.seeds {
            (one, other) if one == other => one.to_string(),
            (one, other) => format!("{one}, {other}"),
        };
        vec![
            pair.arm.clone(),
            pair.condition.name().to_string(),
            format!("{seeds} x {}", pair.n),
            signed_percent(figures.difference),
            figures.ci95.map_or_else(nothing, signed_interval),
            probability(figures.p),
            probability(pair.p_holm),
            figures.bootstrap_ci95.map_or_else(nothing, signed_interval),
            pair.minimum_detectable_difference.map_or_else(nothing, percent),
        ]
    };
    let header =
        ["arm", "condition", "seeds x n", "points", "95 % interval", "p", "p (Holm)", "bootstrap", "detectable"];
    let rows = comparison.pairs.iter().map(row).collect();
    table(&format!("difference from {}", comparison.baseline), &header, rows)
}

fn by_seed(comparison: &Comparison) -> Table {
    let mut rows = Vec::new();
    for pair in &comparison.pairs {
        for found in &pair.by_seed {
            rows.push(vec![
                pair.arm.clone(),
                pair.condition.name().to_string(),
                found.seed.to_string(),
                found.test.first_only.to_string(),
                found.test.second_only.to_string(),
                probability(Some(found.test.p_mid)),
                probability(Some(found.test.p_exact)),
            ]);
        }
    }
    let header = ["arm", "condition", "seed", "b: arm alone", "c: baseline alone", "mid-p", "exact p"];
    table("McNemar, seed by seed", &header, rows)
}

fn config_differences(comparison: &Comparison) -> Table {
    let header: Vec<&str> = std::iter::once("key").chain(comparison.arms.iter().map(|arm| arm.arm.as_str())).collect();
    let row = |difference: &KeyDifference| {
        std::iter::once(difference.key.clone()).chain(difference.values.values().map(plain)).collect()
    };
    table("configurations differ in", &header, comparison.config_differences.iter().map(row).collect())
}

/// Condition by condition, seed by seed.
fn each_run(arm: &Arm) -> impl Iterator<Item = (&RunResult, &RunCondition)> {
    Condition::ALL
        .into_iter()
        .flat_map(move |condition| arm.runs.iter().filter_map(move |run| Some((run, run.condition(condition)?))))
}

fn table(title: &str, header: &[&str], rows: Vec<Vec<String>>) -> Table {
    Table { title: title.to_string(), header: header.iter().map(|cell| cell.to_string()).collect(), rows }
}

fn nothing() -> String {
    "-".to_string()
}

fn percent(share: f64) -> String {
    format!("{:.2}", 100.0 * share)
}

fn interval((low, high): (f64, f64)) -> String {
    format!("[{}, {}]", percent(low), percent(high))
}

fn signed_percent(share: f64) -> String {
    format!("{:+.2}", 100.0 * share)
}

fn signed_interval((low, high): (f64, f64)) -> String {
    format!("[{}, {}]", signed_percent(low), signed_percent(high))
}

/// Four decimals; no p is 0.
pub fn probability(p: Option<f64>) -> String {
    match p {
        None => nothing(),
        Some(p) if p < 0.0001 => "<0.0001".to_string(),
        Some(p) => format!("{p:.4}"),
    }
}
