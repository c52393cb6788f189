//! Which runs a page is about. Runs of one name and configuration hash are the seeds of one arm.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::Value;

use super::layers::LayerSums;
use crate::analysis::run_files::RunFiles;
use crate::run::stopped::{self, Stopped};
use crate::{Error, Result, bail_input};

/// Runs that differ in their seed alone.
pub struct Arm {
    /// The name without what all arms' names begin with.
    pub label: String,
    /// In the order of their seeds.
    pub runs: Vec<Run>,
}

pub struct Run {
    pub files: RunFiles,
    /// Rows of timing.jsonl.
    pub timing: Vec<Value>,
    /// Rows of samples.jsonl.
    pub samples: Vec<Value>,
    pub(super) layers: LayerSums,
    /// What console.log warns of, without repetitions.
    pub warnings: Vec<String>,
    /// The stop rule that ended it.
    pub stopped: Option<Stopped>,
    /// config.yaml as it lies there.
    pub config_text: String,
}

impl Run {
    fn read(path: &Path) -> Result<Run> {
        let files = RunFiles::read(path)?;
        let console = match std::fs::read(path.join("console.log")) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(_) => String::new(), // a copy for people, which a run can do without
        };
        let mut warnings: Vec<String> = Vec::new();
        for line in console.lines().filter_map(|line| line.strip_prefix("warning: ")) {
            if !warnings.iter().any(|known| known == line) {
                warnings.push(line.to_string());
            }
        }
        let config_path = path.join("config.yaml");
        let config_text = std::fs::read_to_string(&config_path).map_err(|e| Error::io(&config_path, e))?;
        Ok(Run {
            timing: files.rows("timing.jsonl")?,
            samples: files.rows("samples.jsonl")?,
            layers: LayerSums::read(&files)?,
            warnings,
            stopped: stopped::read(path)?,
            config_text,
            files,
        })
    }

    /// The steps that the run was to have, where its files tell: the questions of a generated task, or a whole epoch
    /// that it has done.
    pub fn planned_steps(&self) -> Option<u64> {
        let config = &self.files.config;
        let epochs = config["trainer"]["epochs"].as_u64()?;
        let data = &config["data"];
        let per_epoch = if data["kind"] == "generated" {
            let problems = data["generated"]["train_problems"].as_u64()?;
            let questions = data["train_limit"].as_u64().map_or(problems, |limit| limit.min(problems));
            questions / data["prompts_per_step"].as_u64().filter(|n| *n > 0)?
        } else {
            let in_epoch = |epoch: u64| self.files.train.iter().filter(|row| row["epoch"] == epoch).count() as u64;
            if in_epoch(1) == 0 {
                return None;
            }
            in_epoch(0)
        };
        Some(epochs * per_epoch)
    }

    /// A run validates after its last step, whatever `val_every` is. One that a stop rule ended is finished.
    pub fn finished(&self) -> bool {
        if self.stopped.is_some() {
            return true;
        }
        let last = self.files.last_step();
        let validated = self.files.validations.last().is_some_and(|row| row["step"] == last);
        last > 0 && validated && self.planned_steps().is_none_or(|planned| last >= planned)
    }
}

/// Arms in the order of the paths, within a directory of runs by when they were started.
///
/// # Errors
/// `Input` for a path that holds no run, a file that temper did not write, and the same run twice.
pub fn read(paths: &[PathBuf]) -> Result<Vec<Arm>> {
    let mut directories: Vec<PathBuf> = Vec::new();
    let mut seen = BTreeSet::new();
    for path in paths {
        for directory in run_directories(path)? {
            // The same directory, named twice, is one run.
            let real = directory.canonicalize().map_err(|e| Error::io(&directory, e))?;
            if seen.insert(real) {
                directories.push(directory);
            }
        }
    }
    let runs: Vec<Run> = directories.par_iter().map(|path| Run::read(path)).collect::<Result<_>>()?;
    let mut arms: Vec<Arm> = Vec::new();
    for run in runs {
        let same = |arm: &&mut Arm| {
            let first = &arm.runs[0].files;
            (&first.name, &first.config_hash) == (&run.files.name, &run.files.config_hash)
        };
        match arms.iter_mut().find(same) {
            Some(arm) => arm.runs.push(run),
            None => arms.push(Arm { label: String::new(), runs: vec![run] }),
        }
    }
    for arm in &mut arms {
        arm.runs.sort_by_key(|run| run.files.seed);
        if let Some(pair) = arm.runs.windows(2).find(|pair| pair[0].files.seed == pair[1].files.seed) {
            bail_input!(
                "{}: the same run (name, configuration and seed) as {}; a seed counts once",
                pair[1].files.path.display(),
                pair[0].files.path.display()
            );
        }
    }
    label(&mut arms);
    Ok(arms)
}

/// `path` itself, or the run directories in it by their start.
fn run_directories(path: &Path) -> Result<Vec<PathBuf>> {
    if path.join("run.json").is_file() {
        return Ok(vec![path.to_path_buf()]);
    }
    let entries = std::fs::read_dir(path).map_err(|e| Error::io(path, e))?;
    let mut found: Vec<(String, PathBuf)> = Vec::new();
    for entry in entries.flatten().map(|entry| entry.path()) {
        let file = entry.join("run.json");
        if file.is_file() {
            let text = std::fs::read_to_string(&file).map_err(|e| Error::io(&file, e))?;
            // What is wrong with it is said where the run is read.
            let run: Value = serde_json::from_str(&text).unwrap_or_default();
            found.push((run["time_utc"].as_str().unwrap_or_default().to_string(), entry));
        }
    }
    if found.is_empty() {
        bail_input!("{}: expected a run directory or a directory of them, found no run.json", path.display());
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// Names, without the beginning up to a `-` that they share; the hash where two arms have one name.
fn label(arms: &mut [Arm]) {
    let names: Vec<String> = arms.iter().map(|arm| arm.runs[0].files.name.clone()).collect();
    let shared = shared_beginning(&names);
    for (arm, name) in arms.iter_mut().zip(&names) {
        arm.label = name[shared..].to_string();
        if names.iter().filter(|other| *other == name).count() > 1 {
            arm.label = format!("{name} ({})", arm.runs[0].files.config_hash);
        }
    }
}

/// Length of the longest beginning that ends in `-` and that every name has, with something behind it.
fn shared_beginning(names: &[String]) -> usize {
    let Some(first) = names.first().filter(|_| names.len() > 1) else { return 0 };
    let mut ends = first.rmatch_indices('-').map(|(at, _)| at + 1);
    let shared = |end: &usize| names.iter().all(|name| name.len() > *end && name.starts_with(&first[..*end]));
    ends.find(shared).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arms_of_a_sweep_lose_the_sweeps_name() {
        let names = |names: &[&str]| names.iter().map(|n| n.to_string()).collect::<Vec<_>>();
        assert_eq!(shared_beginning(&names(&["s-none", "s-global"])), 2);
        assert_eq!(shared_beginning(&names(&["s-a-x", "s-a-y"])), 4);
        assert_eq!(shared_beginning(&names(&["s-", "s-y"])), 0);
        assert_eq!(shared_beginning(&names(&["e5c", "e5d"])), 0);
        assert_eq!(shared_beginning(&names(&["s-none"])), 0);
    }
}
