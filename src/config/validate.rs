//! Ranges and combinations, checked on the merged configuration. Each check says what was found,
//! what is expected and, where it is not obvious, why.

mod training;

use super::Config;
use super::source::Merged;
use crate::Error;
use crate::data::MAX_QUESTIONS;
use crate::data::section::{DataKind, DataSection};
use crate::inject::schedule;
use crate::inject::section::{
    ActivationScale, DwDraw, FakeQuantSection, InjectPhase, NoiseInjectionSection, NoisyOpsSection,
};
use crate::model::config::PRESETS;
use crate::run::directory::usable_name;

/// A key whose value cannot be used.
pub(super) struct Violation {
    key: String,
    message: String,
}

impl Violation {
    fn new(key: impl Into<String>, message: impl Into<String>) -> Violation {
        Violation { key: key.into(), message: message.into() }
    }

    /// As an error that names the source which set the key.
    pub(super) fn error_at(self, merged: &Merged) -> Error {
        Error::Input(format!("{}: {}: {}", merged.source_of(&self.key), self.key, self.message))
    }
}

type Checked = Result<(), Violation>;

pub(super) fn check(config: &Config) -> Checked {
    let name = &config.name;
    if !usable_name(name) {
        return Err(Violation::new(
            "name",
            format!(
                "found \"{name}\", expected letters, digits, `.`, `_`, `-` or `+`, not beginning with `.` or `-`: it names the run directory"
            ),
        ));
    }
    if config.model.path.is_none() && config.model.preset.is_none() {
        return Err(Violation::new(
            "model.path",
            "neither model.path nor model.preset is set; set one with --set model.path=DIRECTORY",
        ));
    }
    for (key, text) in [
        ("model.path", &config.model.path),
        ("model.preset", &config.model.preset),
        ("model.tokenizer", &config.model.tokenizer),
        ("data.train", &config.data.train),
        ("data.val", &config.data.val),
    ] {
        if text.as_ref().is_some_and(|t| t.trim().is_empty()) {
            return Err(Violation::new(key, "found an empty text, expected a name or path, or null"));
        }
    }
    if let Some(preset) = &config.model.preset
        && !PRESETS.contains(&preset.as_str())
    {
        return Err(Violation::new(
            "model.preset",
            format!("found \"{preset}\", expected one of {}", PRESETS.join(", ")),
        ));
    }
    lora(config)?;
    data(&config.data)?;
    training::rollout(&config.rollout)?;
    training::algorithm(&config.algorithm)?;
    training::optimizer(&config.optimizer)?;
    training::trainer(&config.trainer, &config.data, &config.noisy_ops)?;
    training::reward(&config.reward, &config.data)?;
    if config.algorithm.dynamic_sampling.is_some()
        && config.noisy_ops.enabled
        && config.noisy_ops.dw_draw == DwDraw::PerMicrobatch
    {
        return Err(Violation::new(
            "algorithm.dynamic_sampling",
            "found with noisy_ops.dw_draw: per_microbatch, expected per_update: the number of micro-batches of an update varies",
        ));
    }
    training::metrics(config)?;
    noisy_ops(&config.noisy_ops)?;
    noise_injection(&config.noise_injection, config.trainer.epochs)?;
    fake_quant(&config.fake_quant)
}

fn lora(config: &Config) -> Checked {
    let Some(lora) = &config.model.lora else {
        return match config.noisy_ops.adapters {
            true => Err(Violation::new("noisy_ops.adapters", "found true without model.lora, expected false")),
            false => Ok(()),
        };
    };
    in_range("model.lora.rank", lora.rank as u64, 1 << 16)?;
    real("model.lora.alpha", lora.alpha, lora.alpha > 0.0, "a number above 0")?;
    let twice = lora.targets.iter().enumerate().find(|(i, target)| lora.targets[..*i].contains(target));
    if let Some((_, target)) = twice {
        return Err(Violation::new("model.lora.targets", format!("found {} twice", target.name())));
    }
    if lora.targets.is_empty() {
        return Err(Violation::new("model.lora.targets", "found none, expected at least one such as q_proj"));
    }
    if config.trainer.offload_reference {
        return Err(Violation::new(
            "trainer.offload_reference",
            "found true with model.lora, expected false: the base is the reference policy, there is no second model",
        ));
    }
    Ok(())
}

