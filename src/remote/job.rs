//! What is known of a job, and which state that means.

use serde::Serialize;
use serde_json::Value;

use super::connection::Connection;
use crate::{Result, input_error};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// For other jobs that it runs after.
    Waiting,
    /// For a GPU, or for Slurm.
    Queued,
    Running,
    /// Exit code 0.
    Finished,
    /// Any other exit code.
    Failed,
    /// By `temper cancel`.
    Cancelled,
    /// Not started: a job that it was to run after failed.
    Skipped,
    /// Its processes are gone and no exit code was written: the machine was switched off, or somebody killed all of them.
    Lost,
    /// The host did not answer, which says nothing of the job.
    Unknown,
}

impl State {
    pub fn name(self) -> &'static str {
        match self {
            State::Waiting => "waiting",
            State::Queued => "queued",
            State::Running => "running",
            State::Finished => "finished",
            State::Failed => "failed",
            State::Cancelled => "cancelled",
            State::Skipped => "skipped",
            State::Lost => "lost",
            State::Unknown => "unknown",
        }
    }

    /// Whether nothing will happen any more unless somebody submits it again.
    pub fn is_over(self) -> bool {
        !matches!(self, State::Waiting | State::Queued | State::Running | State::Unknown)
    }
}

/// The newest attempt of a job.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Job {
    pub id: String,
    pub attempt: u64,
    phase: String,
    /// The GPU (or slot) that it holds.
    pub token: Option<String>,
    pub exit_code: Option<i64>,
    /// The job's process, which leads its group.
    pub pid: Option<u64>,
    /// Seconds since 1970, by the host's clock.
    pub submitted: Option<u64>,
    pub started: Option<u64>,
    pub finished: Option<u64>,
    /// Seconds since the last heartbeat.
    pub heartbeat_age_s: Option<u64>,
    supervisor_alive: bool,
    job_alive: bool,
    /// Its process numbers are those of another container or machine, and its heart beats.
    elsewhere: bool,
    same_boot: bool,
    cancelled: bool,
    /// Neither its supervisor nor Slurm has taken it yet.
    #[serde(skip)]
    untaken: bool,
    /// Of what it waits for: token, and the job that had it last.
    held: Vec<String>,
    #[serde(skip)]
    age_s: Option<u64>,
    /// Slurm's number and its word for the state.
    pub slurm: Option<(String, String)>,
    /// The last rows of metrics.jsonl and timing.jsonl.
    pub train: Option<Value>,
    pub validation: Option<Value>,
    pub timing: Option<Value>,
    /// The log's last line.
    pub last_line: Option<String>,
}

/// What a host has and does.
#[derive(Debug, Serialize)]
pub struct Overview {
    pub host: String,
    pub free_bytes: Option<u64>,
    /// Lines of nvidia-smi: index, name, utilisation %, MiB used, MiB in all, W, degrees C.
    pub gpus: Vec<Vec<String>>,
    pub jobs: Vec<Job>,
}

impl Job {
    pub fn state(&self) -> State {
        if let Some(code) = self.exit_code {
            return match (self.phase.as_str(), code) {
                ("skipped", _) => State::Skipped,
                (_, 0) => State::Finished,
                ("cancelled", _) => State::Cancelled,
                _ if self.cancelled => State::Cancelled,
                _ => State::Failed,
            };
        }
        if let Some((_, state)) = &self.slurm {
            return match state.trim_end_matches('+') {
                "PENDING" | "CONFIGURING" => State::Queued,
                "RUNNING" | "COMPLETING" | "SUSPENDED" => State::Running,
                "CANCELLED" => State::Cancelled,
                "FAILED" | "TIMEOUT" | "OUT_OF_MEMORY" | "NODE_FAIL" | "BOOT_FAIL" | "DEADLINE" | "PREEMPTED" => {
                    State::Failed
                }
                // Slurm has forgotten it, or took it for done, and it wrote nothing.
                "" | "COMPLETED" if self.cancelled => State::Cancelled,
                "" | "COMPLETED" => State::Lost,
                // UNREACHABLE too.
                _ => State::Unknown,
            };
        }
        match (self.supervisor_alive, self.job_alive) {
            (_, true) => State::Running,
            (true, false) if self.phase == "waiting" => State::Waiting,
            (true, false) if self.phase == "queued" => State::Queued,
            (true, false) => State::Running,
            (false, false) if self.elsewhere => State::Unknown,
            // Between its files and its first process; a slow machine takes a while.
            (false, false) if self.untaken && self.age_s.is_some_and(|age| age < 60) => State::Queued,
            (false, false) if self.cancelled => State::Cancelled,
            (false, false) => State::Lost,
        }
    }

