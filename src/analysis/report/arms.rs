//! The arms of a page, with everything of their runs that it shows.

use std::path::PathBuf;

use rayon::prelude::*;
use serde_json::Value;

use super::layers::LayerSums;
use crate::Result;
use crate::analysis::arms::{self, group};
use crate::analysis::run_files::{RunFiles, read_all};

pub type Arm = arms::Arm<Run>;

pub struct Run {
    pub files: RunFiles,
    /// Rows of timing.jsonl.
    pub timing: Vec<Value>,
    /// Rows of samples.jsonl.
    pub samples: Vec<Value>,
    pub(super) layers: LayerSums,
    /// What console.log warns of, without repetitions.
    pub warnings: Vec<String>,
}

impl AsRef<RunFiles> for Run {
    fn as_ref(&self) -> &RunFiles {
        &self.files
    }
}

impl Run {
    fn of(files: RunFiles) -> Result<Run> {
        let console = match std::fs::read(files.path.join("console.log")) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(_) => String::new(), // a copy for people, which a run can do without
        };
        let mut warnings: Vec<String> = Vec::new();
        for line in console.lines().filter_map(|line| line.strip_prefix("warning: ")) {
            if !warnings.iter().any(|known| known == line) {
                warnings.push(line.to_string());
            }
        }
        Ok(Run {
            timing: files.rows("timing.jsonl")?,
            samples: files.rows("samples.jsonl")?,
            layers: LayerSums::read(&files)?,
            warnings,
            files,
        })
    }
}

/// Arms in the order of the paths, within a directory of runs by when they were started.
///
/// # Errors
/// `Input` for a path that holds no run, a file that temper did not write, and the same run twice.
pub fn read(paths: &[PathBuf]) -> Result<Vec<Arm>> {
    let runs = read_all(paths)?.into_par_iter().map(Run::of);
    group(runs.collect::<Result<Vec<Run>>>()?)
}
