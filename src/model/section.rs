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
    /// Train adapters beside frozen weights; null = all weights are trained.
    pub lora: Option<LoraSection>,
}

/// A linear that an adapter may stand beside, by its name in the model and in PEFT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Projection {
    QProj,
    KProj,
    VProj,
    OProj,
    GateProj,
    UpProj,
    DownProj,
}

impl Projection {
    pub const ALL: [Projection; 7] = [
        Projection::QProj,
        Projection::KProj,
        Projection::VProj,
        Projection::OProj,
        Projection::GateProj,
        Projection::UpProj,
        Projection::DownProj,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Projection::QProj => "q_proj",
            Projection::KProj => "k_proj",
            Projection::VProj => "v_proj",
            Projection::OProj => "o_proj",
            Projection::GateProj => "gate_proj",
            Projection::UpProj => "up_proj",
            Projection::DownProj => "down_proj",
        }
    }
}

/// LoRA: y = x W^T + (alpha / rank) (x A^T) B^T with W frozen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LoraSection {
    /// Rows of A, columns of B (PEFT's `r`).
    pub rank: usize,
    /// PEFT's `lora_alpha`.
    pub alpha: f64,
    /// PEFT's `target_modules`, in every layer.
    pub targets: Vec<Projection>,
}

impl Default for LoraSection {
    fn default() -> LoraSection {
        LoraSection { rank: 32, alpha: 16.0, targets: Projection::ALL.to_vec() }
    }
}

impl Default for ModelSection {
    fn default() -> ModelSection {
        ModelSection { path: None, preset: None, tokenizer: None, dtype: Dtype::Bf16, lora: None }
    }
}
