//! Run directories as they lie on disk, found and read for tables, comparisons and reports; one may still be written by its
//! run.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::one_line;
use crate::rl::evaluation::Condition;
use crate::run::directory::usable_name;
use crate::run::stopped::{self, Stopped};
use crate::{Error, Result, bail_input, input_error};

/// What a run left behind. Rows are in the order of their steps.
#[derive(Debug)]
pub struct RunFiles {
    pub path: PathBuf,
    pub name: String,
    pub config_hash: String,
    pub seed: u64,
    /// run.json: commit, versions, device, every start.
    pub run: Value,
    /// config.yaml, resolved.
    pub config: Value,
    /// The same as it lies there.
    pub config_text: String,
    /// The stop rule that ended it.
    pub stopped: Option<Stopped>,
    /// Rows of metrics.jsonl of kind `train`.
    pub train: Vec<Value>,
    /// Rows of metrics.jsonl of kind `val`.
    pub validations: Vec<Value>,
}

/// Reads run directories, and those that lie in a directory of runs, path by path, in each by when they were started. None
/// is read twice.
///
/// # Errors
/// `Error::Input`: what is neither; a broken file in one.
pub fn read_all(paths: &[PathBuf]) -> Result<Vec<RunFiles>> {
    let (mut found, mut seen) = (Vec::new(), BTreeSet::new());
    for (place, path) in paths.iter().enumerate() {
        for directory in run_directories(path)? {
            if seen.insert(directory.canonicalize().map_err(|e| Error::io(&directory, e))?) {
                found.push((place, directory));
            }
        }
    }
    let read = found.into_par_iter().map(|(place, path)| Ok((place, RunFiles::read(&path)?)));
    // Two steps: of several broken runs always the first is named.
    let mut runs = read.collect::<Vec<Result<_>>>().into_iter().collect::<Result<Vec<(usize, RunFiles)>>>()?;
    runs.sort_by_cached_key(|(place, run)| (*place, run.run["time_utc"].as_str().map(str::to_string)));
    Ok(runs.into_iter().map(|(_, run)| run).collect())
}

/// `path` itself, or the run directories in it by their names.
fn run_directories(path: &Path) -> Result<Vec<PathBuf>> {
    let is_run = |path: &Path| path.join("run.json").is_file();
    if is_run(path) {
        return Ok(vec![path.to_path_buf()]);
    }
    let entries = std::fs::read_dir(path).map_err(|e| Error::io(path, e))?;
    let mut inside: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(|p| is_run(p)).collect();
    if inside.is_empty() {
        bail_input!(
            "{}: expected a run directory or a directory of runs, found no run.json in it or below it",
            path.display()
        );
    }
    // Links last: a run beside its link goes by its own name.
    inside.sort_by_cached_key(|path| (path.is_symlink(), path.clone()));
    Ok(inside)
}

impl RunFiles {
    /// # Errors
    /// `Error::Input`: not a run directory, or a file that temper did not write; one line with the file and its line.
    pub fn read(path: &Path) -> Result<RunFiles> {
        let run_path = path.join("run.json");
        if !run_path.is_file() {
            bail_input!("{}: expected a run directory, found no run.json in it", path.display());
        }
        let run: Value = serde_json::from_str(&text(&run_path)?)
            .map_err(|e| input_error!("{}: {e}; this is not a run.json that temper wrote", run_path.display()))?;
        let config_path = path.join("config.yaml");
        let config_text = text(&config_path)?;
        let config: Value = serde_yaml::from_str(&config_text)
            .map_err(|e| input_error!("{}: {}", config_path.display(), one_line(e)))?;
        let (Some(name), Some(hash), Some(seed)) =
            (run["name"].as_str(), run["config_hash"].as_str(), run["seed"].as_u64())
        else {
            bail_input!("{}: expected name, config_hash and seed, found {run}", run_path.display());
        };
        if !usable_name(name) {
            bail_input!("{}: found name {name:?}, which no run has", run_path.display());
        }
        if !config.is_object() {
            bail_input!("{}: expected sections, found {config}", config_path.display());
        }
        let metrics_path = path.join("metrics.jsonl");
        let metrics: Vec<Value> = rows(&metrics_path)?;
        check_rows(&metrics).map_err(|e| e.at(metrics_path.display()))?;
        let (validations, train) = metrics.into_iter().partition(|row| row["kind"] == "val");
        Ok(RunFiles {
            path: path.to_path_buf(),
            name: name.to_string(),
            config_hash: hash.to_string(),
            seed,
            run,
            config,
            config_text,
            stopped: stopped::read(path)?,
            train,
            validations,
        })
    }

    /// Rows of another of the run's .jsonl files: timing, injection, samples. None where it was not begun.
    pub fn rows(&self, file: &str) -> Result<Vec<Value>> {
        rows(&self.path.join(file))
    }

