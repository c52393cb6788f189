//! The `data:` section of a configuration: which questions, how many a step, how long.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::MAX_QUESTIONS;

/// Where questions come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DataKind {
    /// By the file: .jsonl as published, .parquet as verl writes it.
    Auto,
    Gsm8k,
    /// The built-in arithmetic task; needs no file.
    Generated,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DataSection {
    pub kind: DataKind,
    /// Training questions (.jsonl or .parquet); not used by `kind: generated`.
    pub train: Option<String>,
    /// Validation questions.
    pub val: Option<String>,
    /// Questions per training step; steps per epoch = floor(training rows / prompts_per_step).
    pub prompts_per_step: usize,
    /// A longer prompt is an error that names the question: leaving it out would change the steps per epoch.
    pub max_prompt_tokens: usize,
    pub max_response_tokens: usize,
    /// A fresh order every epoch, from the seed.
    pub shuffle: bool,
    /// Appended to a question after one space. A key because the answer format alone decides the
    /// accuracy at step 0.
    pub prompt_suffix: String,
    /// Only the first n training rows.
    pub train_limit: Option<usize>,
    /// Only the first n validation rows.
    pub val_limit: Option<usize>,
    pub generated: GeneratedSection,
}

impl DataSection {
    /// The most questions that a validation may have.
    pub fn most_val_questions(&self) -> usize {
        let all = if self.kind == DataKind::Generated { self.generated.val_problems } else { MAX_QUESTIONS };
        all.min(self.val_limit.unwrap_or(usize::MAX))
    }
}

impl Default for DataSection {
    fn default() -> DataSection {
        DataSection {
            kind: DataKind::Auto,
            train: None,
            val: None,
            prompts_per_step: 128,
            max_prompt_tokens: 1024,
            max_response_tokens: 1024,
            shuffle: true,
            prompt_suffix: "Think step by step and give the final answer after \"#### \".".to_string(),
            train_limit: None,
            val_limit: None,
            generated: GeneratedSection::default(),
        }
    }
}

/// The built-in arithmetic task: how many problems, from which seed. The task's seed is its own, so
/// that runs with different seeds are validated on the same questions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GeneratedSection {
    pub train_problems: usize,
    pub val_problems: usize,
    pub seed: u64,
}

impl Default for GeneratedSection {
    fn default() -> GeneratedSection {
        GeneratedSection { train_problems: 192, val_problems: 256, seed: 0 }
    }
}
