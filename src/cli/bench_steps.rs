//! `temper bench train CONFIG` and `temper bench rollout CONFIG`: a configuration's steps on made-up prompts, timed.

use std::path::PathBuf;

use super::{Global, common};
use crate::bench::lengths::Lengths;
use crate::bench::step_report::{PhaseRow, StepReport};
use crate::bench::steps::{StepOptions, steps};
use crate::config::{self, Config};
use crate::device;
use crate::model::checkpoint::resolve_model_path;
use crate::run::console::to_stderr;
use crate::run::trace;
use crate::{Error, Result};

#[derive(clap::Args)]
pub struct Args {
    /// A configuration, e.g. configs/e5c.yaml; its data is not read
    pub config: PathBuf,
    /// Override one key, e.g. --set trainer.microbatch_sequences=8 (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Measured steps, with matmul error and without in turns
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub steps: u16,
    /// Steps of each before them
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub warmup: u16,
    /// Tokens of prompts and responses: gsm8k, N for responses of N tokens, or a FILE with a line a prompt (its tokens, then
    /// those of its responses)
    #[arg(long, default_value = "gsm8k", value_name = "gsm8k|FILE|N")]
    pub lengths: String,
    /// Write the measured steps' spans as a trace that Perfetto loads
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
}

pub fn run(args: &Args, rollout_only: bool, global: &Global) -> Result<()> {
    let mut config = config::load(&args.config, &args.overrides)?;
    let lengths = Lengths::parse(&args.lengths)?;
    weights_or_preset(&mut config, global)?;
    let device = common::device(global, config.trainer.threads)?;
    if let Some(file) = &args.profile {
        trace::check(file)?;
    }
    let progress = |what: &str| {
        if !global.quiet {
            to_stderr(format_args!("bench: {what}"));
        }
    };
    let options = StepOptions {
        rollout_only,
        steps: args.steps.into(),
        warmup: args.warmup.into(),
        lengths,
        device,
        device_name: device::name(device),
        monitor: common::watch(device),
        progress: &progress,
        warn: &|line| to_stderr(format_args!("warning: {line}")),
    };
    let (report, recording) = steps(&common::recipe(&config), &options)?;
    if let Some(file) = &args.profile {
        let command = format!("bench {} {}", report.bench, args.config.display());
        common::write_trace(file, &command, recording, global)?;
    }
    super::print(match global.json {
        true => serde_json::to_string(&report).map_err(|e| Error::Runtime(format!("bench: {e}")))?,
        false => text(&report),
    })
}

/// A model that is not on this machine is replaced by random weights of its preset's shapes, where it names one.
fn weights_or_preset(config: &mut Config, global: &Global) -> Result<()> {
    let (Some(path), Some(preset)) = (&config.model.path, &config.model.preset) else { return Ok(()) };
    if let Err(error) = resolve_model_path(path) {
        if !global.quiet {
            to_stderr(format_args!("notice: model.path: {error}; random weights of {preset} instead"));
        }
        config.model.path = None;
    }
    Ok(())
}

fn text(report: &StepReport) -> String {
    let mut table = common::plain_table(&["phase", "", "median", "min - max", "tokens/s", "TFLOP/s", "MFU"]);
    for variant in &report.variants {
        for row in &variant.phases {
            table.add_row(cells(variant.name, row));
        }
    }
    let mut lines = vec![common::lines(&table)];
    if let Some(ratios) = &report.noise_time_ratio {
        let all: Vec<String> = ratios.iter().map(|(phase, ratio)| format!("{phase} x {ratio:.3}")).collect();
        lines.push(format!("matmul error costs: {}", all.join(", ")));
    }
    for variant in &report.variants {
        let parts: Vec<String> = variant.breakdown_s.iter().map(|(name, s)| format!("{name} {s:.3} s")).collect();
        lines.push(format!("host spans, {}: {}", variant.name, parts.join(", ")));
    }
    let gaps = report.variants.iter().filter_map(|v| Some((v.name.replace('_', " "), v.logprob_gap_abs?)));
    let gaps: Vec<String> = gaps.map(|(name, gap)| format!("{name} {gap:.2e}")).collect();
    if !gaps.is_empty() {
        lines.push(format!("log-prob gap, rollout to update: {}", gaps.join(", ")));
    }
    lines.extend(report.warnings.iter().map(|line| format!("warning: {line}")));
    let gb = |bytes: u64| format!("{:.2} GB", bytes as f64 / 1e9);
    let first = report.variants.first();
    let device = first.and_then(|v| v.peak_device_bytes).map(|bytes| format!("device memory {}", gb(bytes)));
    let host = report.peak_host_bytes.map(|bytes| format!("host memory {}", gb(bytes)));
    let estimated = report.estimated_device_bytes.map(|bytes| format!("tensors estimated at {}", gb(bytes)));
    let energy = first.and_then(|v| v.energy_j).map(|joules| format!("{joules:.0} J a step"));
    lines.push([device, host, estimated, energy].into_iter().flatten().collect::<Vec<_>>().join(", "));
    lines.push(format!(
        "{} sequences in groups of {}, prompts {:.0} and responses {:.0} tokens on average (at most {}), lengths {}; {} steps after {}",
        report.sequences,
        report.group_size,
        report.prompt_tokens_mean,
        report.response_tokens_mean,
        report.response_tokens_max,
        report.lengths,
        report.steps,
        report.warmup_steps
    ));
    lines.push(format!(
        "{} ({}), {}, {}, {} threads, temper {} at {}, {}",
        report.name,
        report.config_hash,
        report.device,
        report.machine.model,
        report.threads,
        report.version,
        report.commit.as_deref().unwrap_or("an unknown commit"),
        report.date
    ));
    lines.join("\n")
}

fn cells(variant: &str, row: &PhaseRow) -> [String; 7] {
    [
        row.phase.to_string(),
        variant.replace('_', " "),
        format!("{:.3} s", row.seconds.median),
        format!("{:.3} - {:.3}", row.seconds.min, row.seconds.max),
        format!("{:.0}", row.tokens_per_s),
        format!("{:.4}", row.flop_per_s / 1e12),
        row.mfu_ratio.map_or(String::new(), |ratio| format!("{:.1} %", 100.0 * ratio)),
    ]
}
