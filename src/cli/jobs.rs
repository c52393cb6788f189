//! `temper status`, `logs`, `fetch`, `cancel`, `clean`: jobs that were submitted.

use std::io::{BufRead, Read, Write};
use std::path::PathBuf;

use serde_json::{Value, json};

use super::submit::HostArgs;
use super::{Global, common};
use crate::remote::connection::{Connection, Input};
use crate::remote::fetch::{self, Checkpoints};
use crate::remote::hosts::{Host, Hosts};
use crate::remote::job::{self, Job, Overview, State};
use crate::{Error, Result, input_error};

#[derive(clap::Args)]
pub struct StatusArgs {
    /// Jobs, by id or by their configuration's name (default: all)
    pub jobs: Vec<String>,
    #[command(flatten)]
    pub host: HostArgs,
}

#[derive(clap::Args)]
pub struct LogsArgs {
    /// A job, by id or by its configuration's name
    pub job: String,
    #[command(flatten)]
    pub host: HostArgs,
    /// Go on as the log grows; Ctrl-C stops watching, never the job
    #[arg(short, long)]
    pub follow: bool,
    /// Lines from the end to begin with
    #[arg(short = 'n', long, default_value_t = 200)]
    pub lines: u64,
}

#[derive(clap::Args)]
pub struct FetchArgs {
    /// Jobs, by id or by their configuration's name (all its seeds)
    #[arg(required = true)]
    pub jobs: Vec<String>,
    #[command(flatten)]
    pub host: HostArgs,
    /// Where the run directories go
    #[arg(long, default_value = "runs", value_name = "DIR")]
    pub out: PathBuf,
    /// Which checkpoints come along
    #[arg(long, value_enum, default_value = "none")]
    pub checkpoints: Checkpoints,
}

#[derive(clap::Args)]
pub struct CancelArgs {
    /// Jobs, by id or by their configuration's name
    #[arg(required = true)]
    pub jobs: Vec<String>,
    #[command(flatten)]
    pub host: HostArgs,
    /// Seconds in which a job may finish its step and write a checkpoint before it is killed
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    pub grace: u64,
}

#[derive(clap::Args)]
pub struct CleanArgs {
    #[command(flatten)]
    pub host: HostArgs,
    /// Remove the records and logs of jobs that are over, too (run directories always stay)
    #[arg(long)]
    pub jobs: bool,
}

/// One host that was named, or all.
fn selected<'a>(hosts: &'a Hosts, args: &HostArgs) -> Result<Vec<&'a Host>> {
    match &args.host {
        Some(name) => Ok(vec![hosts.get(Some(name))?]),
        None => Ok(hosts.all().collect()),
    }
}

/// What each host says; a host that is not reached is a value.
fn ask<'a>(hosts: &[&'a Host]) -> Vec<(&'a Host, Result<Overview>)> {
    std::thread::scope(|scope| {
        let asked: Vec<_> =
            hosts.iter().map(|host| (*host, scope.spawn(|| job::overview(&Connection { host }, &[])))).collect();
        let answer = |asked: std::thread::ScopedJoinHandle<Result<Overview>>| {
            asked.join().unwrap_or_else(|_| Err(Error::Runtime("asking a host failed".to_string())))
        };
        asked.into_iter().map(|(host, asked)| (host, answer(asked))).collect()
    })
}

/// The host and the jobs that `text` means. An error of a host counts only where no other one has the job.
fn find_all<'a>(hosts: &'a Hosts, args: &HostArgs, text: &str) -> Result<(&'a Host, Vec<Job>)> {
    let mut failure = None;
    let mut found = Vec::new();
    for (host, answer) in ask(&selected(hosts, args)?) {
        match answer.map(|overview| job::all_named(&overview.jobs, text).into_iter().cloned().collect::<Vec<_>>()) {
            Ok(jobs) if jobs.is_empty() => {}
            Ok(jobs) => found.push((host, jobs)),
            Err(error) => failure = Some(error),
        }
    }
    if found.len() > 1 {
        let names: Vec<&str> = found.iter().map(|(host, _)| host.name.as_str()).collect();
        return Err(input_error!("{text}: found on {}, expected --host with one of them", names.join(" and ")));
    }
    let nowhere = || match selected(hosts, args) {
        Ok(hosts) => {
            let names: Vec<&str> = hosts.iter().map(|host| host.name.as_str()).collect();
            input_error!("{text}: no such job on {}", names.join(", "))
        }
        Err(error) => error,
    };
    // That a host was not reached says more than that another one has no such job.
    found.pop().ok_or_else(|| failure.unwrap_or_else(nowhere))
}