    /// What a person should know besides the state.
    pub fn note(&self, heartbeat_s: f64) -> String {
        let state = self.state();
        if state == State::Running && self.job_alive && !self.supervisor_alive && self.slurm.is_none() {
            return "its supervisor is gone: how it ends will not be recorded".to_string();
        }
        if state == State::Lost && !self.same_boot {
            return "the machine was started anew since".to_string();
        }
        if state == State::Unknown && self.elsewhere {
            return "its heart beats, but in another container or on another machine".to_string();
        }
        if state == State::Queued && !self.held.is_empty() && self.slurm.is_none() {
            return format!("held: {}", self.held.join(", "));
        }
        if let (State::Running, Some(trouble)) = (state, self.timing.as_ref().and_then(card_trouble)) {
            return trouble;
        }
        match (state, self.heartbeat_age_s) {
            (State::Running, Some(age)) if age as f64 > 12.0 * heartbeat_s => format!("no heartbeat for {age} s"),
            (State::Failed | State::Skipped | State::Lost, _) => self.last_line.clone().unwrap_or_default(),
            _ => String::new(),
        }
    }
}

/// What the GPU monitor saw in the last step that a person should know: a row of timing.jsonl.
fn card_trouble(timing: &Value) -> Option<String> {
    let list = |key: &str| timing[key].as_array().filter(|list| !list.is_empty());
    let mut said = Vec::new();
    if let Some(foreign) = list("gpu_foreign_processes") {
        said.push(format!("foreign processes on its GPU: {}", foreign.len()));
    }
    if let Some(uncorrected) = timing["gpu_ecc_uncorrected"].as_u64().filter(|n| *n > 0) {
        said.push(format!("{uncorrected} uncorrected ECC errors"));
    }
    let slow = |reason: &&str| ["thermal", "brake", "slowdown"].iter().any(|word| reason.to_lowercase().contains(word));
    let reasons = list("gpu_throttle_reasons").into_iter().flatten().filter_map(Value::as_str);
    said.extend(reasons.filter(slow).map(|reason| format!("throttled: {reason}")));
    (!said.is_empty()).then(|| said.join(", "))
}

/// Asks a host for jobs: those named, else all.
pub fn overview(connection: &Connection, ids: &[&str]) -> Result<Overview> {
    let facts = connection.whole_facts("status", ids)?;
    Ok(of_facts(&connection.host.name, facts))
}

fn of_facts(host: &str, facts: Vec<(String, String)>) -> Overview {
    let mut overview = Overview { host: host.to_string(), free_bytes: None, gpus: Vec::new(), jobs: Vec::new() };
    let mut now = None;
    for (key, value) in facts {
        let number = || value.parse::<u64>().ok();
        match key.as_str() {
            "now" => now = number(),
            "free_bytes" => overview.free_bytes = number(),
            "gpu" => overview.gpus.push(value.split(',').map(|field| field.trim().to_string()).collect()),
            "job" => overview.jobs.push(Job { id: value, ..Job::default() }),
            _ => {
                if let Some(job) = overview.jobs.last_mut() {
                    job.learn(&key, value, now);
                }
            }
        }
    }
    overview
}

