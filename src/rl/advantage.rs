//! Group-relative advantage of GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1).
//!
//! For the G completions of one prompt with rewards R_1..R_G:
//!
//! ```text
//! A_g = (R_g - mean(R)) / (std(R) + 1e-6)      std: sample standard deviation (divisor G - 1)
//! ```
//!
//! Every token of completion g gets A_g. A group whose rewards are all equal teaches nothing: its advantages
//! are exactly 0. f64 throughout; rewards lie group after group: `rewards[prompt * group_size + member]`.

use crate::{Result, bail_input};

/// Keeps the quotient finite for groups with a tiny spread (TRL adds 1e-4, verl 1e-6).
pub const STD_EPSILON: f64 = 1e-6;

/// Advantages of `rewards` [prompts * group_size], in the same order.
///
/// # Errors
/// A group size below 2 (the sample standard deviation does not exist), a number of rewards that is not a
/// multiple of it, or a reward that is not finite.
pub fn grpo_advantages(rewards: &[f64], group_size: usize) -> Result<Vec<f64>> {
    check_groups(rewards, group_size)?;
    Ok(rewards.chunks_exact(group_size).flat_map(group_advantages).collect())
}

/// Number of groups whose rewards are all equal (`reward/zero_std_groups`).
///
/// # Errors
/// As [`grpo_advantages`].
pub fn zero_std_groups(rewards: &[f64], group_size: usize) -> Result<usize> {
    check_groups(rewards, group_size)?;
    Ok(rewards.chunks_exact(group_size).filter(|g| all_equal(g)).count())
}

fn group_advantages(rewards: &[f64]) -> Vec<f64> {
    // Asked, not computed: the mean of equal numbers can differ from them by an ulp, and 1e-6 would magnify it.
    if all_equal(rewards) {
        return vec![0.0; rewards.len()];
    }
    let n = rewards.len() as f64;
    let mean = rewards.iter().sum::<f64>() / n;
    let variance = rewards.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / (n - 1.0);
    let std = variance.sqrt();
    rewards.iter().map(|r| (r - mean) / (std + STD_EPSILON)).collect()
}

fn all_equal(rewards: &[f64]) -> bool {
    rewards.iter().all(|r| *r == rewards[0])
}

fn check_groups(rewards: &[f64], group_size: usize) -> Result<()> {
    if group_size < 2 {
        bail_input!("rollout.group_size: found {group_size}, expected at least 2 (GRPO compares within a group)");
    }
    if !rewards.len().is_multiple_of(group_size) {
        bail_input!("rewards: found {} of them, expected a multiple of the group size {group_size}", rewards.len());
    }
    if let Some(i) = rewards.iter().position(|r| !r.is_finite()) {
        bail_input!("reward of completion {i}: found {}, expected a finite number", rewards[i]);
    }
    Ok(())
}
