//! One call to a host: the words of its command line, the agent before whatever else goes to stdin, and what the end of it
//! means.
//!
//! A call runs `sh -c 'agent=$(first N bytes of stdin); eval "$agent"' temper OPERATION ROOT ARGUMENTS...`, inside
//! `docker exec -i CONTAINER` where the host has one, behind `ssh DESTINATION` where it is elsewhere. The login shell over
//! there sees one quoted line; nothing is installed.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdout, Command, Stdio};

use super::hosts::{Executor, Host};
use super::quote;
use crate::{Error, Result, input_error};

/// What runs over there.
pub const AGENT: &str = concat!(
    include_str!("agent/state.sh"),
    include_str!("agent/send.sh"),
    include_str!("agent/job.sh"),
    include_str!("agent/look.sh"),
    include_str!("agent/main.sh"),
);
/// The agent's first line: whoever sends it was reached.
const GREETING: &str = "temper-agent 1\n";
/// The last line of answers whose length nothing else tells.
const END: &str = "end";

/// What goes to stdin after the agent.
pub enum Input<'a> {
    Nothing,
    Bytes(&'a mut (dyn Read + Send)),
    /// Nothing, and stdin stays open until the answer has been read: its end tells the agent that nobody reads any more.
    KeptOpen,
}

pub struct Connection<'a> {
    pub host: &'a Host,
}

impl Connection<'_> {
    /// Program and words of a call.
    fn words(&self, operation: &str, arguments: &[&str]) -> Vec<String> {
        let boot = format!("agent=$(dd bs=1 count={} 2>/dev/null) && eval \"$agent\"", AGENT.len());
        let mut words: Vec<String> = Vec::new();
        if let Some(container) = &self.host.container {
            words.extend(["docker", "exec", "-i", container].map(String::from));
        }
        words.extend(["sh", "-c", &boot, "temper", operation, &self.host.root].map(String::from));
        words.extend(arguments.iter().map(|a| a.to_string()));
        let Some(destination) = self.host.ssh.as_ref().filter(|_| self.host.executor != Executor::Local) else {
            return words;
        };
        let mut ssh: Vec<String> = ["ssh", "-T", "-C", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15"]
            .into_iter()
            // A connection that stays in the background would hold stderr open, and this call with it.
            .chain(["-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4", "-o", "ControlMaster=no"])
            .map(String::from)
            .collect();
        // ssh takes the first of two values: the user's come before ours.
        ssh.splice(1..1, self.host.ssh_options.iter().cloned());
        ssh.extend(["--".to_string(), destination.clone(), quote::line(words)]);
        ssh
    }

    /// The call as one would type it, for `--dry-run`.
    pub fn shown(&self, operation: &str, arguments: &[&str], input: &str) -> String {
        let more = if input.is_empty() { String::new() } else { format!(" and then {input}") };
        format!("{}   # stdin: the agent{more}", quote::line(self.words(operation, arguments)))
    }

    /// Calls, sends `input`, and lets `read` have the answer.
    ///
    /// # Errors
    /// `Unavailable`: the host was not reached, or the connection broke; `Input`, `Runtime`: the agent's own words.
    pub fn exchange<T>(
        &self,
        operation: &str,
        arguments: &[&str],
        input: Input,
        read: impl FnOnce(&mut BufReader<ChildStdout>) -> Result<T>,
    ) -> Result<T> {
        let words = self.words(operation, arguments);
        let mut child = Command::new(&words[0])
            .args(&words[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| Error::Unavailable(format!("{}: {}: {e}", self.host.name, words[0])))?;
        let (Some(mut stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(Error::Runtime(format!("{}: no pipes to {}", self.host.name, words[0])));
        };
        let (answer, complaints) = std::thread::scope(|scope| {
            let complaints = scope.spawn(|| said(stderr));
            let (closed, wait_until_read) = std::sync::mpsc::channel::<()>();
            scope.spawn(move || {
                // A failure to write shows in how the call ends, with better words.
                let _ = stdin.write_all(AGENT.as_bytes());
                match input {
                    Input::Nothing => {}
                    Input::Bytes(bytes) => drop(std::io::copy(bytes, &mut stdin)),
                    Input::KeptOpen => drop(stdin.flush().map(|()| wait_until_read.recv())),
                }
            });
            let mut reader = BufReader::new(stdout);
            let mut greeting = String::new();
            let greeted = reader.read_line(&mut greeting).is_ok() && greeting == GREETING;
            let answer = greeted.then(|| read(&mut reader));
            // A call that is left before its end, as after a bad answer, must not wait for the rest of it.
            if !matches!(answer, Some(Ok(_))) {
                drop(reader);
            }
            drop(closed);
            (answer, complaints.join().unwrap_or_default())
        });
        self.concluded(child, answer, &complaints)
    }

    fn concluded<T>(&self, mut child: Child, answer: Option<Result<T>>, complaints: &str) -> Result<T> {
        let name = &self.host.name;
        let code = child.wait().ok().and_then(|status| status.code());
        let last = complaints.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no word why").trim();
        let Some(answer) = answer else {
            return Err(Error::Unavailable(format!("{name}: not reached: {last}")));
        };
        let own = complaints.lines().find_map(|line| line.strip_prefix("error: "));
        match (code, own) {
            (Some(0), _) => answer.map_err(|e| e.at(name)),
            (Some(2 | 3), Some(own)) => Err(input_error!("{name}: {own}")),
            (_, Some(own)) => Err(Error::Runtime(format!("{name}: {own}"))),
            // ssh's own failures are 255; a killed one has no code.
            (Some(255) | None, None) => Err(Error::Unavailable(format!("{name}: the connection broke: {last}"))),
            (Some(code), None) => Err(Error::Runtime(format!("{name}: exit code {code}: {last}"))),
        }
    }

    /// The whole answer as text.
    pub fn text(&self, operation: &str, arguments: &[&str], input: Input) -> Result<String> {
        self.exchange(operation, arguments, input, |reader| {
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).map_err(|e| Error::Runtime(e.to_string()))?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        })
    }

    /// An answer of lines `key <tab> value`.
    pub fn facts(&self, operation: &str, arguments: &[&str]) -> Result<Vec<(String, String)>> {
        Ok(pairs(&self.text(operation, arguments, Input::Nothing)?))
    }

    /// The same, for answers that close with `end`: half of one is none.
    pub fn whole_facts(&self, operation: &str, arguments: &[&str]) -> Result<Vec<(String, String)>> {
        let mut facts = self.facts(operation, arguments)?;
        match facts.pop() {
            Some((key, _)) if key == END => Ok(facts),
            _ => Err(Error::Unavailable(format!("{}: the connection broke before the answer's end", self.host.name))),
        }
    }
}

fn pairs(text: &str) -> Vec<(String, String)> {
    let pair = |line: &str| {
        let (key, value) = line.split_once('\t').unwrap_or((line, ""));
        (key.to_string(), value.to_string())
    };
    text.lines().map(pair).collect()
}

fn said(mut stderr: impl Read) -> String {
    let mut bytes = Vec::new();
    // What cannot be read is not there to be shown.
    let _ = stderr.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}
