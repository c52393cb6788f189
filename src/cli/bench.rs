//! `temper bench`: `kernels`, times of the operations beside baselines taken in the same run; `train` and `rollout` are in
//! `bench_steps`.

use std::io::Write;
use std::path::PathBuf;

use super::{Global, bench_steps};
use crate::bench::{Options, Report, Row, choices, kernels};
use crate::model::checkpoint::atomic_file;
use crate::ops::cpu::path::Path;
use crate::run::console::to_stderr;
use crate::{Error, Result, bail_input, device};

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Fake quantization, noise, and the noisy linear layer
    Kernels(KernelsArgs),
    /// Whole training steps of a configuration on made-up prompts, by phase, with matmul error and without
    Train(bench_steps::Args),
    /// Its rollouts alone
    Rollout(bench_steps::Args),
}

#[derive(clap::Args)]
struct KernelsArgs {
    /// Threads of our loops and of libtorch (default: all cores)
    #[arg(long)]
    threads: Option<usize>,
    /// portable, avx2 or avx512 (default: the fastest that the CPU has)
    #[arg(long)]
    simd: Option<String>,
    /// Only groups whose name contains this, such as `bf16 [1536, 8960]` or `noisy_linear`
    #[arg(long)]
    only: Option<String>,
    /// Find the fastest tiles of the noisy product on this GPU instead, and write them to FILE in the form of
    /// src/ops/cuda/matmul/choices.json, which a build takes in
    #[arg(long, value_name = "FILE")]
    choices: Option<PathBuf>,
}

pub fn run(args: &Args, global: &Global) -> Result<()> {
    match &args.what {
        What::Kernels(args) => run_kernels(args, global),
        What::Train(args) => bench_steps::run(args, false, global),
        What::Rollout(args) => bench_steps::run(args, true, global),
    }
}

fn run_kernels(args: &KernelsArgs, global: &Global) -> Result<()> {
    let device = device::parse(global.device.as_deref())?;
    let path = path(args.simd.as_deref())?;
    if args.threads == Some(0) {
        bail_input!("--threads 0: expected at least 1");
    }
    device::set_threads(args.threads);
    let progress = |group: &str| {
        if !global.quiet {
            to_stderr(format_args!("bench: {group}"));
        }
    };
    let options = Options { path, only: args.only.as_deref(), progress: &progress };
    if let Some(file) = &args.choices {
        let text = choices(&options, device)?;
        return atomic_file(file, |to| to.write_all(text.as_bytes()).map_err(|e| Error::io(file, e)));
    }
    let report = kernels(&options, device)?;
    let text = match global.json {
        true => serde_json::to_string(&report).map_err(|e| Error::Runtime(format!("bench: {e}")))?,
        false => text(&report),
    };
    writeln!(std::io::stdout(), "{text}").map_err(|e| Error::io("stdout", e))
}

fn path(name: Option<&str>) -> Result<Path> {
    let Some(name) = name else { return Ok(Path::best()) };
    let available: Vec<&str> = Path::ALL.into_iter().filter(|p| p.is_available()).map(Path::name).collect();
    match Path::ALL.into_iter().find(|p| p.name() == name && p.is_available()) {
        Some(path) => Ok(path),
        None => bail_input!("--simd {name}: expected one that this CPU has: {}", available.join(", ")),
    }
}

fn text(report: &Report) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(HEADER);
    for row in &report.rows {
        table.add_row(cells(row));
    }
    let table = table.to_string().lines().map(str::trim_end).collect::<Vec<_>>().join("\n");
    let gpu = report.gpu.as_ref().map_or(String::new(), |name| format!("{name}, "));
    format!(
        "{table}\n{gpu}{}, {} threads, {}, temper {} at {}, {}\nx copy, x baseline: fastest time over fastest time in the \
         same run, less is better; of limit: bytes a second over the copy's, \
         or TFLOP/s over torch's on large squares; torch chain: how many times faster than the same \
         steps as tensor operations",
        report.machine.model,
        report.threads,
        report.simd,
        report.version,
        report.commit.as_deref().unwrap_or("an unknown commit"),
        report.date
    )
}

const HEADER: [&str; 10] =
    ["kernel", "shape", "median", "min", "spread", "speed", "of limit", "x copy", "x baseline", "torch chain"];

fn cells(row: &Row) -> [String; 10] {
    let time = |us: f64| match us {
        us if us < 100.0 => format!("{us:.1} us"),
        us if us < 1e4 => format!("{us:.0} us"),
        us => format!("{:.1} ms", us / 1e3),
    };
    let or_empty = |text: Option<String>| text.unwrap_or_default();
    let shape: Vec<String> = row.shape.iter().map(usize::to_string).collect();
    let speed = match (row.gb_per_s, row.tflop_per_s) {
        (Some(gb), _) => format!("{gb:.1} GB/s"),
        (None, Some(tflops)) => format!("{tflops:.3} TFLOP/s"),
        (None, None) => String::new(),
    };
    let baseline = row.baseline_ratio.zip(row.baseline.as_deref());
    [
        row.name.clone(),
        format!("{} {}", shape.join(" x "), row.dtype),
        time(row.median_us),
        time(row.min_us),
        format!("{:.0} %", 100.0 * row.spread),
        speed,
        or_empty(row.copy_bandwidth_ratio.or(row.ceiling_ratio).map(|r| format!("{:.0} %", 100.0 * r))),
        or_empty(row.copy_ratio.map(|r| format!("{r:.2}"))),
        or_empty(baseline.map(|(r, name)| format!("{r:.2} {name}"))),
        or_empty(row.torch_chain_ratio.map(|r| format!("{r:.0}"))),
    ]
}
