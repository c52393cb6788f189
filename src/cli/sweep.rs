//! `temper sweep FILE`: arms x seeds of one configuration, one after the other here, or as jobs on GPUs and hosts. A run that has
//! ended is not repeated, one that was stopped goes on: the same command again finishes the sweep.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Global, common, results, train};
use crate::analysis::decision::Outcome;
use crate::analysis::run_files::RunFiles;
use crate::analysis::statistics::mean_and_standard_error;
use crate::config::sweep::{Job, jobs};
use crate::remote::connection::Connection;
use crate::remote::fetch::{Checkpoints, fetch};
use crate::remote::fleet::{End, Fleet, Task, Verdict};
use crate::remote::hosts::{Host, Hosts};
use crate::remote::job::State;
use crate::remote::snapshot::Snapshot;
use crate::rl::evaluation::Condition;
use crate::run::directory::run_path;
use crate::run::signals::Interrupt;
use crate::{Error, Result, bail_input};

#[derive(clap::Args)]
pub struct Args {
    /// A sweep, e.g. configs/sweeps/srdd_compare.yaml
    pub file: PathBuf,
    /// Override one key of every arm (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Where run directories are made, or fetched to
    #[arg(long, default_value = "runs", value_name = "DIR")]
    pub out: PathBuf,
    /// Run as jobs on this host of the hosts file (repeatable)
    #[arg(long = "host", value_name = "NAME")]
    pub host: Vec<String>,
    /// The hosts file (default: $TEMPER_HOSTS, ./hosts.yaml, ~/.config/temper/hosts.yaml)
    #[arg(long, value_name = "FILE")]
    pub hosts: Option<PathBuf>,
    /// Run on these GPUs of this machine, a run on each
    #[arg(long, value_name = "0,1,...", value_delimiter = ',', conflicts_with = "host")]
    pub gpus: Vec<u32>,
    /// Run so many at a time on this machine
    #[arg(long, value_name = "N", conflicts_with_all = ["host", "gpus"], value_parser = clap::value_parser!(u32).range(1..))]
    pub parallel: Option<u32>,
    /// Seconds between two looks at the jobs
    #[arg(long, default_value_t = 5.0, value_name = "SECONDS")]
    pub every: f64,
    /// Check every arm's configuration and inputs, and list the runs
    #[arg(long)]
    pub dry_run: bool,
}

pub fn run(args: &Args, global: &Global) -> Result<()> {
    let jobs = jobs(&args.file, &args.overrides)?;
    if args.dry_run {
        let mut directories = Vec::new();
        for job in &jobs {
            // A host's paths are the host's.
            if args.host.is_empty() {
                common::check_inputs(&job.config).map_err(|e| e.at(format!("arm {}", job.arm)))?;
            }
            directories.push(directory(args, job)?.display().to_string());
        }
        return match global.json {
            true => super::print(json!({ "runs": directories })),
            false => super::print(directories.join("\n")),
        };
    }
    let ends = match args.host.is_empty() && args.gpus.is_empty() && args.parallel.is_none() {
        true => one_after_the_other(args, &jobs, global)?,
        false => as_jobs(args, &jobs, global)?,
    };
    print(args, &jobs, &ends, global)?;
    let failed: Vec<&str> =
        jobs.iter().zip(&ends).filter(|(_, end)| !fine(end)).map(|(job, _)| job.config.name.as_str()).collect();
    match failed.first() {
        Some(first) => {
            Err(Error::Runtime(format!("{} of {} runs did not finish, first {first}", failed.len(), jobs.len())))
        }
        None => Ok(()),
    }
}

fn directory(args: &Args, job: &Job) -> Result<PathBuf> {
    run_path(&args.out, &job.config.name, &job.config.hash(), job.seed)
}

/// Finished, or never begun by the sweep's own decision.
fn fine(end: &End) -> bool {
    end.state == State::Finished || (end.state == State::Skipped && end.host.is_none())
}

/// Whether a job runs, given how those before it ended.
fn decide(args: &Args, jobs: &[Job], number: usize, ends: &[Option<End>]) -> Result<Verdict> {
    let job = &jobs[number];
    let Some(decision) = &job.decision else { return Ok(Verdict::Run) };
    let of = |arm: &str| jobs.iter().position(|other| other.arm == arm && other.seed == job.seed);
    for arm in decision.arms() {
        match of(arm).and_then(|other| ends[other].as_ref()) {
            None => return Ok(Verdict::Wait),
            Some(end) if end.state != State::Finished => {
                return Ok(Verdict::Skip(format!("{arm} is {}", end.state.name())));
            }
            Some(_) => {}
        }
    }
    let run_of = |arm: &str| match of(arm) {
        Some(other) => directory(args, &jobs[other]),
        None => Err(Error::Runtime(format!("no arm {arm}"))),
    };
    Ok(match decision.outcome(run_of)? {
        Outcome::Runs(_) => Verdict::Run,
        Outcome::Skipped(why) => Verdict::Skip(why),
    })
}

