//! The command line: a file per subcommand; parses, calls, prints.
// Through `print`: println! panics where stdout cannot be written.
#![deny(clippy::print_stdout)]

pub mod bench;
mod bench_steps;
mod common;
pub mod compare;
pub mod config;
pub mod doctor;
pub mod eval;
mod eval_robustness;
pub mod generate;
pub mod gpu;
mod inputs;
pub mod jobs;
pub mod merge;
pub mod plan;
mod plan_memory;
mod prompt;
pub mod quantize;
pub mod quickstart;
pub mod report;
mod results;
pub mod scan;
mod scan_faults;
mod scan_plots;
mod scan_tables;
pub mod score;
pub mod selftest;
pub mod submit;
pub mod sweep;
pub mod train;
pub mod validate;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::run::console::to_stderr;
use crate::{Error, Result};

/// Hardens a language model against the arithmetic it will run on.
#[derive(Parser)]
#[command(name = "temper", version, arg_required_else_help = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options that every command takes.
#[derive(clap::Args, Clone, Debug)]
pub struct Global {
    /// cpu, cuda or cuda:N (default: cuda when a usable GPU is there, else cpu)
    #[arg(long, global = true)]
    pub device: Option<String>,
    /// Machine-readable result alone on stdout
    #[arg(long, global = true)]
    pub json: bool,
    /// No progress, only the result and warnings
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// More detail (repeatable)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

#[derive(Subcommand)]
enum Command {
    /// The main job in minutes on a CPU, without downloads
    Quickstart(quickstart::Args),
    /// Train a model with reinforcement learning under the configured noise
    Train(train::Args),
    /// Train arms x seeds of one configuration, one run after the other
    Sweep(sweep::Args),
    /// Train as a detached job on another machine: ssh, a container there, Slurm
    Submit(submit::Args),
    /// Jobs on other machines: state, last metrics, GPUs
    Status(jobs::StatusArgs),
    /// A job's log
    Logs(jobs::LogsArgs),
    /// Bring a job's run directory here; again: what is new
    Fetch(jobs::FetchArgs),
    /// Stop jobs: TERM, in time for a checkpoint, then KILL
    Cancel(jobs::CancelArgs),
    /// Remove what no job on a host needs any more
    Clean(jobs::CleanArgs),
    /// What runs reached, arm against arm, with intervals and paired tests
    Compare(compare::Args),
    /// One self-contained HTML page about runs or a sweep
    Report(report::Args),
    /// Accuracy of a model, clean and under the configuration's noise and quantization
    Eval(eval::Args),
    /// Continue a prompt
    Generate(generate::Args),
    /// Log-probability of each token given those before it
    Score(score::Args),
    /// Quantize a model directory or a .safetensors file
    Quantize(quantize::Args),
    /// Add an adapter to its base: a model directory
    Merge(merge::Args),
    /// Where in a model, and how much, formats and hardware errors hurt; multipliers of AQN from it
    Scan(Box<scan::Args>),
    /// Which rule made a packed checkpoint from a model's weights
    Validate(validate::Args),
    /// Print the sigma of every training step and what is injected into every module
    Plan(plan::Args),
    /// A configuration as it resolves, the difference of two, the JSON Schema for editors
    Config(config::Args),
    /// Times of the operations beside baselines taken in the same run
    Bench(bench::Args),
    /// Every kernel on this machine's GPU against the CPU, bit for bit
    Selftest(selftest::Args),
    /// Every GPU now: use, memory, power, temperature, clocks, errors, processes
    Gpu(gpu::Args),
    /// What this machine has, and what to do about what is missing
    Doctor(doctor::Args),
}

/// OpenMP's idle threads spin by default, which on a busy machine with few cores makes a run 5 to 10 times slower. The
/// library reads its policy when it is loaded, before main: so the process starts itself once more with the policy set.
/// A policy that the user has set stays.
fn let_idle_threads_sleep() {
    use std::os::unix::process::CommandExt;
    const POLICY: &str = "OMP_WAIT_POLICY";
    if std::env::var_os(POLICY).is_some() {
        return;
    }
    if let Ok(program) = std::env::current_exe() {
        // Returns only where it failed; then the run is slower, nothing else.
        let _ = std::process::Command::new(program).args(std::env::args_os().skip(1)).env(POLICY, "PASSIVE").exec();
    }
}

/// Parses the command line, runs the command, prints one error line, maps the error to an exit code.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(usage) => return usage_error(&usage),
    };
    if matches!(
        cli.command,
        Command::Quickstart(_)
            | Command::Train(_)
            | Command::Sweep(_)
            | Command::Eval(_)
            | Command::Scan(_)
            | Command::Bench(_)
    ) {
        let_idle_threads_sleep();
    }
    // A panic is a bug; its user still gets one line.
    std::panic::set_hook(Box::new(|_| {}));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(&cli))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        let first = text.and_then(|t| t.lines().next()).unwrap_or("panic");
        Err(Error::Runtime(format!("internal error: {first}; please report it")))
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            to_stderr(format_args!("error: {error}"));
            ExitCode::from(error.exit_code() as u8)
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    match &cli.command {
        Command::Quickstart(args) => quickstart::run(args, &cli.global),
        Command::Train(args) => train::run(args, &cli.global),
        Command::Sweep(args) => sweep::run(args, &cli.global),
        Command::Submit(args) => submit::run(args, &cli.global),
        Command::Status(args) => jobs::status(args, &cli.global),
        Command::Logs(args) => jobs::logs(args),
        Command::Fetch(args) => jobs::fetch(args, &cli.global),
        Command::Cancel(args) => jobs::cancel(args, &cli.global),
        Command::Clean(args) => jobs::clean(args, &cli.global),
        Command::Compare(args) => compare::run(args, &cli.global),
        Command::Report(args) => report::run(args, &cli.global),
        Command::Eval(args) => eval::run(args, &cli.global),
        Command::Generate(args) => generate::run(args, &cli.global),
        Command::Score(args) => score::run(args, &cli.global),
        Command::Quantize(args) => quantize::run(args, &cli.global),
        Command::Merge(args) => merge::run(args, &cli.global),
        Command::Scan(args) => scan::run(args, &cli.global),
        Command::Validate(args) => validate::run(args, &cli.global),
        Command::Plan(args) => plan::run(args, &cli.global),
        Command::Config(args) => config::run(args, &cli.global),
        Command::Bench(args) => bench::run(args, &cli.global),
        Command::Selftest(args) => selftest::run(args, &cli.global),
        Command::Gpu(args) => gpu::run(args, &cli.global),
        Command::Doctor(args) => doctor::run(args, &cli.global),
    }
}

/// A command's result and a line end, to stdout. A reader that has seen enough (`| head`) is no error.
fn print(result: impl std::fmt::Display) -> Result<()> {
    match writeln!(std::io::stdout().lock(), "{result}") {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::io("stdout", e)),
        _ => Ok(()),
    }
}

/// Help and version as clap prints them; a wrong command line as one line, exit code 2.
fn usage_error(usage: &clap::Error) -> ExitCode {
    if !usage.use_stderr() || usage.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = usage.print();
        return ExitCode::from(if usage.use_stderr() { 2 } else { 0 });
    }
    let text = usage.to_string();
    let lines: Vec<&str> = text.lines().take_while(|line| !line.starts_with("Usage:")).map(str::trim).collect();
    to_stderr(lines.join(" ").trim());
    ExitCode::from(2)
}