/// The host and the one job that `text` means.
fn find<'a>(hosts: &'a Hosts, args: &HostArgs, text: &str) -> Result<(&'a Host, Job)> {
    let (host, jobs) = find_all(hosts, args, text)?;
    Ok((host, job::named(&jobs, text)?.clone()))
}

pub fn status(args: &StatusArgs, global: &Global) -> Result<()> {
    let hosts = Hosts::find(args.host.hosts.as_deref())?;
    let answers = ask(&selected(&hosts, &args.host)?);
    let mut jobs =
        common::plain_table(&["host", "job", "state", "try", "on", "step", "reward", "accuracy", "s/step", "note"]);
    let mut gpus = common::plain_table(&["host", "GPU", "name", "use, %", "MiB", "of", "W", "C", "held by"]);
    let (mut out, mut missing, mut shown) = (Vec::new(), args.jobs.clone(), 0);
    for (host, answer) in &answers {
        let overview = match answer {
            Ok(overview) => overview,
            Err(error) => {
                jobs.add_row([
                    host.name.as_str(),
                    "",
                    State::Unknown.name(),
                    "",
                    "",
                    "",
                    "",
                    "",
                    "",
                    &error.to_string(),
                ]);
                out.push(json!({"host": host.name, "state": "unknown", "problem": error.to_string()}));
                // Whether it has the jobs that were asked for is not known.
                missing.clear();
                shown += 1;
                continue;
            }
        };
        let mut selection: Vec<&Job> = overview.jobs.iter().collect();
        if !args.jobs.is_empty() {
            missing.retain(|text| job::all_named(&overview.jobs, text).is_empty());
            selection = args.jobs.iter().flat_map(|text| job::all_named(&overview.jobs, text)).collect();
        }
        for job in &selection {
            jobs.add_row(job_row(host, job));
            shown += 1;
        }
        for gpu in &overview.gpus {
            let token = gpu.first().map(|index| format!("gpu-{index}"));
            let running = |job: &&Job| job.token == token && !job.state().is_over();
            let holder = overview.jobs.iter().find(running).map_or("", |job| job.id.as_str());
            gpus.add_row([host.name.as_str()].into_iter().chain(gpu.iter().map(String::as_str)).chain([holder]));
        }
        out.push(json!({
            "host": host.name, "free_bytes": overview.free_bytes, "gpus": overview.gpus,
            "jobs": selection.iter().map(|job| with_state(job)).collect::<Vec<_>>(),
        }));
    }
    if let Some(text) = missing.first() {
        return Err(input_error!("{text}: no such job on {}", names(&answers)));
    }
    if global.json {
        return super::print(json!({"hosts": out}));
    }
    let mut text = if shown > 0 { common::lines(&jobs) } else { format!("no jobs on {}", names(&answers)) };
    if !gpus.is_empty() {
        text += &format!("\n\n{}", common::lines(&gpus));
    }
    super::print(text)
}

fn names<T>(answers: &[(&Host, T)]) -> String {
    answers.iter().map(|(host, _)| host.name.as_str()).collect::<Vec<_>>().join(", ")
}

fn with_state(job: &Job) -> Value {
    let mut value = json!(job);
    value["state"] = json!(job.state());
    value
}