fn one_after_the_other(args: &Args, jobs: &[Job], global: &Global) -> Result<Vec<End>> {
    let threads = |job: &Job| job.config.trainer.threads;
    if let Some(other) = jobs.iter().find(|job| threads(job) != threads(&jobs[0])) {
        let (found, expected) = (json!(threads(other)), json!(threads(&jobs[0])));
        let (arm, first) = (&other.arm, &jobs[0].arm);
        bail_input!(
            "arm {arm}: trainer.threads: found {found}, expected {expected} as in arm {first}: a process has one number of \
             threads; --parallel 1 gives every run a process"
        );
    }
    let (interrupt, console) = (Interrupt::install()?, common::console(global));
    let mut ends: Vec<Option<End>> = vec![None; jobs.len()];
    for (number, job) in jobs.iter().enumerate() {
        let title = format!("run {} of {}: {}, seed {}", number + 1, jobs.len(), job.arm, job.seed);
        // Decisions look back, so none waits here.
        let end = match decide(args, jobs, number, &ends)? {
            Verdict::Skip(note) => {
                console.note(&format!("{title}: not run: {note}"));
                End { state: State::Skipped, host: None, note }
            }
            Verdict::Run | Verdict::Wait => {
                console.note(&title);
                train::train(&job.config, &args.out, true, global, &interrupt)?;
                End { state: State::Finished, host: None, note: String::new() }
            }
        };
        ends[number] = Some(end);
    }
    Ok(ends.into_iter().flatten().collect())
}

fn as_jobs(args: &Args, jobs: &[Job], global: &Global) -> Result<Vec<End>> {
    let (interrupt, console) = (Interrupt::install()?, common::console(global));
    let file = if args.host.is_empty() { None } else { Some(Hosts::find(args.hosts.as_deref())?) };
    let mut hosts: Vec<Host> = Vec::new();
    match &file {
        Some(file) => {
            for name in &args.host {
                hosts.push(file.get(Some(name))?.clone());
            }
        }
        None => hosts.push(Host::here(&args.out, args.gpus.clone(), args.parallel, global.device.clone())?),
    }
    let first = Snapshot::new(None, String::new())?;
    let mut tasks = Vec::new();
    for job in jobs {
        let snapshot = first.with_config(job.config.to_yaml());
        tasks.push(Task { id: super::submit::job_id(&job.config)?, kind: job.arm.clone(), snapshot });
    }
    let again = "the same command watches them again, temper cancel stops them";
    let hint = match &file {
        Some(_) => again.to_string(),
        None => format!("{again}: temper cancel JOB --hosts {}", args.out.join(".jobs/hosts.yaml").display()),
    };
    let fleet = Fleet {
        hint,
        hosts: hosts.iter().collect(),
        console: &console,
        interrupt: &interrupt,
        every: Duration::from_secs_f64(args.every.clamp(0.1, 3600.0)),
    };
    let arrived = |number: usize, host: &Host| match &file {
        Some(_) => fetch(&Connection { host }, &tasks[number].id, &args.out, Checkpoints::None, &console).map(drop),
        // Its directory is here.
        None => Ok(()),
    };
    fleet.run(&tasks, |number, ends| decide(args, jobs, number, ends), arrived)
}

/// Mean accuracy of every arm and condition over its seeds.
fn print(args: &Args, jobs: &[Job], ends: &[End], global: &Global) -> Result<()> {
    let mut arms: Vec<&str> = Vec::new();
    for job in jobs {
        if !arms.contains(&job.arm.as_str()) {
            arms.push(&job.arm);
        }
    }
    let finished = |(job, end): (&Job, &End)| -> Result<Option<(String, RunFiles)>> {
        let read = (end.state == State::Finished).then(|| RunFiles::read(&directory(args, job)?)).transpose()?;
        Ok(read.map(|run| (job.arm.clone(), run)))
    };
    let runs: Vec<(String, RunFiles)> =
        jobs.iter().zip(ends).filter_map(|one| finished(one).transpose()).collect::<Result<_>>()?;
    let mut table = common::plain_table(&["arm", "condition", "mean, %", "standard error", "seeds", "each, %"]);
    let mut rows = Vec::new();
    for arm in arms {
        for condition in Condition::ALL {
            let of_arm = runs.iter().filter(|(of, _)| of == arm);
            let each: Vec<f64> = of_arm.filter_map(|(_, run)| run.last(condition)).map(results::share).collect();
            let Some(mean) = mean_and_standard_error(&each) else { continue };
            let percent = |ratio: f64| format!("{:.1}", 100.0 * ratio);
            table.add_row([
                arm.to_string(),
                condition.name().to_string(),
                percent(mean.mean),
                percent(mean.standard_error),
                each.len().to_string(),
                each.iter().map(|a| percent(*a)).collect::<Vec<_>>().join(" "),
            ]);
            rows.push(json!({
                "arm": arm, "condition": condition.name(), "mean": mean.mean,
                "standard_error": mean.standard_error, "accuracies": each,
            }));
        }
    }
    let run = |(job, end): (&Job, &End)| -> Result<Value> {
        Ok(json!({
            "arm": job.arm, "seed": job.seed, "state": end.state, "host": end.host, "note": end.note,
            "run_dir": directory(args, job)?,
        }))
    };
    if global.json {
        let runs = jobs.iter().zip(ends).map(run).collect::<Result<Vec<_>>>()?;
        return super::print(json!({"arms": rows, "runs": runs}));
    }
    let mut text = common::lines(&table);
    for (job, end) in jobs.iter().zip(ends).filter(|(_, end)| end.state != State::Finished) {
        text += &format!("\n{}, seed {}: {}: {}", job.arm, job.seed, end.state.name(), end.note);
    }
    super::print(text)
}
