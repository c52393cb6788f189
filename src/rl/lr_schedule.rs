//! Learning-rate schedules: the factor of `optimizer.lr` at optimizer update t = 1..T, with W = warmup_steps, m = min_lr_ratio.
//!
//! ```text
//! t <= W    t / W                                                      linear warm-up
//! t >  W    q = (t - 1 - W) / (T - W)                                  progress, 0 at the first update after warm-up
//!           constant  1
//!           linear    m + (1 - m) (1 - q)
//!           cosine    m + (1 - m) (1 + cos(pi q)) / 2
//! ```
//!
//! After warm-up these are transformers' get_{constant,linear,cosine}_schedule_with_warmup (cosine's m: min_lr_rate) as it
//! has them at its t-th optimizer step. Its warm-up begins with a step at factor 0; ours begins at 1/W, so that no update
//! is spent on changing nothing, and its last step is before 0 in both. Skipped updates do not count (as the optimizer
//! counts them), so the factor is a function of the optimizer's state: a resume needs nothing else.

use std::f64::consts::PI;

use super::section::{LrSchedule, OptimizerSection};
use crate::{Result, bail_input};

/// The factor at `update` (1-based) of `total` updates.
pub fn factor(section: &OptimizerSection, update: u64, total: u64) -> f64 {
    let warmup = section.warmup_steps;
    if update <= warmup {
        return update as f64 / warmup as f64;
    }
    let progress = ((update - 1 - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64).min(1.0);
    let falling = match section.schedule {
        LrSchedule::Constant => return 1.0,
        LrSchedule::Linear => 1.0 - progress,
        LrSchedule::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
    };
    section.min_lr_ratio + (1.0 - section.min_lr_ratio) * falling
}

/// A schedule that falls needs updates to fall over.
///
/// # Errors
/// A warm-up that takes all of a falling schedule's updates.
pub fn check(section: &OptimizerSection, total: u64) -> Result<()> {
    if section.schedule != LrSchedule::Constant && section.warmup_steps >= total {
        bail_input!(
            "optimizer.warmup_steps: found {}, expected fewer than the run's {total} optimizer updates: the schedule falls after warm-up",
            section.warmup_steps
        );
    }
    Ok(())
}
