//! Training and validation questions: GSM8K (jsonl, parquet) and the generated arithmetic task.

pub mod generated;
pub mod gsm8k;
pub mod section;

use std::path::Path;

use crate::{Result, bail_input};

/// Dataset indices have 22 bits in the noise keys.
pub const MAX_QUESTIONS: usize = 1 << 22;

/// One question with its reference answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Row in the file: the dataset index of the noise keys.
    pub index: u32,
    pub question: String,
    /// The reference solution, worked out.
    pub answer: String,
    /// The final answer alone, without thousands separators.
    pub ground_truth: String,
}

/// The first `limit` questions of a file (all without a limit): `.jsonl` as GSM8K is published, `.parquet` as
/// verl writes it.
///
/// # Errors
/// `Error::Input` with file and line (row) of what is broken; a file without questions.
pub fn load(path: &Path, limit: Option<usize>) -> Result<Vec<Question>> {
    let questions = match extension(path) {
        "jsonl" => gsm8k::load_jsonl(path, limit)?,
        "parquet" => gsm8k::load_parquet(path, limit)?,
        other => bail_input!("{}: found {other:?}, expected .jsonl or .parquet", path.display()),
    };
    match questions.len() {
        0 => bail_input!("{}: found no questions, expected at least one", path.display()),
        n if n > MAX_QUESTIONS => {
            bail_input!("{}: found {n} questions, expected at most {MAX_QUESTIONS}", path.display())
        }
        _ => Ok(questions),
    }
}

/// How many questions [`load`] would give.
pub fn count(path: &Path, limit: Option<usize>) -> Result<usize> {
    load(path, limit).map(|questions| questions.len())
}

fn extension(path: &Path) -> &str {
    path.extension().and_then(|e| e.to_str()).unwrap_or("")
}