fn data(data: &DataSection) -> Checked {
    in_range("data.prompts_per_step", data.prompts_per_step as u64, MAX_QUESTIONS as u64)?;
    at_least_1("data.max_prompt_tokens", data.max_prompt_tokens as u64)?;
    at_least_1("data.max_response_tokens", data.max_response_tokens as u64)?;
    at_least_1("data.train_limit", data.train_limit.unwrap_or(1) as u64)?;
    at_least_1("data.val_limit", data.val_limit.unwrap_or(1) as u64)?;
    in_range("data.generated.train_problems", data.generated.train_problems as u64, MAX_QUESTIONS as u64)?;
    in_range("data.generated.val_problems", data.generated.val_problems as u64, MAX_QUESTIONS as u64)?;
    // The noise keys hold the position in 18 bits.
    let tokens = data.max_prompt_tokens.saturating_add(data.max_response_tokens);
    if tokens > 1 << 18 {
        return Err(Violation::new(
            "data.max_response_tokens",
            format!("found {tokens} tokens with the prompt, expected at most {}", 1 << 18),
        ));
    }
    let (rows, key) = match (data.kind, data.train_limit) {
        (DataKind::Generated, limit) => {
            (limit.unwrap_or(usize::MAX).min(data.generated.train_problems), "data.generated.train_problems")
        }
        (_, Some(limit)) => (limit, "data.train_limit"),
        (_, None) => return Ok(()),
    };
    if rows < data.prompts_per_step {
        return Err(Violation::new(
            key,
            format!(
                "{rows} training rows are fewer than the data.prompts_per_step of {}: no step would run",
                data.prompts_per_step
            ),
        ));
    }
    Ok(())
}

fn noisy_ops(noise: &NoisyOpsSection) -> Checked {
    let scale = noise.error_scale;
    real("noisy_ops.error_scale", scale, (0.0..=1.0).contains(&scale), "a number in [0, 1] (5 % is 0.05)")?;
    if noise.phases.is_empty() {
        return Err(Violation::new(
            "noisy_ops.phases",
            "found no phase, expected at least one (enabled: false turns the noise off)",
        ));
    }
    Ok(())
}

fn noise_injection(aqn: &NoiseInjectionSection, epochs: u64) -> Checked {
    if aqn.layer_types.is_empty() {
        return Err(Violation::new(
            "noise_injection.layer_types",
            "found no type, expected rmsnorm or linear (enabled: false turns AQN off)",
        ));
    }
    if let Some(config) = &aqn.layer_sigma_config {
        let key = |name: &str| format!("noise_injection.layer_sigma_config.{name}");
        let expected = "a number, 0 or more: it multiplies sigma";
        real(key("default_multiplier"), config.default_multiplier, config.default_multiplier >= 0.0, expected)?;
        for (layer, &m) in &config.layer_multipliers {
            real(key(&format!("layer_multipliers.{layer}")), m, m >= 0.0, expected)?;
        }
    }
    // The steps of an epoch are not known yet; nothing in the rules depends on them.
    schedule::check(aqn, epochs).map_err(|(key, message)| Violation::new(format!("noise_injection.{key}"), message))
}

fn fake_quant(quant: &FakeQuantSection) -> Checked {
    if let Some(format) = quant.activations.filter(|format| format.two_d) {
        return Err(Violation::new(
            "fake_quant.activations",
            format!("found {format}, expected a format without 2d: a tile would mix tokens"),
        ));
    }
    if let (Some(format), Some(ActivationScale::Static)) = (quant.activations, quant.activation_scale)
        && !format.has_tensor_scale()
    {
        return Err(Violation::new(
            "fake_quant.activation_scale",
            format!("found static with activations in {format}, which has no tensor scale to calibrate; token is"),
        ));
    }
    at_least_1("fake_quant.calibration_prompts", quant.calibration_prompts() as u64)?;
    if quant.enabled && quant.weights.is_none() && quant.activations.is_none() {
        return Err(Violation::new(
            "fake_quant.weights",
            "found null with fake_quant.enabled: true and no activations, expected a format such as mxfp4 or nvfp4",
        ));
    }
    if quant.phases.contains(InjectPhase::Forward) != quant.phases.contains(InjectPhase::Backward) {
        return Err(Violation::new(
            "fake_quant.phases",
            "found forward without backward (or the reverse), expected both or neither: dX uses the weight of the forward product",
        ));
    }
    if quant.phases.is_empty() {
        return Err(Violation::new(
            "fake_quant.phases",
            "found no phase, expected at least one (enabled: false turns quantization off)",
        ));
    }
    Ok(())
}

fn in_range(key: &str, found: u64, most: u64) -> Checked {
    if (1..=most).contains(&found) {
        Ok(())
    } else {
        Err(Violation::new(key, format!("found {found}, expected 1 to {most}")))
    }
}

fn at_least_1(key: &str, found: u64) -> Checked {
    if found >= 1 { Ok(()) } else { Err(Violation::new(key, format!("found {found}, expected 1 or more"))) }
}

/// Of what is computed at once: no more than anybody could mean, so that products of sizes have room.
fn size(key: &str, found: u64) -> Checked {
    at_least_1(key, found)?;
    in_range(key, found, 1 << 32)
}

fn real(key: impl Into<String>, found: f64, good: bool, expected: &str) -> Checked {
    if good && found.is_finite() {
        Ok(())
    } else {
        Err(Violation::new(key, format!("found {found}, expected {expected}")))
    }
}
