//! What a run is given besides its recipe, and what it gives back.

use std::path::{Path, PathBuf};

use tch::Device;

use super::evaluation::Validation;
use super::recipe::{PreparedQuestion, Recipe};
use crate::Result;
use crate::device::gpu::monitor::Watch;
use crate::model::config::Qwen2Config;
use crate::model::tokenizer::Tokenizer;
use crate::run::console::Console;
use crate::run::signals::Interrupt;

/// What a run reads besides its recipe.
pub struct Workload {
    pub tokenizer: Tokenizer,
    /// Its files go into every checkpoint.
    pub tokenizer_dir: PathBuf,
    pub train: Vec<PreparedQuestion>,
    pub val: Vec<PreparedQuestion>,
    /// Names the data in the console's validation lines, e.g. `gsm8k`.
    pub source: String,
    /// Digests of what the run reads: a run is not resumed on other data or weights.
    pub inputs: Vec<(String, String)>,
    /// Holds the tokenizer of the generated task where no model directory has it; removed with this value.
    pub _scratch: Option<tempfile::TempDir>,
}

/// Where and how to run.
pub struct Launch<'a> {
    pub device: Device,
    pub device_name: String,
    pub out: &'a Path,
    pub resume: bool,
    pub console: &'a Console,
    pub interrupt: &'a Interrupt,
    /// The GPU whose state goes into timing.jsonl, on whatever device the run is.
    pub monitor: Option<Watch>,
}

pub struct Outcome {
    pub run_dir: PathBuf,
    pub validations: Vec<Validation>,
    /// Steps whose measured noise disagreed with the plan.
    pub disagreeing_steps: u64,
}

/// Errors when the longest prompt and a full response do not fit the model.
pub fn check_lengths(recipe: &Recipe, workload: &Workload, model: &Qwen2Config) -> Result<()> {
    let longest = workload.train.iter().chain(&workload.val).map(|q| q.prompt_ids.len()).max().unwrap_or(0);
    let (needed, limit) = (longest + recipe.data.max_response_tokens, model.max_position_embeddings);
    if needed > limit {
        crate::bail_input!(
            "data.max_response_tokens: found {} beside prompts of up to {longest} tokens, expected at most {limit} together (the model's max_position_embeddings)",
            recipe.data.max_response_tokens
        );
    }
    Ok(())
}
