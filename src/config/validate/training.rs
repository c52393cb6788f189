//! The sections of reinforcement learning: rollout, algorithm, optimizer, trainer, reward.

use super::{Checked, Violation, at_least_1, in_range, real, size};
use crate::config::Config;
use crate::data::section::DataSection;
use crate::inject::section::{DwDraw, NoisyOpsSection};
use crate::rl::section::{
    AlgorithmSection, LrSchedule, OptimizerSection, RewardKind, RewardSection, RolloutSection, TrainerSection,
};
use crate::rl::stop_rules;

pub(super) fn rollout(rollout: &RolloutSection) -> Checked {
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
    size("rollout.max_sequences", most as u64)?;
    size("rollout.top_k", rollout.top_k.max(1) as u64)?;
    real("rollout.top_p", rollout.top_p, rollout.top_p > 0.0 && rollout.top_p <= 1.0, "a number in (0, 1]")?;
    Ok(())
}

pub(super) fn algorithm(algorithm: &AlgorithmSection) -> Checked {
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

pub(super) fn optimizer(optimizer: &OptimizerSection) -> Checked {
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

pub(super) fn trainer(trainer: &TrainerSection, data: &DataSection, noise: &NoisyOpsSection) -> Checked {
    at_least_1("trainer.epochs", trainer.epochs)?;
    at_least_1("trainer.minibatch_prompts", trainer.minibatch_prompts as u64)?;
    size("trainer.microbatch_sequences", trainer.microbatch_sequences as u64)?;
    size("trainer.microbatch_tokens", trainer.microbatch_tokens.unwrap_or(1) as u64)?;
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
    size("trainer.val_batch_size", trainer.val_batch_size as u64)?;
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

pub(super) fn reward(reward: &RewardSection, data: &DataSection) -> Checked {
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

/// `trainer.stop_rules` and `trainer.best_metric`: they name metrics that the run has.
pub(super) fn metrics(config: &Config) -> Checked {
    let known = stop_rules::metrics(
        &config.algorithm,
        &config.reward,
        &config.noise_injection,
        &config.noisy_ops,
        &config.fake_quant,
    );
    if let Some(metric) = &config.trainer.best_metric {
        let accuracies: Vec<&str> = known.iter().map(String::as_str).filter(|m| m.starts_with("val/acc_")).collect();
        if !accuracies.contains(&metric.as_str()) {
            let expected = accuracies.join(", ");
            return Err(Violation::new(
                "trainer.best_metric",
                format!("found \"{metric}\", expected one of {expected}"),
            ));
        }
    }
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
        let reward = &config.reward;
        let is_plain = reward.sum.is_empty() && !reward.has_command() && reward.overlong.is_none();
        let is_share = rule.metric.starts_with("val/acc")
            || rule.metric.contains("ratio/clipped")
            || ["strict", "numeric", "zero_std_groups", "unscorable"]
                .iter()
                .any(|of| rule.metric == format!("reward/{of}"))
            || rule.metric == "reward/mean" && is_plain;
        if is_share {
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
