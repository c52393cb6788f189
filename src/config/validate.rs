//! Ranges and combinations, checked on the merged configuration. Each check says what was found,
//! what is expected and, where it is not obvious, why.

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
use crate::rl::section::{
    AlgorithmSection, LrSchedule, OptimizerSection, RewardKind, RewardSection, RolloutSection, TrainerSection,
};
use crate::rl::stop_rules;
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
    data(&config.data)?;
    rollout(&config.rollout)?;
    algorithm(&config.algorithm)?;
    optimizer(&config.optimizer)?;
    trainer(&config.trainer, &config.data, &config.noisy_ops)?;
    reward(&config.reward, &config.data)?;
    if config.algorithm.dynamic_sampling.is_some()
        && config.noisy_ops.enabled
        && config.noisy_ops.dw_draw == DwDraw::PerMicrobatch
    {
        return Err(Violation::new(
            "algorithm.dynamic_sampling",
            "found with noisy_ops.dw_draw: per_microbatch, expected per_update: the number of micro-batches of an update varies",
        ));
    }
    stop_rules(config)?;
    noisy_ops(&config.noisy_ops)?;
    noise_injection(&config.noise_injection, config.trainer.epochs)?;
    fake_quant(&config.fake_quant)
}

fn data(data: &DataSection) -> Checked {
    at_least_1("data.prompts_per_step", data.prompts_per_step as u64)?;
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

fn rollout(rollout: &RolloutSection) -> Checked {
    let group = rollout.group_size;
    if group < 2 {
        return Err(Violation::new(
            "rollout.group_size",
            format!("found {group}, expected 2 or more: an advantage compares the responses of one group"),
        ));
    }
    // Noise keys hold 1 + member in 8 bits.
    if group > 255 {
        return Err(Violation::new("rollout.group_size", format!("found {group}, expected at most 255")));
    }
    let most = rollout.max_sequences.unwrap_or(group);
    if most < group {
        return Err(Violation::new(
            "rollout.max_sequences",
            format!("found {most}, expected at least rollout.group_size, which is {group}"),
        ));
    }
    real(
        "rollout.temperature",
        rollout.temperature,
        rollout.temperature > 0.0,
        "a number above 0 (greedy decoding gives a group of equal responses)",
    )?;
    real("rollout.top_p", rollout.top_p, rollout.top_p > 0.0 && rollout.top_p <= 1.0, "a number in (0, 1]")?;
    if rollout.top_p < 1.0 {
        return Err(Violation::new(
            "rollout.top_p",
            format!("found {}: top-p sampling is not available yet; 1.0 is", rollout.top_p),
        ));
    }
    if rollout.top_k != 0 {
        return Err(Violation::new(
            "rollout.top_k",
            format!("found {}: top-k sampling is not available yet; 0 (no limit) is", rollout.top_k),
        ));
    }
    Ok(())
}

fn algorithm(algorithm: &AlgorithmSection) -> Checked {
    let (low, high) = (algorithm.clip_low, algorithm.clip_high);
    real("algorithm.clip_low", low, (0.0..1.0).contains(&low), "a number in [0, 1)")?;
    real("algorithm.clip_high", high, high >= 0.0, "a number, 0 or more")?;
    if let Some(c) = algorithm.dual_clip {
        real("algorithm.dual_clip", c, c > 1.0, "a number above 1, or null")?;
    }
    real("algorithm.kl_coef", algorithm.kl_coef, algorithm.kl_coef >= 0.0, "a number, 0 or more")?;
    let limit = algorithm.truncated_importance.unwrap_or(1.0);
    real("algorithm.truncated_importance", limit, limit > 0.0, "a number above 0, or null")?;
    // Negative values exist: they sharpen the policy.
    real("algorithm.entropy_coef", algorithm.entropy_coef, true, "a finite number")?;
    at_least_1("algorithm.dynamic_sampling.max_rounds", algorithm.dynamic_sampling.as_ref().map_or(1, |d| d.max_rounds))
}

fn optimizer(optimizer: &OptimizerSection) -> Checked {
    let zero_or_more = "a number, 0 or more";
    real("optimizer.lr", optimizer.lr, optimizer.lr >= 0.0, zero_or_more)?;
    for beta in optimizer.betas {
        real("optimizer.betas", beta, (0.0..1.0).contains(&beta), "two numbers in [0, 1)")?;
    }
    real("optimizer.eps", optimizer.eps, optimizer.eps > 0.0, "a number above 0")?;
    real("optimizer.weight_decay", optimizer.weight_decay, optimizer.weight_decay >= 0.0, zero_or_more)?;
    let clip = optimizer.grad_clip.unwrap_or(1.0);
    real("optimizer.grad_clip", clip, clip > 0.0, "a number above 0, or null")?;
    let ratio = optimizer.min_lr_ratio;
    real("optimizer.min_lr_ratio", ratio, (0.0..=1.0).contains(&ratio), "a share of lr in [0, 1]")?;
    if optimizer.schedule == LrSchedule::Constant && ratio != 0.0 {
        return Err(Violation::new(
            "optimizer.min_lr_ratio",
            format!("found {ratio} with schedule: constant, which does not fall; expected linear or cosine"),
        ));
    }
    Ok(())
}

fn trainer(trainer: &TrainerSection, data: &DataSection, noise: &NoisyOpsSection) -> Checked {
    at_least_1("trainer.epochs", trainer.epochs)?;
    at_least_1("trainer.minibatch_prompts", trainer.minibatch_prompts as u64)?;
    at_least_1("trainer.microbatch_sequences", trainer.microbatch_sequences as u64)?;
    at_least_1("trainer.microbatch_tokens", trainer.microbatch_tokens.unwrap_or(1) as u64)?;
    if let Some(tokens) = trainer.microbatch_tokens
        && noise.enabled
        && noise.dw_draw == DwDraw::PerMicrobatch
    {
        return Err(Violation::new(
            "trainer.microbatch_tokens",
            format!(
                "found {tokens} beside noisy_ops.dw_draw: per_microbatch, which makes the split part of the experiment; \
                 expected null, or dw_draw: per_update"
            ),
        ));
    }
    at_least_1("trainer.val_batch_size", trainer.val_batch_size as u64)?;
    at_least_1("trainer.keep_last", trainer.keep_last as u64)?;
    in_range("trainer.threads", trainer.threads.unwrap_or(1) as u64, 1024)?;
    let (mini, step) = (trainer.minibatch_prompts, data.prompts_per_step);
    if step % mini != 0 {
        return Err(Violation::new(
            "trainer.minibatch_prompts",
            format!("found {mini}, expected a divisor of data.prompts_per_step, which is {step}"),
        ));
    }
    Ok(())
}

fn reward(reward: &RewardSection, data: &DataSection) -> Checked {
    let command = |key: &str, kind, command: &Option<Vec<String>>| match (kind, command) {
        (RewardKind::Command, None) => Err(Violation::new(
            key,
            "found null with kind: command, expected a program and its arguments such as [python3, score.py]",
        )),
        (_, Some(argv)) if argv.first().is_none_or(|program| program.trim().is_empty()) => {
            Err(Violation::new(key, "found no program, expected one and its arguments such as [python3, score.py]"))
        }
        (RewardKind::Command, Some(_)) | (_, None) => Ok(()),
        (_, Some(_)) => Err(Violation::new(key, "found a command with another kind, expected kind: command")),
    };
    if reward.sum.is_empty() {
        command("reward.command", reward.kind, &reward.command)?;
    } else if reward.kind == RewardKind::Command || reward.command.is_some() {
        return Err(Violation::new(
            "reward.sum",
            "found with reward.command, expected the command as one of its parts",
        ));
    }
    for (i, part) in reward.sum.iter().enumerate() {
        let key = |name: &str| format!("reward.sum[{i}].{name}");
        command(&key("command"), part.kind, &part.command)?;
        real(key("weight"), part.weight, part.weight != 0.0, "a number other than 0")?;
    }
    real(
        "reward.timeout_s",
        reward.timeout_s,
        reward.timeout_s > 0.0 && reward.timeout_s <= 86_400.0,
        "a number of seconds above 0, at most a day",
    )?;
    if let Some(overlong) = &reward.overlong {
        in_range("reward.overlong.buffer_tokens", overlong.buffer_tokens as u64, data.max_response_tokens as u64)?;
        real("reward.overlong.factor", overlong.factor, overlong.factor >= 0.0, "a number, 0 or more")?;
    }
    Ok(())
}

fn stop_rules(config: &Config) -> Checked {
    let known = stop_rules::metrics(
        &config.algorithm,
        &config.reward,
        &config.noise_injection,
        &config.noisy_ops,
        &config.fake_quant,
    );
    for (i, rule) in config.trainer.stop_rules.iter().enumerate() {
        let key = |name: &str| format!("trainer.stop_rules[{i}].{name}");
        if !known.contains(&rule.metric) {
            let likeness = |name: &&String| strsim::normalized_damerau_levenshtein(&rule.metric, name);
            let nearest = known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b))).map_or("", |name| name);
            return Err(Violation::new(
                key("metric"),
                format!("found \"{}\", which this run does not have; nearest metric: {nearest}", rule.metric),
            ));
        }
        let Some((side, bound)) = rule.bound() else {
            return Err(Violation::new(
                format!("trainer.stop_rules[{i}]"),
                "found both or none of above and below, expected one of them",
            ));
        };
        real(key(side.name()), bound, true, "a number")?;
        if rule.metric.starts_with("val/acc")
            || rule.metric.contains("ratio/clipped")
            || rule.metric.starts_with("reward/")
        {
            real(key(side.name()), bound, (0.0..=1.0).contains(&bound), "a share in [0, 1] (60 % is 0.6)")?;
        }
        at_least_1(&key("patience"), rule.patience)?;
        if let Some(name) = &rule.name {
            // A sweep's decisions name rules, and mean by `any` every one.
            let twice = config.trainer.stop_rules[..i].iter().any(|other| other.name.as_ref() == Some(name));
            if name.is_empty() || name == "any" || twice {
                return Err(Violation::new(
                    key("name"),
                    format!("found \"{name}\", expected a name of its own, other than `any`"),
                ));
            }
        }
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

fn real(key: impl Into<String>, found: f64, good: bool, expected: &str) -> Checked {
    if good && found.is_finite() {
        Ok(())
    } else {
        Err(Violation::new(key, format!("found {found}, expected {expected}")))
    }
}
