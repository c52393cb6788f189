//! Many jobs over several hosts: sent as soon as they may run, watched, and what failed before taken up again.
//!
//! Nothing is kept on this side: which jobs exist is asked of the hosts, so a client that died goes on by starting again.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::connection::Connection;
use super::hosts::Host;
use super::job::{self, Job, Overview, State};
use super::snapshot::Snapshot;
use super::submit::{Request, submit};
use crate::run::console::Console;
use crate::run::signals::Interrupt;
use crate::{Error, Result};

pub struct Task {
    pub id: String,
    /// Tasks of one kind differ in their seed alone: what a host has for one of them it has for all.
    pub kind: String,
    pub snapshot: Snapshot,
}

/// Whether a task may be sent.
pub enum Verdict {
    Run,
    Wait,
    /// With the reason.
    Skip(String),
}

/// How a task ended.
#[derive(Clone, Debug)]
pub struct End {
    pub state: State,
    /// Where it ran; None for what never did.
    pub host: Option<String>,
    pub note: String,
}

pub struct Fleet<'a> {
    pub hosts: Vec<&'a Host>,
    pub console: &'a Console,
    pub interrupt: &'a Interrupt,
    /// Between two looks.
    pub every: Duration,
    /// What one can do about jobs when this stops watching.
    pub hint: String,
}

/// What is known of one task.
#[derive(Clone, Default)]
struct Known {
    host: Option<usize>,
    state: Option<State>,
    /// An end that was there before this call is not this call's end: it is sent once more.
    stale: bool,
    /// Whether the host has it is not known.
    doubtful: bool,
    end: Option<End>,
}