impl Job {
    fn learn(&mut self, key: &str, value: String, now: Option<u64>) {
        let number = value.parse::<u64>().ok();
        let row = || serde_json::from_str(&value).ok();
        match key {
            "attempt" => self.attempt = number.unwrap_or(0),
            "phase" => self.phase = value,
            "token" => self.token = Some(value).filter(|v| !v.is_empty()),
            "exit_code" => self.exit_code = value.parse().ok(),
            "job.pid" => self.pid = number,
            "submitted" => {
                self.submitted = number;
                self.age_s = now.zip(number).map(|(now, then)| now.saturating_sub(then));
            }
            "supervisor.pid" => self.untaken = number.is_none(),
            "held" => self.held.push(value),
            "started" => self.started = number,
            "finished" => self.finished = number,
            "heartbeat" => self.heartbeat_age_s = now.zip(number).map(|(now, beat)| now.saturating_sub(beat)),
            "supervisor_alive" => self.supervisor_alive = true,
            "job_alive" => self.job_alive = true,
            "elsewhere_alive" => self.elsewhere = true,
            "same_boot" => self.same_boot = true,
            "cancelled" => self.cancelled = true,
            "slurm" => {
                let (number, state) = value.split_once(' ').unwrap_or((&value, ""));
                self.slurm = Some((number.to_string(), state.trim().to_string()));
            }
            "train" => self.train = row(),
            "val" => self.validation = row(),
            "timing" => self.timing = row(),
            "last_line" => self.last_line = Some(value),
            // A newer agent may say more.
            _ => {}
        }
    }
}

/// The jobs of a host, by id.
pub fn ids(connection: &Connection) -> Result<Vec<String>> {
    let facts = connection.whole_facts("list", &[])?;
    Ok(facts.into_iter().filter(|(key, _)| key == "job").map(|(_, id)| id).collect())
}

/// The ids that `text` means: itself, else all whose configuration has this name.
pub fn all_named<'a>(ids: &'a [String], text: &str) -> Vec<&'a str> {
    match ids.iter().find(|id| *id == text) {
        Some(id) => vec![id],
        None => ids.iter().map(String::as_str).filter(|id| config_name(id) == text).collect(),
    }
}

/// The one id that `text` means.
pub fn named<'a>(ids: &'a [String], text: &str) -> Result<&'a str> {
    match all_named(ids, text).as_slice() {
        [id] => Ok(id),
        [] => Err(input_error!("{text}: no such job")),
        several => Err(input_error!(
            "{text}: found {} jobs of this name, expected one of {}",
            several.len(),
            several.join(", ")
        )),
    }
}