    /// The same, of a file so large that only what is needed of a row is kept.
    pub fn rows_as<T: DeserializeOwned>(&self, file: &str) -> Result<Vec<T>> {
        rows(&self.path.join(file))
    }

    /// The last step that was trained.
    pub fn last_step(&self) -> u64 {
        self.train.last().and_then(|row| row["step"].as_u64()).unwrap_or(0)
    }

    /// The conditions that its validations have.
    pub fn conditions(&self) -> Vec<Condition> {
        let has = |condition: &Condition| self.validations.iter().any(|row| correct(row, *condition).is_some());
        Condition::ALL.into_iter().filter(has).collect()
    }

    /// The step of its last validation.
    pub fn validated_step(&self) -> Option<u64> {
        self.validations.last()?["step"].as_u64()
    }

    /// (right answers, questions) of its last validation.
    pub fn last(&self, condition: Condition) -> Option<(u64, u64)> {
        correct(self.validations.last()?, condition)
    }

    /// The conditions of its last validation.
    pub fn last_conditions(&self) -> Vec<Condition> {
        Condition::ALL.into_iter().filter(|condition| self.last(*condition).is_some()).collect()
    }

    /// One per question of the last validation, `1` where it was answered; None where metrics.jsonl has none.
    pub fn marks(&self, condition: Condition) -> Option<&str> {
        self.validations.last()?[format!("val/questions_{}", condition.name())].as_str()
    }

    /// Runs with the same text answered the same questions.
    pub fn questions(&self) -> String {
        let data = &self.config["data"];
        format!("{} {} {}", data["kind"], data["generated"]["seed"], self.run["inputs"]["data.val"])
    }

    /// Steps whose measured noise was not as planned.
    pub fn disagreeing_steps(&self) -> Vec<u64> {
        let disagrees = |row: &&Value| row["injection/disagreements"].as_u64().unwrap_or(0) > 0;
        self.train.iter().filter(disagrees).filter_map(|row| row["step"].as_u64()).collect()
    }

    /// Steps of the whole run; None where the files do not tell. Epochs times the steps of the first, which a later step
    /// shows to be whole; or from the number of questions, where the configuration has it.
    pub fn planned_steps(&self) -> Option<u64> {
        let epochs = self.config["trainer"]["epochs"].as_u64()?;
        let epoch = |row: &Value| row["epoch"].as_u64();
        if self.train.last().and_then(epoch).is_some_and(|epoch| epoch > 0) {
            return Some(self.train.iter().filter(|row| epoch(row) == Some(0)).count() as u64 * epochs);
        }
        let data = &self.config["data"];
        if data["kind"] != "generated" {
            // A file may hold fewer than the limit: then the run ends below what is expected here.
            return None;
        }
        let made = data["generated"]["train_problems"].as_u64()?;
        let questions = data["train_limit"].as_u64().map_or(made, |limit| limit.min(made));
        Some(questions / data["prompts_per_step"].as_u64().filter(|prompts| *prompts > 0)? * epochs)
    }

    /// A run validates after its last step, whatever `val_every` is. One that a stop rule ended is finished.
    pub fn finished(&self) -> bool {
        let last = self.last_step();
        let done =
            last > 0 && self.validated_step() == Some(last) && self.planned_steps().is_none_or(|all| last >= all);
        self.stopped.is_some() || done
    }
}

impl AsRef<RunFiles> for RunFiles {
    fn as_ref(&self) -> &RunFiles {
        self
    }
}

/// (right answers, questions) of a validation row; None where it has no such condition.
pub fn correct(validation: &Value, condition: Condition) -> Option<(u64, u64)> {
    Some((validation[format!("val/correct_{}", condition.name())].as_u64()?, validation["val/n"].as_u64()?))
}

/// What temper cannot have written: no step or kind, steps that go back, more right answers than questions, marks that say
/// something else than the counts beside them.
fn check_rows(rows: &[Value]) -> Result<()> {
    let mut before = 0;
    for (number, row) in rows.iter().enumerate() {
        let line = number + 1;
        let (Some(step), true) = (row["step"].as_u64(), row["kind"] == "train" || row["kind"] == "val") else {
            bail_input!("line {line}: expected a step and a kind, train or val");
        };
        if step < before {
            bail_input!("line {line}: found step {step} after step {before}");
        }
        before = step;
        for condition in Condition::ALL {
            let Some((right, n)) = correct(row, condition) else { continue };
            let name = condition.name();
            if right > n {
                bail_input!("line {line}: found val/correct_{name} {right} of {n} questions");
            }
            let Some(marks) = row[format!("val/questions_{name}")].as_str() else { continue };
            let ones = marks.bytes().filter(|mark| *mark == b'1').count() as u64;
            if ones != right || marks.len() as u64 != n || marks.bytes().any(|mark| !b"01".contains(&mark)) {
                bail_input!(
                    "line {line}: val/questions_{name} has {ones} right answers of {}, expected {right} of {n} as beside it",
                    marks.len()
                );
            }
        }
    }
    Ok(())
}