fn job_row(host: &Host, job: &Job) -> [String; 10] {
    let number = |row: &Option<Value>, key: &str, digits: usize| {
        row.as_ref().and_then(|row| row[key].as_f64()).map_or(String::new(), |v| format!("{v:.digits$}"))
    };
    // The last of a validation row's conditions is the configuration's own.
    let accuracy = job.validation.as_ref().and_then(Value::as_object).and_then(|row| {
        let of = row.iter().rev().find(|(key, _)| key.starts_with("val/acc_"))?;
        Some(format!("{:.2} % {}", 100.0 * of.1.as_f64()?, of.0.trim_start_matches("val/acc_")))
    });
    let place = match &job.slurm {
        Some((number, state)) => format!("slurm {number} {state}"),
        None => job.token.clone().unwrap_or_default(),
    };
    [
        host.name.clone(),
        job.id.clone(),
        job.state().name().to_string(),
        job.attempt.to_string(),
        place,
        number(&job.train, "step", 0),
        number(&job.train, "reward/mean", 3),
        accuracy.unwrap_or_default(),
        number(&job.timing, "step_s", 1),
        job.note(host.heartbeat_s),
    ]
}

pub fn logs(args: &LogsArgs) -> Result<()> {
    let hosts = Hosts::find(args.host.hosts.as_deref())?;
    let (host, job) = find(&hosts, &args.host, &args.job)?;
    let follow = if args.follow { "follow" } else { "all" };
    let lines = args.lines.to_string();
    Connection { host }.exchange("logs", &[&job.id, follow, &lines], Input::KeptOpen, |reader| {
        let mut line = Vec::new();
        loop {
            line.clear();
            let n = reader.by_ref().read_until(b'\n', &mut line).map_err(|e| Error::Runtime(e.to_string()))?;
            // Where nobody reads any more (`| head`), the log need not be followed.
            if n == 0 || std::io::stdout().lock().write_all(&line).is_err() {
                return Ok(());
            }
        }
    })
}

pub fn fetch(args: &FetchArgs, global: &Global) -> Result<()> {
    let hosts = Hosts::find(args.host.hosts.as_deref())?;
    let console = common::console(global);
    let mut done = Vec::new();
    for text in &args.jobs {
        let (host, jobs) = find_all(&hosts, &args.host, text)?;
        for job in jobs {
            let fetched = fetch::fetch(&Connection { host }, &job.id, &args.out, args.checkpoints, &console)?;
            let directory = args.out.join(&job.id);
            console.note(&format!(
                "{}: {} files ({} were here), {:.1} MB over the line",
                directory.display(),
                fetched.files,
                fetched.unchanged,
                fetched.bytes as f64 / 1e6
            ));
            done.push(json!({
                "job": job.id, "host": host.name, "directory": directory, "files": fetched.files,
                "unchanged": fetched.unchanged, "bytes": fetched.bytes,
            }));
        }
    }
    if global.json { super::print(json!({"fetched": done})) } else { Ok(()) }
}

pub fn cancel(args: &CancelArgs, global: &Global) -> Result<()> {
    let hosts = Hosts::find(args.host.hosts.as_deref())?;
    let mut done = Vec::new();
    for text in &args.jobs {
        let (host, job) = find(&hosts, &args.host, text)?;
        let facts = Connection { host }.facts("cancel", &[&job.id, &args.grace.to_string()])?;
        let how = facts.iter().find(|(key, _)| key == "cancelled").map_or("", |(_, how)| how.as_str());
        let says = match how {
            "ended" => "had ended before",
            "term" => "stopped",
            "kill" => "killed: it did not stop in time",
            _ => return Err(Error::Unavailable(format!("{}: the answer was cut off", host.name))),
        };
        common::console(global).note(&format!("{}: {says}", job.id));
        done.push(json!({"job": job.id, "host": host.name, "how": how}));
    }
    if global.json { super::print(json!({"cancelled": done})) } else { Ok(()) }
}

pub fn clean(args: &CleanArgs, global: &Global) -> Result<()> {
    let hosts = Hosts::find(args.host.hosts.as_deref())?;
    let host = hosts.get(args.host.host.as_deref())?;
    let facts = Connection { host }.whole_facts("clean", &[if args.jobs { "jobs" } else { "snapshots" }])?;
    let removed: Vec<&str> = facts.iter().filter(|(key, _)| key == "removed").map(|(_, what)| what.as_str()).collect();
    if global.json {
        return super::print(json!({"host": host.name, "removed": removed}));
    }
    super::print(format!("{}: removed {} directories and files", host.name, removed.len()))
}
