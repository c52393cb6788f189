//! Microbenchmarks, and whole steps of a configuration (`steps`): a time stands beside a baseline and a ceiling that were measured in the same run.
//!
//! What is compared runs in turns (A B C A B C ...), so that other work on the machine hits all of it; buffers rotate
//! and exceed the caches. Ratios are of minima over the same rounds: other work can only add time, and it adds more to
//! what takes longer.

pub mod cuda;
mod fake_quant;
pub mod lengths;
mod noise;
pub mod selftest;
pub mod step_report;
pub mod steps;
pub mod timing;
mod torch_chain;

use serde::Serialize;

use tch::Device;

use crate::ops::cpu::path::Path;
use crate::ops::cuda::launch::Gpu;
use crate::ops::cuda::matmul::choices_of_others;
use crate::ops::cuda::timer::Timer;
use crate::run::machine::{CpuKind, SOURCES, git_commit, utc_now};
use crate::{Error, Result, bail_input};
use timing::Times;

/// The buffers of one kind hold at least this much together, more than caches do.
const ROTATED_BYTES: usize = 192 << 20;

/// What to measure.
#[derive(Clone, Copy)]
pub struct Options<'a> {
    /// The instruction set of the CPU's operations, of those that it has.
    pub path: Path,
    /// Groups whose name contains this alone.
    pub only: Option<&'a str>,
    /// Called with the name of each group before it runs.
    pub progress: &'a dyn Fn(&str),
}

/// One line of the result. Ratios are times over times: below 1 is faster.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub name: String,
    pub shape: Vec<usize>,
    pub dtype: &'static str,
    pub rounds: usize,
    pub median_us: f64,
    pub min_us: f64,
    /// Distance of the quartiles over the median.
    pub spread: f64,
    /// What has to be read and written at least; None where arithmetic is the limit.
    pub bytes: Option<usize>,
    /// Of the fastest repetition, as is TFLOP/s.
    pub gb_per_s: Option<f64>,
    pub flops: Option<f64>,
    pub tflop_per_s: Option<f64>,
    /// TFLOP/s over those of torch's product of large square matrices in the same run.
    pub ceiling_ratio: Option<f64>,
    /// This time over that of a copy of the same matrix, by the same threads in the same chunks.
    pub copy_ratio: Option<f64>,
    /// Bytes a second over those of the copy.
    pub copy_bandwidth_ratio: Option<f64>,
    /// This time over that of `baseline`.
    pub baseline_ratio: Option<f64>,
    pub baseline: Option<String>,
    /// The time of the same steps as torch tensor operations, over this one: how many times faster this is.
    pub torch_chain_ratio: Option<f64>,
    pub torch_chain_min_us: Option<f64>,
}

impl Row {
    fn new(name: &str, shape: &[usize], dtype: &'static str, times: &Times) -> Row {
        Row {
            name: name.to_string(),
            shape: shape.to_vec(),
            dtype,
            rounds: times.rounds(),
            median_us: times.median_us(),
            min_us: times.min_us(),
            spread: times.spread(),
            bytes: None,
            gb_per_s: None,
            flops: None,
            tflop_per_s: None,
            ceiling_ratio: None,
            copy_ratio: None,
            copy_bandwidth_ratio: None,
            baseline_ratio: None,
            baseline: None,
            torch_chain_ratio: None,
            torch_chain_min_us: None,
        }
    }

    fn moving(mut self, bytes: usize) -> Row {
        self.bytes = Some(bytes);
        self.gb_per_s = Some(bytes as f64 / self.min_us / 1e3);
        self
    }

    fn computing(mut self, flops: f64) -> Row {
        self.flops = Some(flops);
        self.tflop_per_s = Some(flops / self.min_us / 1e6);
        self
    }

    fn beside_ceiling(mut self, tflop_per_s: f64) -> Row {
        self.ceiling_ratio = self.tflop_per_s.map(|own| own / tflop_per_s);
        self
    }

    fn beside_copy(mut self, copy: &Times) -> Row {
        self.copy_ratio = Some(self.min_us / copy.min_us());
        self
    }

    fn beside(mut self, baseline: &str, times: &Times) -> Row {
        self.baseline = Some(baseline.to_string());
        self.baseline_ratio = Some(self.min_us / times.min_us());
        self
    }

    fn beside_chain(mut self, chain: &Times) -> Row {
        self.torch_chain_min_us = Some(chain.min_us());
        self.torch_chain_ratio = Some(chain.min_us() / self.min_us);
        self
    }
}

/// Machine, build and rows.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub machine: CpuKind,
    /// The GPU, where the kernels are its; `simd` and `threads` are the CPU's.
    pub gpu: Option<String>,
    pub simd: &'static str,
    pub threads: usize,
    pub version: &'static str,
    pub commit: Option<String>,
    pub sources: &'static str,
    pub date: String,
    pub rows: Vec<Row>,
}

/// Times every kernel of a device. The thread pools must have their size already (`device::set_threads`).
///
/// # Errors
/// `Input` where `only` names no group; what the device answers.
pub fn kernels(options: &Options, device: Device) -> Result<Report> {
    options.path.limit();
    let _no_grad = tch::no_grad_guard();
    let rows = match device {
        Device::Cuda(index) => {
            let gpu = Gpu::number(index);
            cuda::rows(&gpu, &Timer::new(gpu)?, &cuda::GPU, options)?
        }
        _ => {
            let mut rows = fake_quant::rows(options)?;
            rows.extend(noise::rows(options)?);
            rows
        }
    };
    if let (Some(only), true) = (options.only, rows.is_empty()) {
        bail_input!(
            "--only {only:?}: no group has it in its name, expected for example \"bf16 [1536, 8960]\" or \"noise\""
        );
    }
    Ok(Report {
        machine: CpuKind::of_this_machine(),
        gpu: matches!(device, Device::Cuda(_)).then(|| crate::device::name(device)),
        simd: options.path.name(),
        threads: rayon::current_num_threads(),
        version: env!("CARGO_PKG_VERSION"),
        commit: git_commit(),
        sources: SOURCES,
        date: utc_now(),
        rows,
    })
}

/// The text of choices.json (src/ops/cuda/matmul/measured.rs) with what is fastest on this GPU, and what is built in for others.
///
/// # Errors
/// `Input` for a device that is no GPU, or where `only` names no group; what the device answers.
pub fn choices(options: &Options, device: Device) -> Result<String> {
    let Device::Cuda(index) = device else { bail_input!("--choices: found device cpu, expected a CUDA device") };
    let _no_grad = tch::no_grad_guard();
    let gpu = Gpu::number(index);
    let measured = cuda::choices(&gpu, &Timer::new(gpu)?, &cuda::GPU, options)?;
    let Some(first) = measured.first() else { bail_input!("--only: no group of choices has that in its name") };
    let mut all = choices_of_others(&first.gpu);
    all.extend(measured);
    // A line each.
    let lines = all.iter().map(|choice| serde_json::to_string(choice).map_err(|e| Error::Runtime(e.to_string())));
    Ok(format!("[\n{}\n]\n", lines.collect::<Result<Vec<_>>>()?.join(",\n")))
}

impl Options<'_> {
    /// Whether a group is wanted; says so before it runs.
    fn begins(&self, group: &str) -> bool {
        let wanted = self.only.is_none_or(|part| group.contains(part));
        if wanted {
            (self.progress)(group);
        }
        wanted
    }
}
