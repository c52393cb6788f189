//! The sections `noise_injection:` (AQN), `noisy_ops:` (matmul error) and `fake_quant:` of a
//! configuration. Key names are those of the original experiments, so their YAML pastes in.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::numerics::error_law::ErrorLaw;
use crate::numerics::format::Format;

pub use super::selection::{InjectPhase, LayerSet, PhaseSet};

/// Which weights AQN perturbs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LayerType {
    Rmsnorm,
    Linear,
}

/// Which policy sees w' = w + m*sigma*z.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ApplyTo {
    /// As in QeRL: rollouts see w', the update sees w.
    Rollout,
    RolloutAndUpdate,
}

/// Which sigma schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// `epoch_aware` decides; without it, the keys that are set.
    Auto,
    StepBased,
    EpochAware,
    /// sigma_start at every step.
    Constant,
}

/// A known defect reproduced on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Compat {
    /// Epoch-aware sigma is 0 at every step and layer multipliers never reach the model.
    Original,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NoiseInjectionSection {
    pub enabled: bool,
    pub schedule: ScheduleKind,
    /// null: epoch-aware unless only `num_stages` is set.
    pub epoch_aware: Option<bool>,
    pub sigma_start: f64,
    pub sigma_end: f64,
    /// Noisy stages of every epoch (epoch-aware); null = 5.
    pub stages_per_epoch: Option<u64>,
    /// Stages of the run, the clean one included (step-based); null = 10.
    pub num_stages: Option<u64>,
    /// Whether each epoch (epoch-aware) begins with a clean stretch.
    pub warmup_stage: bool,
    pub layer_types: Vec<LayerType>,
    /// Only modules whose name matches one of these; null = all of the layer types.
    pub target_modules: Option<Vec<String>>,
    pub exclude_modules: Vec<String>,
    pub layer_sigma_config: Option<LayerSigmaConfig>,
    pub apply_to: ApplyTo,
    pub compat: Option<Compat>,
}

impl Default for NoiseInjectionSection {
    fn default() -> NoiseInjectionSection {
        NoiseInjectionSection {
            enabled: false,
            schedule: ScheduleKind::Auto,
            epoch_aware: None,
            sigma_start: 0.01,
            sigma_end: 0.00001,
            stages_per_epoch: None,
            num_stages: None,
            warmup_stage: true,
            layer_types: vec![LayerType::Rmsnorm],
            target_modules: None,
            exclude_modules: default_exclusions(),
            layer_sigma_config: None,
            apply_to: ApplyTo::Rollout,
            compat: None,
        }
    }
}

/// Multipliers m_l of the noise per layer: w' = w + m_l*sigma*z. In YAML inline or a path
/// (config::load replaces the path by the file's content).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LayerSigmaConfig {
    /// false: as if there were no layer_sigma_config.
    pub enabled: bool,
    /// Replaces sigma_start and keeps the ratio sigma_end / sigma_start.
    pub base_sigma: Option<f64>,
    /// For layers that are not listed, and for modules without a layer (the final norm).
    pub default_multiplier: f64,
    pub layer_multipliers: BTreeMap<usize, f64>,
}

impl Default for LayerSigmaConfig {
    fn default() -> LayerSigmaConfig {
        LayerSigmaConfig {
            enabled: true,
            base_sigma: None,
            default_multiplier: 1.0,
            layer_multipliers: BTreeMap::new(),
        }
    }
}

/// How draws of different phases relate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DrawMode {
    /// A fresh draw in each phase, as hardware would.
    Independent,
    /// Rollout, old log-probs and first update see the same draw.
    Shared,
}

/// When the weight gradient gets its error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DwDraw {
    /// One draw on the gradient accumulated for an optimizer update.
    PerUpdate,
    /// A draw per micro-batch, as the original; the split is then part of the experiment.
    PerMicrobatch,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NoisyOpsSection {
    pub enabled: bool,
    /// s of y' = y + |y|*s*z.
    pub error_scale: f64,
    pub error_type: ErrorLaw,
    pub phases: PhaseSet,
    pub layers: LayerSet,
    /// Only modules whose name matches one of these; null = every linear.
    pub target_modules: Option<Vec<String>>,
    pub exclude_modules: Vec<String>,
    /// Whether the products of LoRA's adapters carry the error too; those of their base do either way.
    pub adapters: bool,
    pub draw: DrawMode,
    pub dw_draw: DwDraw,
}

impl Default for NoisyOpsSection {
    fn default() -> NoisyOpsSection {
        NoisyOpsSection {
            enabled: false,
            error_scale: 5e-2,
            error_type: ErrorLaw::RelativeGaussian,
            phases: PhaseSet::ALL,
            layers: LayerSet::All,
            target_modules: None,
            exclude_modules: default_exclusions(),
            adapters: false,
            draw: DrawMode::Independent,
            dw_draw: DwDraw::PerUpdate,
        }
    }
}

/// What the tensor amax A of a module's input is taken over, in formats that have one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ActivationScale {
    /// Every row has its own: a token's values do not depend on its neighbours.
    Token,
    /// One A per module, calibrated before training; deployment stores it as input_global_scale.
    Static,
}

impl ActivationScale {
    pub fn name(self) -> &'static str {
        match self {
            ActivationScale::Token => "token",
            ActivationScale::Static => "static",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FakeQuantSection {
    pub enabled: bool,
    /// Format of the weights; null = weights stay as they are.
    #[schemars(with = "Option<String>")]
    pub weights: Option<Format>,
    /// Format of the activations; null = activations stay as they are.
    #[schemars(with = "Option<String>")]
    pub activations: Option<Format>,
    /// null = token.
    pub activation_scale: Option<ActivationScale>,
    /// Training prompts that a static scale is calibrated on, from the first; null = 128.
    pub calibration_prompts: Option<usize>,
    pub phases: PhaseSet,
    /// Only modules whose name matches one of these; null = every linear.
    pub target_modules: Option<Vec<String>>,
    pub exclude_modules: Vec<String>,
    pub exclude_layers: LayerSet,
    /// The weights of q/k/v and of gate/up share one tensor amax (two-level formats), as deployment needs it.
    pub share_tensor_scale: bool,
}

impl Default for FakeQuantSection {
    fn default() -> FakeQuantSection {
        FakeQuantSection {
            enabled: false,
            weights: Some(Format::MXFP4),
            activations: None,
            activation_scale: None,
            calibration_prompts: None,
            phases: PhaseSet::ALL.without(InjectPhase::RefLogprobs),
            target_modules: None,
            exclude_modules: default_exclusions(),
            exclude_layers: LayerSet::Only(Default::default()),
            share_tensor_scale: true,
        }
    }
}

impl FakeQuantSection {
    pub fn calibration_prompts(&self) -> usize {
        self.calibration_prompts.unwrap_or(128)
    }
}

/// What quantization, AQN and matmul noise leave alone unless told otherwise.
fn default_exclusions() -> Vec<String> {
    vec!["lm_head".to_string(), "embed_tokens".to_string()]
}
