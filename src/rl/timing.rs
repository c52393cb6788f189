//! The rows of timing.jsonl: all that depends on the clock or the machine, one object per step.

use std::time::Instant;

use serde_json::{Map, Value, json};

use super::rollout::Rollout;
use super::update::UpdateSummary;
use crate::device::gpu::monitor::{Monitor, Watch};
use crate::run::console::Console;

/// Starts a run's monitor. A machine without NVML gives rows without its keys.
pub fn start_monitor(watch: Option<&Watch>, console: &Console) -> Option<Monitor> {
    let warnings = console.clone();
    let started = Monitor::start(watch?, move |line| warnings.warn(line));
    started.map_err(|reason| console.detail(&format!("the GPU is not monitored: {reason}"))).ok()
}

/// A step that began at `started` and ends now.
pub fn timing_row(
    step: u64,
    started: Instant,
    seconds_rollout: f64,
    experience: &Rollout,
    summary: &UpdateSummary,
    monitor: Option<&Monitor>,
) -> Map<String, Value> {
    let response: usize = experience.completions.iter().map(|c| c.logprobs.len()).sum();
    let all: usize = experience.completions.iter().map(|c| c.sequence.ids.len()).sum();
    let seconds = started.elapsed().as_secs_f64();
    let row = json!({
        "step": step,
        "time_utc": crate::run::machine::utc_now(),
        "step_s": seconds,
        "rollout_s": seconds_rollout,
        "logprobs_s": summary.seconds_logprobs,
        "update_s": summary.seconds_update,
        "rollout_tokens_per_s": response as f64 / seconds_rollout,
        "tokens_per_s": all as f64 / seconds,
    });
    let mut row = row.as_object().cloned().unwrap_or_default();
    row.extend(monitor.map(Monitor::end_step).unwrap_or_default());
    row
}
