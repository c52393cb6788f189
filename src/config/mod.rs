//! A configuration: the sections' structs composed, and how they are read from YAML.
//!
//! `load` = read the file and what it extends, apply `--set`, check every key and value where it
//! was written, merge (later wins), check ranges and combinations. It reads the layer multiplier
//! file, and touches no model and no data.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::data::section::DataSection;
use crate::error::one_line;
use crate::inject::plan::{InjectionPlan, ModuleSpec};
use crate::inject::schedule::SigmaSchedule;
use crate::inject::section::{FakeQuantSection, NoiseInjectionSection, NoisyOpsSection};
use crate::model::section::ModelSection;
use crate::rl::section::{AlgorithmSection, OptimizerSection, RewardSection, RolloutSection, TrainerSection};
use crate::{Error, Result, bail_input};

pub mod explain;
mod hash;
mod keys;
pub mod schema;
mod source;
pub mod sweep;
mod validate;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Names the run directory.
    pub name: String,
    pub seed: u64,
    pub model: ModelSection,
    pub data: DataSection,
    pub rollout: RolloutSection,
    pub algorithm: AlgorithmSection,
    pub optimizer: OptimizerSection,
    pub trainer: TrainerSection,
    pub reward: RewardSection,
    pub noisy_ops: NoisyOpsSection,
    pub noise_injection: NoiseInjectionSection,
    pub fake_quant: FakeQuantSection,
}

/// Reads, merges and checks a configuration. `overrides` are `a.b=v` with v in YAML.
/// Errors are one line: file (or --set), key, what was found, what was expected.
pub fn load(path: &Path, overrides: &[String]) -> Result<Config> {
    load_checked(path, overrides).map_err(|error| match error {
        // Keys and overrides are shown as they were written; they may hold line breaks.
        Error::Input(message) => Error::Input(one_line(message)),
        other => other,
    })
}

/// As [`load`], with every key, its value and who set it.
pub fn load_explained(path: &Path, overrides: &[String]) -> Result<(Config, Vec<explain::Leaf>)> {
    let config = load(path, overrides)?;
    // Checked just now, so that this has no errors of its own.
    let merged = source::merge(path, overrides)?;
    let leaves = explain::leaves(&config, &merged);
    Ok((config, leaves))
}

fn load_checked(path: &Path, overrides: &[String]) -> Result<Config> {
    let merged = source::merge(path, overrides)?;
    let config = keys::typed(&merged)?;
    validate::check(&config).map_err(|e| e.error_at(&merged))?;
    Ok(config)
}

impl Config {
    /// Eight hex digits over what identifies the experiment: not the seed and the name (they stand
    /// in the run directory's name), operational keys, or where model and data lie.
    pub fn hash(&self) -> String {
        hash::short(self)
    }

    /// floor(training rows / prompts_per_step); the rest of an epoch is dropped. An epoch without a
    /// step is an error.
    pub fn steps_per_epoch(&self, training_rows: usize) -> Result<u64> {
        let prompts = self.data.prompts_per_step;
        match training_rows / prompts.max(1) {
            0 => bail_input!(
                "data.prompts_per_step: found {prompts}, expected at most the {training_rows} training rows"
            ),
            steps => Ok(steps as u64),
        }
    }

    /// Sigma of every training step.
    pub fn sigma_schedule(&self, steps_per_epoch: u64) -> Result<SigmaSchedule> {
        SigmaSchedule::resolve(&self.noise_injection, steps_per_epoch, self.trainer.epochs)
    }

    /// What is injected into each of these modules.
    pub fn injection_plan(&self, modules: &[ModuleSpec]) -> Result<InjectionPlan> {
        InjectionPlan::resolve(&self.noise_injection, &self.noisy_ops, &self.fake_quant, modules, self.seed)
    }

    /// The resolved configuration; loads again to the same value.
    pub fn to_yaml(&self) -> String {
        serde_yaml::to_string(self).expect("sections hold only strings, numbers, lists and maps")
    }
}
