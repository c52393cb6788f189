//! stopped.json: which stop rule ended a run, and on what. Present only where one did.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::atomic_file;
use crate::{Error, Result, input_error};

const FILE: &str = "stopped.json";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Comparison {
    Above,
    Below,
}

impl Comparison {
    pub fn name(self) -> &'static str {
        match self {
            Comparison::Above => "above",
            Comparison::Below => "below",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stopped {
    /// The rule's name.
    pub rule: String,
    /// A key of metrics.jsonl.
    pub metric: String,
    /// null: it was not a finite number.
    pub value: Option<f64>,
    pub comparison: Comparison,
    pub bound: f64,
    /// The step after which the rule fired.
    pub step: u64,
}

impl fmt::Display for Stopped {
    /// `stop rule collapse after step 23: entropy is 1.2, above 1`.
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        let Stopped { rule, metric, bound, step, .. } = self;
        let side = self.comparison.name();
        write!(out, "stop rule {rule} after step {step}: {metric} is ")?;
        match self.value {
            Some(value) => write!(out, "{value}, {side} {bound}"),
            None => write!(out, "not a finite number (the rule: {side} {bound})"),
        }
    }
}

/// What ended the run in this directory; None where no rule did.
///
/// # Errors
/// `Input`: the file is not one that temper wrote.
pub fn read(run_dir: &Path) -> Result<Option<Stopped>> {
    let path = run_dir.join(FILE);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(&path, e)),
    };
    let parsed = serde_json::from_slice(&bytes);
    parsed.map(Some).map_err(|e| input_error!("{}: {e}; this is not a file that temper wrote", path.display()))
}

/// Writes the file, or with None removes it.
pub fn write(run_dir: &Path, stopped: Option<&Stopped>) -> Result<()> {
    let path = run_dir.join(FILE);
    match stopped {
        Some(stopped) => {
            let text = serde_json::to_string_pretty(stopped).map_err(|e| Error::Runtime(e.to_string()))?;
            atomic_file::write(&path, (text + "\n").as_bytes())
        }
        None => match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(&path, e)),
            _ => Ok(()),
        },
    }
}
