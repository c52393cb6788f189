//! The rows of timing.jsonl: all that depends on the clock or the machine, one object per step.
//!
//! What a step computed is counted from its tokens (`flops.rs`); FLOP/s are the model's operations over the clock, MFU
//! their share of the device's dense bf16 rate, null where that is not known. A phase ends when the device has
//! done it.

use std::time::Instant;

use serde_json::{Map, Value, json};
use tch::Device;

use super::flops::{Passes, StepWork, Work, step_work};
use super::recipe::Recipe;
use super::rollout::Rollout;
use super::update::UpdateSummary;
use crate::device::gpu::monitor::{Monitor, Watch};
use crate::device::gpu::peak::dense_bf16_flop_per_s;
use crate::device::host;
use crate::model::config::Qwen2Config;
use crate::model::lora;
use crate::ops::cuda::memory;
use crate::run::console::Console;

/// Starts a run's monitor. A machine without NVML gives rows without its keys.
pub fn start_monitor(watch: Option<&Watch>, console: &Console) -> Option<Monitor> {
    let warnings = console.clone();
    let started = Monitor::start(watch?, move |line| warnings.warn(line));
    started.map_err(|reason| console.detail(&format!("the GPU is not monitored: {reason}"))).ok()
}

/// What counts the work and memory of the steps of one run.
pub struct Accounting {
    shapes: Qwen2Config,
    group_size: usize,
    passes: Passes,
    device: Device,
    /// Dense bf16, where the card's is known.
    ceiling_flop_per_s: Option<f64>,
}

impl Accounting {
    /// `device_name` as NVML or CUDA writes it.
    pub fn of(recipe: &Recipe, shapes: &Qwen2Config, device: Device, device_name: &str) -> Accounting {
        let passes = Passes {
            reference: recipe.algorithm.kl_coef != 0.0,
            gradient_checkpointing: recipe.trainer.gradient_checkpointing.unwrap_or(device.is_cuda()),
            adapter_elements: recipe.model.lora.as_ref().map(|lora| lora::elements(shapes, lora)),
        };
        Accounting {
            shapes: shapes.clone(),
            group_size: recipe.rollout.group_size,
            passes,
            device,
            ceiling_flop_per_s: device.is_cuda().then(|| dense_bf16_flop_per_s(device_name)).flatten(),
        }
    }

    /// A step begins: the device's peak counts from now.
    pub fn begin_step(&self) {
        memory::reset_peak(self.device);
    }

    pub fn ceiling_flop_per_s(&self) -> Option<f64> {
        self.ceiling_flop_per_s
    }

    /// The rollout's is that of everything sampled, the others' that of what is trained on.
    pub fn work(&self, experience: &Rollout) -> StepWork {
        let of = |lengths: &[(usize, usize)]| step_work(&self.shapes, lengths, self.group_size, self.passes);
        let mut lengths: Vec<(usize, usize)> = experience.completions.iter().map(|c| c.sequence.lengths()).collect();
        let trained = of(&lengths);
        lengths.extend(&experience.left_out);
        StepWork { rollout: of(&lengths).rollout, ..trained }
    }

    /// Tokens and operations of a phase that took `seconds`: `NAME_tokens_per_s`, `_flops`, `_flop_per_s`, `_mfu_ratio`.
    pub fn rates(&self, name: &str, work: Work, seconds: f64) -> Map<String, Value> {
        let flop_per_s = work.flops / seconds;
        let mfu = self.ceiling_flop_per_s.map(|ceiling| flop_per_s / ceiling);
        let all = [
            ("tokens_per_s", json!(work.tokens as f64 / seconds)),
            ("flops", json!(work.flops)),
            ("flop_per_s", json!(flop_per_s)),
            ("mfu_ratio", json!(mfu)),
        ];
        all.into_iter().map(|(key, value)| (format!("{name}_{key}"), value)).collect()
    }

    /// `peak_device_bytes` since the step began (null on a CPU), `peak_host_bytes` since the process began.
    pub fn memory(&self) -> Map<String, Value> {
        let all = [
            ("peak_device_bytes", json!(memory::peak_bytes(self.device))),
            ("peak_host_bytes", json!(host::peak_memory_bytes())),
        ];
        all.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
    }
}

/// A step that began at `started` and ends now.
pub fn timing_row(
    step: u64,
    started: Instant,
    seconds_rollout: f64,
    experience: &Rollout,
    summary: &UpdateSummary,
    accounting: &Accounting,
    monitor: Option<&Monitor>,
) -> Map<String, Value> {
    let seconds = started.elapsed().as_secs_f64();
    let work = accounting.work(experience);
    let row = json!({
        "step": step,
        "time_utc": crate::run::machine::utc_now(),
        "step_s": seconds,
        "rollout_s": seconds_rollout,
        "logprobs_s": summary.seconds_logprobs,
        "update_s": summary.seconds_update,
        "tokens_per_s": work.update.tokens as f64 / seconds,
    });
    let mut row = row.as_object().cloned().unwrap_or_default();
    row.extend(accounting.rates("rollout", work.rollout, seconds_rollout));
    row.extend(accounting.rates("logprobs", work.logprobs, summary.seconds_logprobs));
    row.extend(accounting.rates("update", work.update, summary.seconds_update));
    row.insert("update_recomputed_flops".into(), json!(work.recomputed_flops));
    row.extend(accounting.memory());
    row.extend(monitor.map(Monitor::end_step).unwrap_or_default());
    row
}

/// A row for people: seconds, tokens/s and MFU by phase, memory, energy.
pub fn timing_line(row: &Map<String, Value>) -> String {
    let number = |key: &str| row.get(key).and_then(Value::as_f64);
    let phase = |name: &str| {
        let rate = number(&format!("{name}_tokens_per_s")).unwrap_or_default();
        let mfu = number(&format!("{name}_mfu_ratio")).map_or(String::new(), |r| format!(", MFU {:.1} %", 100.0 * r));
        let seconds = number(&format!("{name}_s")).unwrap_or_default();
        format!("{name} {seconds:.2} s ({rate:.0} tokens/s{mfu})")
    };
    let mut parts = vec![phase("rollout"), phase("logprobs"), phase("update")];
    let memory = number("peak_device_bytes").map(|b| ("device", b)).or(number("peak_host_bytes").map(|b| ("host", b)));
    parts.extend(memory.map(|(what, bytes)| format!("{what} memory {:.2} GB", bytes / 1e9)));
    parts.extend(number("gpu_energy_j").map(|joules| format!("{joules:.0} J")));
    let seconds = number("step_s").unwrap_or_default();
    format!("step {} took {seconds:.2} s: {}", row.get("step").unwrap_or(&Value::Null), parts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_told_in_one_line() {
        let row = json!({
            "step": 3, "step_s": 12.0, "rollout_s": 5.0, "logprobs_s": 2.0, "update_s": 4.5, "rollout_tokens_per_s": 900.4,
            "logprobs_tokens_per_s": 4000.0, "update_tokens_per_s": 1777.0, "rollout_mfu_ratio": 0.0312,
            "logprobs_mfu_ratio": null, "peak_device_bytes": null, "peak_host_bytes": 2_500_000_000u64, "gpu_energy_j": 77.0,
        });
        assert_eq!(
            timing_line(row.as_object().unwrap_or(&Map::new())),
            "step 3 took 12.00 s: rollout 5.00 s (900 tokens/s, MFU 3.1 %), logprobs 2.00 s (4000 tokens/s), update 4.50 s \
             (1777 tokens/s), host memory 2.50 GB, 77 J"
        );
    }
}
