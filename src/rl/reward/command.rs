//! A reward from a command of the user's: one process for the whole run, one JSON object a line, in and out.
//!
//! ```text
//! to the command    {"id": 7, "phase": "rollout", "question": "...", "response": "...", "ground_truth": "...",
//!                    "dataset_index": 3, "member": 0}
//! from the command  {"id": 7, "reward": 0.5}         null: it cannot score this one
//! ```
//!
//! Answers may come in any order. A batch has a time limit; when it passes, or the process ends, or writes what is none of
//! the above, the process is killed, what it has not answered of the batch is unscorable (None, which is not 0), and the next
//! batch gets a new process. That many times, then the run ends with an error.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::json;

use super::scorer::Item;
use crate::error::one_line;
use crate::{Error, Result, input_error};

/// Characters of a wrong answer that are shown.
const SHOWN: usize = 80;

pub struct CommandReward {
    argv: Vec<String>,
    timeout: Duration,
    max_restarts: u64,
    failures: u64,
    next_id: u64,
    process: Option<Process>,
    warnings: Vec<String>,
}

struct Process {
    child: Child,
    /// To a thread that writes, so that a command that answers before it has read everything blocks nobody.
    requests: Sender<String>,
    /// Lines; the channel closes where the output ends.
    answers: Receiver<String>,
}

#[derive(Deserialize)]
struct Answer {
    id: u64,
    reward: Option<f64>,
}

impl CommandReward {
    /// Starts the command.
    ///
    /// # Errors
    /// `Input`: there is no such command.
    pub fn start(argv: &[String], timeout_s: f64, max_restarts: u64) -> Result<CommandReward> {
        let timeout = Duration::from_secs_f64(timeout_s);
        let (argv, warnings) = (argv.to_vec(), Vec::new());
        let process = Some(Process::start(&argv)?);
        Ok(CommandReward { argv, timeout, max_restarts, failures: 0, next_id: 0, process, warnings })
    }

    /// One reward per item; None where the command could not, or did not.
    ///
    /// # Errors
    /// `Runtime`: it has failed too often.
    pub fn score(&mut self, items: &[Item]) -> Result<Vec<Option<f64>>> {
        let process = match self.process.take() {
            Some(process) => process,
            None => Process::start(&self.argv)?,
        };
        let first = self.next_id;
        self.next_id += items.len() as u64;
        let mut rewards = vec![None; items.len()];
        match process.ask(items, first, Instant::now() + self.timeout, &mut rewards) {
            Ok(()) => self.process = Some(process),
            Err(reason) => {
                let reason = match (reason, process.end()) {
                    (Failure::Ended, Some(status)) => format!("it ended ({status})"),
                    (Failure::Ended, None) => "it closed its output".to_string(),
                    (Failure::Late, _) => {
                        format!("no answer in {} s (reward.timeout_s)", self.timeout.as_secs_f64())
                    }
                    (Failure::Wrong(line), _) => format!("it wrote {line}"),
                };
                self.failed(&reason)?;
            }
        }
        Ok(rewards)
    }

    /// What went wrong since the last call.
    pub fn take_warnings(&mut self) -> Vec<String> {
        std::mem::take(&mut self.warnings)
    }

    fn failed(&mut self, reason: &str) -> Result<()> {
        self.failures += 1;
        let command = self.argv.join(" ");
        if self.failures > self.max_restarts {
            return Err(Error::Runtime(format!(
                "reward.command: {command}: {reason}; that was failure {} (reward.max_restarts: {})",
                self.failures, self.max_restarts
            )));
        }
        self.warnings.push(format!(
            "reward.command: {command}: {reason}; what it has not answered is unscorable, restart {} of {} follows",
            self.failures, self.max_restarts
        ));
        Ok(())
    }
}

enum Failure {
    Ended,
    Late,
    Wrong(String),
}

impl Process {
    fn start(argv: &[String]) -> Result<Process> {
        let mut command = Command::new(argv.first().map_or("", String::as_str));
        command.args(argv.iter().skip(1)).stdin(Stdio::piped()).stdout(Stdio::piped());
        // Ctrl-C is for us: we finish the step, and need its rewards for that.
        command.process_group(0);
        let mut child = command
            .spawn()
            .map_err(|e| input_error!("reward.command: found {argv:?}, which cannot be started: {e}"))?;
        let (Some(mut stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Error::Runtime("reward.command: no pipes".into()));
        };
        let (requests, to_write) = mpsc::channel::<String>();
        let (read, answers) = mpsc::channel();
        // Both threads end with the process's pipes.
        std::thread::spawn(move || {
            for batch in to_write {
                if stdin.write_all(batch.as_bytes()).and_then(|()| stdin.flush()).is_err() {
                    break;
                }
            }
        });
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).split(b'\n') {
                let Ok(line) = line else { break };
                if read.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                    break;
                }
            }
        });
        Ok(Process { child, requests, answers })
    }

    /// Fills `rewards` with the answers to ids `first`, `first + 1`, ...
    fn ask(
        &self,
        items: &[Item],
        first: u64,
        deadline: Instant,
        rewards: &mut [Option<f64>],
    ) -> std::result::Result<(), Failure> {
        let lines: String = (first..).zip(items).map(|(id, item)| format!("{}\n", request(id, item))).collect();
        self.requests.send(lines).map_err(|_| Failure::Ended)?;
        let mut open: HashMap<u64, usize> = (first..).zip(0..items.len()).collect();
        while !open.is_empty() {
            let line = match self.answers.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => return Err(Failure::Late),
                Err(RecvTimeoutError::Disconnected) => return Err(Failure::Ended),
            };
            if line.trim().is_empty() {
                continue;
            }
            let expected = "expected {\"id\": ..., \"reward\": number or null}";
            let shown: String = one_line(&line).chars().take(SHOWN).collect();
            let answer: Answer =
                serde_json::from_str(&line).map_err(|_| Failure::Wrong(format!("`{shown}`, {expected}")))?;
            let Some(place) = open.remove(&answer.id) else {
                return Err(Failure::Wrong(format!("`{shown}`, expected the id of a request that is still open")));
            };
            rewards[place] = answer.reward;
        }
        Ok(())
    }

    /// Kills it if it still runs; how it ended, if that was by itself.
    fn end(mut self) -> Option<std::process::ExitStatus> {
        // The output may close a moment before the process is gone.
        for _ in 0..100 {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                _ => std::thread::sleep(Duration::from_millis(2)),
            }
        }
        None
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // An error says that it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn request(id: u64, item: &Item) -> serde_json::Value {
    json!({
        "id": id,
        "phase": if item.validation { "validation" } else { "rollout" },
        "question": item.question.question,
        "response": item.text,
        "ground_truth": item.question.ground_truth,
        "dataset_index": item.question.index,
        "member": item.member,
    })
}
