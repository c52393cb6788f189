//! Which values of metrics.jsonl and timing.jsonl are shown as curves, under which names and units.

use serde_json::Value;

use super::arms::Run;
use crate::inject::agreement::MATMUL_TOLERANCE;

/// Where a curve's rows are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    Metrics,
    Validations,
    Timing,
}

impl Source {
    pub(super) fn rows(self, run: &Run) -> &[Value] {
        match self {
            Source::Metrics => &run.files.train,
            Source::Validations => &run.files.validations,
            Source::Timing => &run.timing,
        }
    }
}

/// What a measured value is held against.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Planned {
    Nothing,
    /// Another key of the same row.
    Key(&'static str),
    /// `noisy_ops.error_scale`, where noise is on.
    ErrorScale,
}

impl Planned {
    /// The share by which a measured value may stray, where the check has such a bound.
    pub(super) fn tolerance(self) -> f64 {
        if self == Planned::ErrorScale { MATMUL_TOLERANCE } else { 0.0 }
    }

    /// At a row.
    pub(super) fn value(self, run: &Run, row: &Value) -> Option<f64> {
        match self {
            Planned::Nothing => None,
            Planned::Key(key) => row[key].as_f64(),
            Planned::ErrorScale => {
                let noise = &run.files.config["noisy_ops"];
                if noise["enabled"] == true { noise["error_scale"].as_f64() } else { None }
            }
        }
    }
}

pub(super) struct Shown<'a> {
    pub id: &'a str,
    pub title: &'a str,
    pub unit: &'a str,
    pub source: Source,
    pub key: &'a str,
    /// From the file's unit to the shown one.
    pub factor: f64,
    pub log: bool,
    pub planned: Planned,
    pub note: &'a str,
}

impl<'a> Shown<'a> {
    pub(super) const fn of(id: &'a str, title: &'a str, unit: &'a str, key: &'a str) -> Shown<'a> {
        let (source, planned) = (Source::Metrics, Planned::Nothing);
        Shown { id, title, unit, source, key, factor: 1.0, log: false, planned, note: "" }
    }

    pub(super) const fn percent(id: &'a str, title: &'a str, key: &'a str, note: &'a str) -> Shown<'a> {
        Shown { factor: 100.0, note, ..Shown::of(id, title, "%", key) }
    }

    pub(super) const fn timed(id: &'a str, title: &'a str, unit: &'a str, key: &'a str) -> Shown<'a> {
        Shown { source: Source::Timing, ..Shown::of(id, title, unit, key) }
    }
}

/// Curves under one heading.
pub(super) struct Section {
    pub id: &'static str,
    pub title: &'static str,
    pub note: &'static str,
    pub curves: &'static [Shown<'static>],
}

pub(super) const LEARNING: Section = Section {
    id: "learning",
    title: "Learning",
    note: "What the policy did on its training prompts, under the run's own noise.",
    curves: &[
        Shown { note: "Mean over a step's completions.", ..Shown::of("reward_mean", "Reward", "", "reward/mean") },
        Shown { note: "Of the sampled tokens.", ..Shown::of("entropy", "Entropy", "nats", "entropy") },
        Shown { note: "Against the start model.", ..Shown::of("kl_ref", "KL to the reference", "nats", "kl/ref") },
        Shown::percent(
            "clipped_low",
            "Ratio clipped below",
            "ratio/clipped_low",
            "Tokens whose update the lower clip cut.",
        ),
        Shown::percent(
            "clipped_high",
            "Ratio clipped above",
            "ratio/clipped_high",
            "Tokens whose update the upper clip cut.",
        ),
        Shown {
            note: "Rollout against update, mean of absolute differences.",
            ..Shown::of("logprob_gap", "Log-probability gap", "nats", "logprob_gap/mean_abs")
        },
        Shown::of("response_tokens", "Response length", "tokens", "response_tokens/mean"),
        Shown::percent(
            "unfinished",
            "Responses cut off",
            "response_tokens/clipped_ratio",
            "They reached the length limit.",
        ),
        Shown::percent(
            "zero_std_groups",
            "Groups without signal",
            "reward/zero_std_groups",
            "All completions of a prompt had one reward.",
        ),
        Shown {
            note: "Before clipping; mean over a step's updates.",
            ..Shown::of("grad_norm", "Gradient norm", "", "grad_norm")
        },
    ],
};

pub(super) const INJECTION: Section = Section {
    id: "injection",
    title: "Injected noise",
    note: "Dashed: planned. Solid: measured from the tensors that were used. Grey band: what the check lets pass for matmul noise.",
    curves: &[
        Shown {
            log: true,
            planned: Planned::Key("aqn/sigma"),
            note: "Steps without AQN (sigma 0) have no place on a logarithmic axis.",
            ..Shown::of("aqn_sigma", "AQN sigma", "", "aqn/measured_std")
        },
        Shown {
            planned: Planned::ErrorScale,
            note: "Over all noisy products.",
            ..Shown::of("matmul_forward", "Matmul noise, forward", "", "noisy_ops/measured_std_forward")
        },
        Shown {
            planned: Planned::ErrorScale,
            note: "Over dX and dW.",
            ..Shown::of("matmul_backward", "Matmul noise, backward", "", "noisy_ops/measured_std_backward")
        },
        Shown::percent("aqn_changed", "Norm outputs that AQN changed", "aqn/output_changed_ratio", "After rounding."),
        Shown::of("quant_sqnr", "Quantized weights, SQNR", "dB", "quant/sqnr_db"),
        Shown::of("quant_activation_sqnr", "Quantized activations, SQNR", "dB", "quant/activation_sqnr_db"),
        Shown {
            note: "Lines of the check; 0 is as planned.",
            ..Shown::of("disagreements", "Disagreements with the plan", "", "injection/disagreements")
        },
    ],
};

pub(super) const MACHINE: Section = Section {
    id: "machine",
    title: "Machine",
    note: "Clock times; they depend on what else the machine did.",
    curves: &[
        Shown::timed("step_s", "Step time", "s", "step_s"),
        Shown::timed("rollout_s", "of it: rollout", "s", "rollout_s"),
        Shown::timed("update_s", "of it: update", "s", "update_s"),
        Shown::timed("tokens_per_s", "Tokens per second", "", "tokens_per_s"),
        Shown::timed("rollout_tokens_per_s", "Generated tokens per second", "", "rollout_tokens_per_s"),
    ],
};

/// The last part of a `gpu_*` key, its unit, and the factor to it.
const GPU_UNITS: [(&str, &str, f64); 8] = [
    ("_bytes", "GiB", 1.0 / (1u64 << 30) as f64),
    ("_ratio", "%", 100.0),
    ("_percent", "%", 1.0),
    ("_w", "W", 1.0),
    ("_c", "°C", 1.0),
    ("_mhz", "MHz", 1.0),
    ("_s", "s", 1.0),
    ("_j", "J", 1.0),
];

/// Unit and factor of a `gpu_*` key.
pub(super) fn gpu_unit(key: &str) -> (&'static str, f64) {
    let found = GPU_UNITS.into_iter().find(|(end, ..)| key.ends_with(end));
    found.map_or(("", 1.0), |(_, unit, factor)| (unit, factor))
}

/// `gpu_memory_used_bytes` as people say it: `GPU memory used`.
pub(super) fn gpu_title(key: &str) -> String {
    let name = key.trim_start_matches("gpu_");
    let name = GPU_UNITS.into_iter().find_map(|(end, ..)| name.strip_suffix(end)).unwrap_or(name);
    format!("GPU {}", name.replace('_', " "))
}