/// The objects of a .jsonl file; none where there is no file. A last line without its end is being written, and left out.
fn rows<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    // Bytes: what is being written may end in the middle of a character.
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let Some(end) = bytes.iter().rposition(|byte| *byte == b'\n') else { return Ok(Vec::new()) };
    let row = |(number, line): (usize, &[u8])| {
        serde_json::from_slice(line).map_err(|e| input_error!("{} line {}: {e}", path.display(), number + 1))
    };
    bytes[..end].split(|byte| *byte == b'\n').enumerate().map(row).collect()
}

fn text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|e| Error::io(path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_is_being_written_is_read_up_to_its_last_whole_line()
    -> std::result::Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let file = |name: &str, text: &str| std::fs::write(dir.path().join(name), text);
        assert!(RunFiles::read(dir.path()).is_err_and(|e| e.to_string().contains("no run.json")));
        file("run.json", r#"{"name": "a", "config_hash": "01234567", "seed": 3}"#)?;
        file("config.yaml", "noisy_ops: {error_scale: 5e-2}\n")?;
        file(
            "metrics.jsonl",
            "{\"step\":0,\"kind\":\"val\",\"val/n\":4,\"val/correct_clean\":1}\n{\"step\":1,\"kind\":\"train\"}\n{\"step\":2,\"ki",
        )?;
        let run = RunFiles::read(dir.path())?;
        assert_eq!((run.name.as_str(), run.seed, run.last_step()), ("a", 3, 1));
        assert_eq!(run.config["noisy_ops"]["error_scale"], 0.05);
        assert_eq!(run.conditions(), [Condition::Clean]);
        assert_eq!(correct(&run.validations[0], Condition::Clean), Some((1, 4)));
        assert!(run.rows("timing.jsonl")?.is_empty());
        assert_eq!((run.planned_steps(), run.finished()), (None, false));
        file("metrics.jsonl", "{\"step\":0}\nnot json\n{}\n")?;
        assert!(RunFiles::read(dir.path()).is_err_and(|e| e.to_string().contains("metrics.jsonl line 2")));
        for (text, part) in [
            ("[1]\n", "line 1"),
            ("{\"step\":\"1\",\"kind\":\"val\"}\n", "a step"),
            ("{\"step\":1,\"kind\":\"x\"}\n", "kind"),
            ("{\"step\":2,\"kind\":\"val\"}\n{\"step\":1,\"kind\":\"val\"}\n", "step 1 after step 2"),
            ("{\"step\":0,\"kind\":\"val\",\"val/n\":4,\"val/correct_clean\":5}\n", "5 of 4"),
            (
                "{\"step\":0,\"kind\":\"val\",\"val/n\":2,\"val/correct_clean\":1,\"val/questions_clean\":\"12\"}\n",
                "line 1",
            ),
        ] {
            file("metrics.jsonl", text)?;
            let error = RunFiles::read(dir.path()).err().map(|e| (e.exit_code(), e.to_string())).unwrap_or_default();
            assert!(error.0 == 2 && error.1.contains("metrics.jsonl") && error.1.contains(part), "{text}: {error:?}");
        }
        // Half a character at the end of what is being written.
        std::fs::write(dir.path().join("samples.jsonl"), b"{\"step\":1}\n{\"a\":\"\xe2\x80")?;
        file("metrics.jsonl", "")?;
        assert_eq!(RunFiles::read(dir.path())?.rows("samples.jsonl")?.len(), 1);
        Ok(())
    }

    #[test]
    fn a_run_that_is_named_twice_or_linked_is_read_once_under_its_own_name()
    -> std::result::Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        for (name, start) in [("b", "2026-01-01"), ("c", "2026-01-03"), ("d", "2026-01-02")] {
            let run = dir.path().join(name);
            std::fs::create_dir(&run)?;
            let text = format!(r#"{{"name": "{name}", "config_hash": "0", "seed": 3, "time_utc": "{start}"}}"#);
            std::fs::write(run.join("run.json"), text)?;
            std::fs::write(run.join("config.yaml"), "name: x\n")?;
        }
        std::os::unix::fs::symlink("c", dir.path().join("a"))?;
        let paths = [dir.path().to_path_buf(), dir.path().join("b")];
        let runs = read_all(&paths)?;
        let found: Vec<_> = runs.iter().filter_map(|run| run.path.file_name()?.to_str()).collect();
        assert_eq!(found, ["b", "d", "c"]);
        Ok(())
    }
}
