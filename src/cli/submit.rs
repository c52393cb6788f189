//! `temper submit CONFIG --host NAME`: the run as a detached job on another machine.

use std::path::PathBuf;

use serde_json::json;

use super::{Global, common};
use crate::device::kernels;
use crate::remote::connection::Connection;
use crate::remote::hosts::{Host, Hosts};
use crate::remote::job;
use crate::remote::snapshot::Snapshot;
use crate::remote::submit::{After, Request, shown, submit};
use crate::run::directory::run_path;
use crate::{Result, bail_input, input_error};

/// Where hosts come from; every command about jobs takes these.
#[derive(clap::Args)]
pub struct HostArgs {
    /// A host of the hosts file (default: its only one)
    #[arg(long, value_name = "NAME")]
    pub host: Option<String>,
    /// The hosts file (default: $TEMPER_HOSTS, ./hosts.yaml, ~/.config/temper/hosts.yaml)
    #[arg(long, value_name = "FILE")]
    pub hosts: Option<PathBuf>,
}

#[derive(clap::Args)]
pub struct Args {
    /// A configuration; its paths are those of the host, relative ones below the host's root
    pub config: PathBuf,
    #[command(flatten)]
    pub host: HostArgs,
    /// Override one key (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Go on with this run where an earlier attempt stopped
    #[arg(long)]
    pub resume: bool,
    /// Start only after this job of the same host has finished with success (repeatable)
    #[arg(long, value_name = "JOB")]
    pub after: Vec<String>,
    /// Start after this job has ended, however it did (repeatable)
    #[arg(long, value_name = "JOB")]
    pub after_any: Vec<String>,
    /// Use this GPU of the host instead of the first free one (repeatable)
    #[arg(long, value_name = "N")]
    pub gpu: Vec<u32>,
    /// Install torch below the host's root first, where it has none
    #[arg(long)]
    pub install_runtime: bool,
    /// Leave out doctor and the check of paths over there
    #[arg(long)]
    pub no_check: bool,
    /// A temper built for that host (default: this one)
    #[arg(long, value_name = "FILE")]
    pub binary: Option<PathBuf>,
    /// Print every command, run none
    #[arg(long)]
    pub dry_run: bool,
}

pub fn run(args: &Args, global: &Global) -> Result<()> {
    let hosts = Hosts::find(args.host.hosts.as_deref())?;
    let connection = Connection { host: hosts.get(args.host.host.as_deref())? };
    let config = crate::config::load(&args.config, &args.overrides)?;
    let snapshot = Snapshot::new(args.binary.as_deref(), config.to_yaml())?;
    let id = job_id(&config)?;
    let request = Request {
        id: &id,
        snapshot: &snapshot,
        resume: args.resume,
        continue_run: false,
        after: after(args, &connection)?,
        tokens: tokens(args, connection.host)?,
        install_torch: args
            .install_runtime
            .then(|| kernels::TORCH_VERSION.unwrap_or("2.11.0").split('+').next())
            .flatten(),
        check: !args.no_check,
    };
    if args.dry_run {
        return super::print(shown(&connection, &request));
    }
    let attempt = submit(&connection, &request, &common::console(global))?;
    let host = &connection.host.name;
    if global.json {
        return super::print(json!({"job": id, "host": host, "attempt": attempt}));
    }
    super::print(format!(
        "submitted {id} to {host} (attempt {attempt})\n  temper status {id} --host {host}\n  temper logs -f {id} --host \
         {host}\n  temper fetch {id} --host {host}"
    ))
}

/// A job has its run directory's name: one configuration and seed is one job.
pub fn job_id(config: &crate::config::Config) -> Result<String> {
    Ok(run_path(std::path::Path::new(""), &config.name, &config.hash(), config.seed)?.display().to_string())
}

/// Names become ids by asking the host; a dry run takes them as they are.
fn after(args: &Args, connection: &Connection) -> Result<Vec<(After, String)>> {
    let asked = args.after.iter().map(|id| (After::Ok, id)).chain(args.after_any.iter().map(|id| (After::Any, id)));
    let asked: Vec<(After, &String)> = asked.collect();
    if asked.is_empty() || args.dry_run {
        return Ok(asked.into_iter().map(|(when, id)| (when, id.clone())).collect());
    }
    let overview = job::overview(connection, &[])?;
    let host = &connection.host.name;
    let resolve = |(when, text): (After, &String)| {
        let found = job::named(&overview.jobs, text).map_err(|e| input_error!("--after {e} on {host}"))?;
        Ok((when, found.id.clone()))
    };
    asked.into_iter().map(resolve).collect()
}

fn tokens(args: &Args, host: &Host) -> Result<Vec<String>> {
    let Some(unknown) = args.gpu.iter().find(|gpu| !host.gpus.contains(gpu)) else {
        return Ok(match args.gpu.is_empty() {
            true => host.tokens(),
            false => args.gpu.iter().map(|gpu| format!("gpu-{gpu}")).collect(),
        });
    };
    bail_input!("--gpu {unknown}: not one of the gpus of {}, which are {:?}", host.name, host.gpus)
}
