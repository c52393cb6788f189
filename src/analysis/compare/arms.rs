//! Runs as arms: which runs belong together, and what each and all of them reached.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use crate::analysis::run_files::{RunFiles, correct};
use crate::analysis::statistics::{mean_and_standard_error, wilson_interval};
use crate::rl::evaluation::Condition;
use crate::{Error, Result, bail_input};

#[derive(Debug, Serialize)]
pub struct Arm {
    /// The runs' name; with the configuration's hash where another arm has the same name.
    pub arm: String,
    pub config_hash: String,
    /// By seed.
    pub runs: Vec<RunResult>,
    /// Over seeds.
    pub conditions: Vec<ArmCondition>,
    /// Of the first run.
    #[serde(skip)]
    pub config: Value,
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
    /// Student's t over seeds; None for one seed.
    pub ci95: Option<(f64, f64)>,
}

impl Arm {
    pub fn run(&self, seed: u64) -> Option<&RunResult> {
        self.runs.iter().find(|run| run.seed == seed)
    }
}

impl RunResult {
    pub fn condition(&self, condition: Condition) -> Option<&RunCondition> {
        self.conditions.iter().find(|found| found.condition == condition)
    }
}

/// Reads run directories, and those that lie in a directory of runs, in the order of their names. None is read twice.
///
/// # Errors
/// `Error::Input`: what is neither; a broken file in one.
pub fn read_runs(paths: &[PathBuf]) -> Result<Vec<RunFiles>> {
    let mut found: Vec<PathBuf> = Vec::new();
    for path in paths {
        if path.join("run.json").is_file() {
            found.push(path.clone());
            continue;
        }
        let entries = std::fs::read_dir(path).map_err(|e| Error::io(path, e))?;
        let mut inside: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(|p| is_run(p)).collect();
        if inside.is_empty() {
            bail_input!(
                "{}: expected a run directory or a directory of runs, found no run.json in it or below it",
                path.display()
            );
        }
        inside.sort();
        found.extend(inside);
    }
    let real = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    let mut seen: Vec<PathBuf> = Vec::new();
    found.retain(|path| {
        let new = !seen.contains(&real(path));
        seen.push(real(path));
        new
    });
    found.iter().map(|path| RunFiles::read(path)).collect()
}

/// Not `latest` of a sweep or another link: what it points at is there by itself.
fn is_run(path: &Path) -> bool {
    !path.is_symlink() && path.join("run.json").is_file()
}

/// The arms of runs that were validated, in the order of their first runs.
pub fn arms(runs: &[RunFiles]) -> Result<Vec<Arm>> {
    let mut groups: Vec<Vec<&RunFiles>> = Vec::new();
    for run in runs.iter().filter(|run| !run.conditions().is_empty()) {
        let same =
            |group: &&mut Vec<&RunFiles>| (&group[0].name, &group[0].config_hash) == (&run.name, &run.config_hash);
        match groups.iter_mut().find(same) {
            Some(group) => group.push(run),
            None => groups.push(vec![run]),
        }
    }
    let mut arms = Vec::new();
    for group in &groups {
        let first = group[0];
        let name = match groups.iter().filter(|other| other[0].name == first.name).count() {
            1 => first.name.clone(),
            _ => format!("{}-{}", first.name, first.config_hash),
        };
        arms.push(arm(name, group)?);
    }
    Ok(arms)
}

fn arm(arm: String, group: &[&RunFiles]) -> Result<Arm> {
    let mut runs = group.iter().map(|run| result(run)).collect::<Result<Vec<RunResult>>>()?;
    runs.sort_by_key(|run| run.seed);
    if let Some([one, other]) = runs.windows(2).find(|two| two[0].seed == two[1].seed) {
        bail_input!("{} and {}: both are seed {} of {arm}", one.path.display(), other.path.display(), one.seed);
    }
    let over_seeds = |condition: Condition| {
        let each: Vec<f64> = runs.iter().filter_map(|run| Some(run.condition(condition)?.accuracy)).collect();
        let mean = mean_and_standard_error(&each)?;
        let standard_error = Some(mean.standard_error).filter(|e| e.is_finite());
        Some(ArmCondition { condition, seeds: mean.n, mean: mean.mean, standard_error, ci95: mean.interval() })
    };
    let conditions = Condition::ALL.into_iter().filter_map(over_seeds).collect();
    let config = group[0].config.clone();
    Ok(Arm { arm, config_hash: group[0].config_hash.clone(), runs, conditions, config })
}

fn result(run: &RunFiles) -> Result<RunResult> {
    let conditions = run.conditions().into_iter().filter_map(|c| of_condition(run, c).transpose());
    let data = &run.config["data"];
    let questions = format!("{} {} {}", data["kind"], data["generated"]["seed"], run.run["inputs"]["data.val"]);
    Ok(RunResult {
        path: run.path.clone(),
        seed: run.seed,
        last_step: run.last_step(),
        total_steps: total_steps(run),
        conditions: conditions.collect::<Result<_>>()?,
        questions,
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
    let key = format!("val/questions_{}", condition.name());
    let marks = last[&key].as_str().map(|marks| marks.bytes().map(|mark| mark == b'1').collect::<Vec<bool>>());
    if let Some(marks) = &marks {
        let count = marks.iter().filter(|mark| **mark).count() as u64;
        if (count, marks.len() as u64) != (right, n) {
            bail_input!(
                "{}: step {}: {key} has {count} right answers of {}, expected {right} of {n} as beside it",
                run.path.join("metrics.jsonl").display(),
                step(last),
                marks.len()
            );
        }
    }
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

/// Steps of the whole run: epochs times the steps of the first, which a later step shows to be whole; or from the number of
/// questions, where the configuration has it.
fn total_steps(run: &RunFiles) -> Option<u64> {
    let epochs = run.config["trainer"]["epochs"].as_u64()?;
    let epoch = |row: &Value| row["epoch"].as_u64();
    let in_first = run.train.iter().filter(|row| epoch(row) == Some(0)).count() as u64;
    if run.train.last().and_then(epoch).is_some_and(|epoch| epoch > 0) {
        return Some(in_first * epochs);
    }
    let data = &run.config["data"];
    let limit = data["train_limit"].as_u64();
    let questions = match data["kind"].as_str()? {
        "generated" => {
            let made = data["generated"]["train_problems"].as_u64()?;
            limit.unwrap_or(made).min(made)
        }
        // A file may hold fewer than the limit: then the run ends below what is expected here.
        _ => return None,
    };
    Some(questions / data["prompts_per_step"].as_u64().filter(|prompts| *prompts > 0)? * epochs)
}
