//! `temper train CONFIG`: the reinforcement-learning run.

use std::path::PathBuf;

use super::{Global, common, results};
use crate::Result;
use crate::ops::profile;
use crate::rl::trainer::{self, Launch, Outcome};
use crate::run::signals::Interrupt;
use crate::run::trace;

#[derive(clap::Args)]
pub struct Args {
    /// A configuration, e.g. configs/e5c.yaml
    pub config: PathBuf,
    /// Override one key, e.g. --set optimizer.lr=1e-6 (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Where run directories are made
    #[arg(long, default_value = "runs", value_name = "DIR")]
    pub out: PathBuf,
    /// Continue the run of this configuration and seed after its newest checkpoint
    #[arg(long)]
    pub resume: bool,
    /// Resolve and check everything, print the plan, train nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Write where the time goes, by step and phase, as a trace that Perfetto loads
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
}

pub fn run(args: &Args, global: &Global) -> Result<()> {
    let config = crate::config::load(&args.config, &args.overrides)?;
    if args.dry_run {
        common::check_inputs(&config)?;
        let plan =
            super::plan::Args { config: args.config.clone(), overrides: args.overrides.clone(), steps_per_epoch: None };
        return super::plan::run(&plan, global);
    }
    let interrupt = Interrupt::install()?;
    let outcome = match &args.profile {
        None => train(&config, &args.out, args.resume, global, &interrupt),
        Some(file) => {
            trace::check(file)?;
            profile::start();
            let outcome = train(&config, &args.out, args.resume, global, &interrupt);
            // What was recorded is worth having from a run that was interrupted or failed, too.
            let written =
                common::write_trace(file, &format!("train {}", args.config.display()), profile::stop(), global);
            outcome.and_then(|outcome| written.map(|()| outcome))
        }
    }?;
    results::print(&outcome.run_dir, global)
}

/// Trains `config`; shared with `temper quickstart`.
pub fn train(
    config: &crate::config::Config,
    out: &std::path::Path,
    resume: bool,
    global: &Global,
    interrupt: &Interrupt,
) -> Result<Outcome> {
    let device = common::device(global, config.trainer.threads)?;
    let console = common::console(global);
    let workload = common::workload(config, true)?;
    let launch = Launch {
        device,
        device_name: crate::device::name(device),
        out,
        resume,
        console: &console,
        interrupt,
        monitor: common::watch(device),
    };
    trainer::train(&common::recipe(config), &workload, &launch)
}
