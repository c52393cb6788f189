//! What `temper bench train` and `bench rollout` say: seconds by phase with their spread, rates, and what error costs.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::rl::flops::Work;
use crate::run::machine::CpuKind;

/// Seconds of the measured steps.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
    /// In the order in which they ran.
    pub all: Vec<f64>,
}

impl Spread {
    /// Of at least one value.
    pub fn of(values: &[f64]) -> Spread {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        let median = if n % 2 == 1 { sorted[n / 2] } else { (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0 };
        Spread { median, min: sorted[0], max: sorted[n - 1], all: values.to_vec() }
    }
}

/// A phase's rates are of its median.
#[derive(Clone, Debug, Serialize)]
pub struct PhaseRow {
    /// `rollout`, `logprobs`, `update`, `step`.
    pub phase: &'static str,
    pub seconds: Spread,
    /// Sampled tokens (rollout), tokens of the sequences (otherwise).
    pub tokens: u64,
    pub tokens_per_s: f64,
    /// The model's, without what is computed again (rl/flops.rs).
    pub flops: f64,
    pub flop_per_s: f64,
    /// FLOP/s over the device's dense bf16 rate, where that is known.
    pub mfu_ratio: Option<f64>,
}

impl PhaseRow {
    pub fn new(phase: &'static str, seconds: Spread, work: Work, ceiling_flop_per_s: Option<f64>) -> PhaseRow {
        let flop_per_s = work.flops / seconds.median;
        PhaseRow {
            phase,
            tokens: work.tokens,
            tokens_per_s: work.tokens as f64 / seconds.median,
            flops: work.flops,
            flop_per_s,
            mfu_ratio: ceiling_flop_per_s.map(|ceiling| flop_per_s / ceiling),
            seconds,
        }
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct Variant {
    /// `recipe`, or `without_matmul_error`.
    pub name: &'static str,
    pub phases: Vec<PhaseRow>,
    /// Host seconds inside spans of each name in a step, medians; spans nest.
    pub breakdown_s: BTreeMap<&'static str, f64>,
    /// Null where no update ran.
    pub update_recomputed_flops: Option<f64>,
    /// Mean |update's - rollout's| of the response tokens' log-probs, median of the steps; null where no update ran.
    pub logprob_gap_abs: Option<f64>,
    /// The most that torch's allocator had given out during a step; null on a CPU.
    pub peak_device_bytes: Option<u64>,
    /// Of a step, median; null without NVML.
    pub energy_j: Option<f64>,
}

#[derive(Clone, Debug, Serialize)]
pub struct StepReport {
    pub bench: &'static str,
    pub name: String,
    pub config_hash: String,
    pub seed: u64,
    pub machine: CpuKind,
    pub device: String,
    pub threads: usize,
    pub version: &'static str,
    pub torch: Option<&'static str>,
    pub commit: Option<String>,
    pub sources: &'static str,
    pub date: String,
    pub parameters: u64,
    pub lengths: String,
    pub sequences: usize,
    pub group_size: usize,
    pub prompt_tokens_mean: f64,
    pub response_tokens_mean: f64,
    pub response_tokens_max: u64,
    pub warmup_steps: usize,
    pub steps: usize,
    pub variants: Vec<Variant>,
    /// By phase: median seconds with matmul error over those without; null where the recipe has none.
    pub noise_time_ratio: Option<BTreeMap<&'static str, f64>>,
    /// What `temper plan` would say for these lengths; of training alone.
    pub estimated_device_bytes: Option<u64>,
    /// Since the process began.
    pub peak_host_bytes: Option<u64>,
    /// What made a step another one than was asked for: halved for want of memory, decoded without a graph, not injected as planned.
    pub warnings: Vec<String>,
}

impl StepReport {
    pub(super) fn noise_time_ratio(variants: &[Variant]) -> Option<BTreeMap<&'static str, f64>> {
        let [with, without] = variants else { return None };
        let ratio = |(a, b): (&PhaseRow, &PhaseRow)| (a.phase, a.seconds.median / b.seconds.median);
        Some(with.phases.iter().zip(&without.phases).map(ratio).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_of_the_median() {
        assert_eq!(
            Spread::of(&[3.0, 1.0, 8.0, 5.0]),
            Spread { median: 4.0, min: 1.0, max: 8.0, all: vec![3.0, 1.0, 8.0, 5.0] }
        );
        let row =
            PhaseRow::new("rollout", Spread::of(&[4.0, 2.0, 9.0]), Work { flops: 8e12, tokens: 100 }, Some(20e12));
        assert_eq!((row.tokens_per_s, row.flop_per_s, row.mfu_ratio), (25.0, 2e12, Some(0.1)));
        let variant = |name, seconds: f64| Variant {
            name,
            phases: vec![PhaseRow::new("rollout", Spread::of(&[seconds]), Work::default(), None)],
            breakdown_s: BTreeMap::new(),
            update_recomputed_flops: None,
            logprob_gap_abs: None,
            peak_device_bytes: None,
            energy_j: None,
        };
        let both = [variant("recipe", 3.0), variant("without_matmul_error", 2.0)];
        assert_eq!(StepReport::noise_time_ratio(&both), Some(BTreeMap::from([("rollout", 1.5)])));
        assert_eq!(StepReport::noise_time_ratio(&both[..1]), None);
    }
}
