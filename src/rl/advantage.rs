//! Advantages: how the rewards of a prompt's G completions, R_1..R_G, become what every token of a completion is weighed by.
//!
//! ```text
//! grpo       A = (R - mean) / (std + 1e-6)     std of the group        DeepSeekMath, arXiv 2402.03300, 4.1
//! dr_grpo    A = R - mean                                              Dr. GRPO, arXiv 2503.20783, 3.2
//! rloo       A = R - mean of the other G - 1 rewards                   arXiv 2402.14740, eq. 8
//! batch_std  A = (R - mean) / (std + 1e-6)     std of the whole step   arXiv 2508.08221; TRL's scale_rewards="batch"
//! ```
//!
//! mean: of the group. std: sample standard deviation (divisor n - 1). A group whose rewards are all equal teaches
//! nothing: its advantages are exactly 0. f64 throughout; rewards lie group after group:
//! `rewards[prompt * group_size + member]`. A completion without a reward (None: nobody could score it) is no member
//! of its group; its own advantage is 0, and so are those of a group in which fewer than two have a reward.

use super::section::Advantage;
use crate::{Result, bail_input};

/// Keeps the quotient finite for groups with a tiny spread (TRL adds 1e-4, verl 1e-6).
pub const STD_EPSILON: f64 = 1e-6;

/// Advantages of `rewards` [prompts * group_size], in the same order.
///
/// # Errors
/// A group size below 2 (the sample standard deviation does not exist), a number of rewards that is not a
/// multiple of it, or a reward that is not finite.
pub fn advantages(rule: Advantage, rewards: &[Option<f64>], group_size: usize) -> Result<Vec<f64>> {
    check_groups(rewards, group_size)?;
    let known: Vec<f64> = rewards.iter().flatten().copied().collect();
    let batch_std = if known.len() < 2 { 0.0 } else { std_of(&known, mean_of(&known)) };
    Ok(rewards.chunks_exact(group_size).flat_map(|group| of_group(rule, group, batch_std)).collect())
}

/// Number of groups whose rewards are all equal (`reward/zero_std_groups`).
///
/// # Errors
/// As [`advantages`].
pub fn zero_std_groups(rewards: &[Option<f64>], group_size: usize) -> Result<usize> {
    check_groups(rewards, group_size)?;
    Ok(rewards.chunks_exact(group_size).filter(|group| teaches_nothing(group)).count())
}

/// Whether the rewards of a group are all equal, as far as they are known.
pub fn teaches_nothing(group: &[Option<f64>]) -> bool {
    let mut known = group.iter().flatten();
    known.next().is_none_or(|first| known.all(|r| r == first))
}

fn of_group(rule: Advantage, group: &[Option<f64>], batch_std: f64) -> Vec<f64> {
    // Asked, not computed: the mean of equal numbers can differ from them by an ulp, and 1e-6 would magnify it.
    if teaches_nothing(group) {
        return vec![0.0; group.len()];
    }
    let known: Vec<f64> = group.iter().flatten().copied().collect();
    let n = known.len() as f64;
    let mean = mean_of(&known);
    let divisor = match rule {
        Advantage::Grpo => std_of(&known, mean) + STD_EPSILON,
        Advantage::DrGrpo => 1.0,
        // R - (sum - R)/(n - 1) = (R - mean) / ((n - 1)/n)
        Advantage::Rloo => (n - 1.0) / n,
        Advantage::BatchStd => batch_std + STD_EPSILON,
    };
    group.iter().map(|reward| reward.map_or(0.0, |r| (r - mean) / divisor)).collect()
}

fn mean_of(rewards: &[f64]) -> f64 {
    rewards.iter().sum::<f64>() / rewards.len() as f64
}

fn std_of(rewards: &[f64], mean: f64) -> f64 {
    (rewards.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / (rewards.len() as f64 - 1.0)).sqrt()
}

fn check_groups(rewards: &[Option<f64>], group_size: usize) -> Result<()> {
    if group_size < 2 {
        bail_input!("rollout.group_size: found {group_size}, expected at least 2 (GRPO compares within a group)");
    }
    if !rewards.len().is_multiple_of(group_size) {
        bail_input!("rewards: found {} of them, expected a multiple of the group size {group_size}", rewards.len());
    }
    for (i, reward) in rewards.iter().enumerate() {
        if let Some(reward) = reward.filter(|r| !r.is_finite()) {
            bail_input!("reward of completion {i}: found {reward}, expected a finite number");
        }
    }
    Ok(())
}