impl Fleet<'_> {
    /// Runs all tasks to their ends. `decide` says whether a task may be sent, given the ends so far; `arrived` is called when
    /// one has finished, and again later where it returns `Unavailable`.
    ///
    /// # Errors
    /// `Unavailable`: a host that was not reached at the start, since its jobs are not known then. `Interrupted`: the jobs go
    /// on. What a host refuses to run ends the call; jobs that were sent go on.
    pub fn run(
        &self,
        tasks: &[Task],
        mut decide: impl FnMut(usize, &[Option<End>]) -> Result<Verdict>,
        mut arrived: impl FnMut(usize, &Host) -> Result<()>,
    ) -> Result<Vec<End>> {
        let mut known = self.known(tasks)?;
        let mut checked = BTreeSet::new();
        loop {
            let ends: Vec<Option<End>> = known.iter().map(|k| k.end.clone()).collect();
            if ends.iter().all(Option::is_some) {
                return Ok(ends.into_iter().flatten().collect());
            }
            for (number, task) in tasks.iter().enumerate() {
                let one = &known[number];
                if one.end.is_some() || one.doubtful || (one.host.is_some() && !one.stale) {
                    continue;
                }
                self.check_interrupt()?;
                match decide(number, &ends)? {
                    Verdict::Wait => {}
                    Verdict::Skip(note) => {
                        self.console.note(&format!("{}: not run: {note}", task.id));
                        known[number].end = Some(End { state: State::Skipped, host: None, note });
                    }
                    Verdict::Run => self.send(task, number, &mut known, &mut checked)?,
                }
            }
            self.look(tasks, &mut known, &mut arrived)?;
            if known.iter().any(|k| k.end.is_none()) {
                self.pause()?;
            }
        }
    }

    /// Which tasks are jobs already, and where.
    fn known(&self, tasks: &[Task]) -> Result<Vec<Known>> {
        let mut known = vec![Known::default(); tasks.len()];
        for (place, host) in self.hosts.iter().enumerate() {
            let overview = job::overview(&Connection { host }, &[])?;
            for (task, known) in tasks.iter().zip(&mut known) {
                if let Some(job) = overview.jobs.iter().find(|job| job.id == task.id) {
                    let state = job.state();
                    let stale = state.is_over() && state != State::Finished;
                    *known = Known { host: Some(place), state: (!stale).then_some(state), stale, ..Known::default() };
                }
            }
        }
        Ok(known)
    }

    fn send<'t>(
        &self,
        task: &'t Task,
        number: usize,
        known: &mut [Known],
        checked: &mut BTreeSet<(usize, &'t str)>,
    ) -> Result<()> {
        let again = known[number].host;
        let place = again.unwrap_or_else(|| self.least_loaded(known));
        let host = self.hosts[place];
        let request = Request {
            id: &task.id,
            snapshot: &task.snapshot,
            resume: again.is_some(),
            continue_run: true,
            after: Vec::new(),
            tokens: host.tokens(),
            install_torch: None,
            check: checked.insert((place, &task.kind)),
        };
        match submit(&Connection { host }, &request, self.console) {
            Ok(_) => known[number] = Known { host: Some(place), ..Known::default() },
            Err(error @ Error::Unavailable(_)) => {
                // It may have been started all the same: whether it was, the host says when it answers again.
                self.console.warn(&format!("{}: {error}", task.id));
                known[number] = Known { host: Some(place), doubtful: true, ..known[number].clone() };
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// The host with the fewest of these jobs for what it has to run them on.
    fn least_loaded(&self, known: &[Known]) -> usize {
        let load = |place: usize| {
            let jobs = known.iter().filter(|k| k.host == Some(place) && k.end.is_none()).count();
            (jobs + 1) as f64 / self.hosts[place].tokens().len().max(1) as f64
        };
        (0..self.hosts.len()).min_by(|a, b| load(*a).total_cmp(&load(*b))).unwrap_or(0)
    }

    /// Asks the hosts once. One that is not reached changes nothing.
    fn look(
        &self,
        tasks: &[Task],
        known: &mut [Known],
        arrived: &mut impl FnMut(usize, &Host) -> Result<()>,
    ) -> Result<()> {
        for (place, host) in self.hosts.iter().enumerate() {
            let open = |k: &Known| k.host == Some(place) && k.end.is_none();
            let ids: Vec<&str> =
                tasks.iter().zip(known.iter()).filter(|(_, k)| open(k)).map(|(task, _)| task.id.as_str()).collect();
            if ids.is_empty() {
                continue;
            }
            let overview: Overview = match job::overview(&Connection { host }, &ids) {
                Ok(overview) => overview,
                Err(error @ Error::Unavailable(_)) => {
                    self.console.warn(&error.to_string());
                    continue;
                }
                Err(error) => return Err(error),
            };
            for (number, task) in tasks.iter().enumerate() {
                if !open(&known[number]) {
                    continue;
                }
                let was_doubtful = std::mem::take(&mut known[number].doubtful);
                let Some(job) = overview.jobs.iter().find(|job| job.id == task.id) else {
                    // Never arrived, or somebody removed it: it is sent anew.
                    known[number] = Known::default();
                    continue;
                };
                if was_doubtful && known[number].stale && job.state().is_over() {
                    continue;
                }
                known[number].stale = false;
                self.learn(task, job, host, &mut known[number], || arrived(number, host))?;
            }
        }
        Ok(())
    }

    fn learn(
        &self,
        task: &Task,
        job: &Job,
        host: &Host,
        known: &mut Known,
        arrived: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let (state, note) = (job.state(), job.note(host.heartbeat_s));
        if known.state != Some(state) {
            let on = job.token.as_ref().map_or(String::new(), |token| format!(" {token}"));
            let why = if note.is_empty() { String::new() } else { format!(": {note}") };
            self.console.note(&format!("{}: {} on {}{on}{why}", task.id, state.name(), host.name));
            known.state = Some(state);
        }
        if !state.is_over() {
            return Ok(());
        }
        if state == State::Finished {
            match arrived() {
                Err(error @ Error::Unavailable(_)) => {
                    self.console.warn(&error.to_string());
                    return Ok(());
                }
                other => other?,
            }
        }
        known.end = Some(End { state, host: Some(host.name.clone()), note });
        Ok(())
    }

    fn check_interrupt(&self) -> Result<()> {
        match self.interrupt.requested() {
            true => Err(Error::Interrupted(format!("the jobs go on; {}", self.hint))),
            false => Ok(()),
        }
    }

    fn pause(&self) -> Result<()> {
        let started = Instant::now();
        while started.elapsed() < self.every {
            self.check_interrupt()?;
            std::thread::sleep(Duration::from_millis(50).min(self.every));
        }
        Ok(())
    }
}
