//! A run directory as it lies on disk, read for tables, comparisons and reports; it may still be written by its run.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::rl::evaluation::Condition;
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
    /// Rows of metrics.jsonl of kind `train`.
    pub train: Vec<Value>,
    /// Rows of metrics.jsonl of kind `val`.
    pub validations: Vec<Value>,
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
        let config: Value = serde_yaml::from_str(&text(&config_path)?).map_err(|e| {
            input_error!("{}: {}", config_path.display(), e.to_string().lines().collect::<Vec<_>>().join(" "))
        })?;
        let (Some(name), Some(hash), Some(seed)) =
            (run["name"].as_str(), run["config_hash"].as_str(), run["seed"].as_u64())
        else {
            bail_input!("{}: expected name, config_hash and seed, found {run}", run_path.display());
        };
        let metrics: Vec<Value> = rows(&path.join("metrics.jsonl"))?;
        let (validations, train) = metrics.into_iter().partition(|row| row["kind"] == "val");
        Ok(RunFiles {
            path: path.to_path_buf(),
            name: name.to_string(),
            config_hash: hash.to_string(),
            seed,
            run,
            config,
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
}

/// (right answers, questions) of a validation row; None where it has no such condition.
pub fn correct(validation: &Value, condition: Condition) -> Option<(u64, u64)> {
    Some((validation[format!("val/correct_{}", condition.name())].as_u64()?, validation["val/n"].as_u64()?))
}

/// The objects of a .jsonl file; none where there is no file. A last line without its end is being written, and left out.
fn rows<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = text(path)?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let row = |(number, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|e| input_error!("{} line {}: {e}", path.display(), number + 1))
    };
    whole.lines().enumerate().map(row).collect()
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
        file("metrics.jsonl", "{\"step\":0}\nnot json\n{}\n")?;
        assert!(RunFiles::read(dir.path()).is_err_and(|e| e.to_string().contains("metrics.jsonl line 2")));
        Ok(())
    }
}