/// `<name>-<config hash>-s<seed>` -> name.
fn config_name(id: &str) -> &str {
    id.rsplitn(3, '-').nth(2).unwrap_or(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(facts: &[(&str, &str)]) -> Job {
        let mut all = vec![("now".to_string(), "1000".to_string()), ("job".to_string(), "e5c-0123abcd-s0".to_string())];
        all.extend(facts.iter().map(|(k, v)| (k.to_string(), v.to_string())));
        of_facts("a", all).jobs.remove(0)
    }

    #[test]
    fn facts_become_states() {
        let both = [("supervisor_alive", "yes"), ("job_alive", "yes"), ("same_boot", "yes")];
        let with = |more: &[(&str, &str)]| job(&[&both[..], more].concat()).state();
        assert_eq!(with(&[("phase", "running"), ("exit_code", "")]), State::Running);
        for (facts, state) in [
            (&[("phase", "running"), ("job_alive", "yes")][..], State::Running),
            (&[("phase", "waiting"), ("supervisor_alive", "yes")], State::Waiting),
            (&[("phase", "queued"), ("supervisor_alive", "yes")], State::Queued),
            (&[("phase", "running")], State::Lost),
            (&[("phase", "queued")], State::Lost),
            (&[("phase", "running"), ("cancelled", "yes")], State::Cancelled),
            (&[("phase", "ended"), ("exit_code", "0")], State::Finished),
            (&[("phase", "ended"), ("exit_code", "0"), ("cancelled", "yes")], State::Finished),
            (&[("phase", "ended"), ("exit_code", "130"), ("cancelled", "yes")], State::Cancelled),
            (&[("phase", "ended"), ("exit_code", "137")], State::Failed),
            (&[("phase", "skipped"), ("exit_code", "125")], State::Skipped),
            (&[("phase", "queued"), ("slurm", "17 PENDING")], State::Queued),
            (&[("phase", "running"), ("slurm", "17 RUNNING")], State::Running),
            (&[("phase", "running"), ("slurm", "17 TIMEOUT")], State::Failed),
            (&[("phase", "queued"), ("slurm", "17 CANCELLED+")], State::Cancelled),
            (&[("phase", "running"), ("slurm", "17 ")], State::Lost),
            (&[("phase", "queued"), ("slurm", "17 "), ("cancelled", "yes")], State::Cancelled),
            (&[("phase", "running"), ("slurm", "17 UNREACHABLE")], State::Unknown),
            (&[("phase", "running"), ("slurm", "17 OUT_OF_MEMORY")], State::Failed),
            (&[("phase", "running"), ("elsewhere_alive", "yes")], State::Unknown),
            (&[("phase", "queued"), ("supervisor.pid", ""), ("submitted", "990")], State::Queued),
            (&[("phase", "queued"), ("supervisor.pid", ""), ("submitted", "900")], State::Lost),
            (&[("phase", "ended"), ("exit_code", "0"), ("slurm", "17 COMPLETED")], State::Finished),
        ] {
            assert_eq!(job(facts).state(), state, "{facts:?}");
        }
    }

    #[test]
    fn notes_say_what_a_state_hides() {
        assert!(job(&[("phase", "running"), ("job_alive", "yes")]).note(5.0).contains("supervisor is gone"));
        assert!(job(&[("phase", "running")]).note(5.0).contains("started anew"));
        let alive = [("phase", "running"), ("job_alive", "yes"), ("supervisor_alive", "yes")];
        let row = r#"{"gpu_foreign_processes": [{"pid": 7}], "gpu_throttle_reasons": ["sw_power_cap", "hw_thermal_slowdown"]}"#;
        let note = job(&[&alive[..], &[("timing", row)]].concat()).note(5.0);
        assert_eq!(note, "foreign processes on its GPU: 1, throttled: hw_thermal_slowdown");
        let row =
            r#"{"gpu_foreign_processes": [], "gpu_throttle_reasons": ["sw_power_cap"], "gpu_ecc_uncorrected": 0}"#;
        assert_eq!(job(&[&alive[..], &[("timing", row)]].concat()).note(5.0), "");
        let beat = |at: &'static str| job(&[&alive[..], &[("heartbeat", at)]].concat()).note(5.0);
        assert_eq!((beat("990"), beat("700")), (String::new(), "no heartbeat for 300 s".to_string()));
    }

    #[test]
    fn a_job_is_named_by_id_or_by_a_name_that_only_it_has() {
        let ids = ["e9a-x-01234567-s0", "e5c-01234567-s0", "e5c-01234567-s1"].map(String::from);
        let found = |text: &str| named(&ids, text).map(String::from).map_err(|e| e.to_string());
        assert_eq!(found("e9a-x").as_deref(), Ok("e9a-x-01234567-s0"));
        assert_eq!(found("e5c-01234567-s1").as_deref(), Ok("e5c-01234567-s1"));
        assert!(found("e5c").is_err_and(|e| e.contains("e5c-01234567-s0, e5c-01234567-s1")));
        assert!(found("e5").is_err_and(|e| e.contains("no such job")));
    }
}
