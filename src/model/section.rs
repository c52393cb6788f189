//! The `model:` section of a configuration: which weights, which shapes, which compute dtype.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Dtype of activations and of the weights in a matrix product. Master weights are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    F32,
    Bf16,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ModelSection {
    /// A model directory, or a hub id that is in the local Hugging Face cache.
    pub path: Option<String>,
    /// Known shapes. Alone: random weights made from the run's seed. With `path`: the shapes that
    /// `temper plan` uses when the weights are not on this machine.
    pub preset: Option<String>,
    /// Directory of tokenizer.json, where it is not the model directory (a preset has none).
    pub tokenizer: Option<String>,
    pub dtype: Dtype,
}

impl Default for ModelSection {
    fn default() -> ModelSection {
        ModelSection { path: None, preset: None, tokenizer: None, dtype: Dtype::Bf16 }
    }
}
