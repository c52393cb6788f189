//! A client in a directory of its own, its hosts, and the stand-in for temper that its jobs run.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::sshd::{PATIENCE, Sshd};

/// Writes metrics as a run does, and goes on until `runs/ID/stop` holds its exit code. MODE, from the host's `env`:
/// stubborn (ignores TERM, as does a child), straggler (only a child does), leaves (a child stays after it), fills (writes until the disk is full).
const STAND_IN: &str = r#"#!/bin/sh
case " $* " in
*" doctor "*) echo "{\"to_do\": [], \"cuda_usable\": ${CUDA_USABLE:-true}, \"cuda_problem\": \"no card\"}"; exit 0 ;;
*" --dry-run "*) [ -z "${MISSING:-}" ] && exit 0; echo "error: data.train: $MISSING: no such file or directory" >&2; exit 2 ;;
esac
for one; do [ "${before:-}" = --out ] && out=$one; before=$one; done
run=$out/$TEMPER_JOB
mkdir -p "$run"
[ "${MODE:-}" = stubborn ] && trap '' TERM || trap 'echo stopping; exit 130' TERM
printf '%s|%s|%s|%s\n' "$$" "${CUDA_VISIBLE_DEVICES:-none}" "$*" "${NOTE:-}" >>"$run/starts"
echo '{"step":0,"kind":"val","val/n":4,"val/correct_clean":1,"val/acc_clean":0.25}' >>"$run/metrics.jsonl"
echo '{"step":3,"kind":"train","reward/mean":0.5}' >>"$run/metrics.jsonl"
echo '{"step":3,"step_s":1.5}' >>"$run/timing.jsonl"
echo "begins $TEMPER_JOB"
case ${MODE:-} in
stubborn | leaves) sleep 600 & echo $! >"$run/child" ;;
straggler) (trap '' TERM; exec sleep 600) & echo $! >"$run/child" ;;
fills) cat /dev/zero >"$run/zeros"; echo "out of space"; exit 1 ;;
esac
while [ ! -e "$run/stop" ]; do sleep 0.05; done
exit "$(cat "$run/stop")"
"#;

pub const TEMPER: &str = env!("CARGO_BIN_EXE_temper");

pub struct Client {
    dir: tempfile::TempDir,
    /// The host's root.
    pub root: PathBuf,
}

impl Client {
    /// With one host `box`: `fields` are YAML of the host besides executor and root.
    pub fn local(fields: &str) -> Client {
        Client::new("root", &format!("executor: local, {fields}"))
    }

    pub fn over(server: &Sshd, fields: &str) -> Client {
        Client::new("root", &format!("ssh: localhost, ssh_options: {}, {fields}", server.options()))
    }

    pub fn new(root: &str, fields: &str) -> Client {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("remote").join(root);
        let client = Client { dir, root };
        client.write_host("box", fields);
        let stand_in = client.path("stand-in");
        std::fs::write(&stand_in, STAND_IN).unwrap();
        std::fs::set_permissions(&stand_in, PermissionsExt::from_mode(0o755)).unwrap();
        client
    }

    pub fn write_host(&self, name: &str, fields: &str) {
        let root = serde_json::to_string(self.root.to_str().unwrap()).unwrap();
        let name = serde_json::to_string(name).unwrap();
        let locks = self.path("locks").display().to_string();
        let text =
            format!("hosts:\n  {name}: {{root: {root}, poll_s: 0.1, heartbeat_s: 0.3, locks: {locks}, {fields}}}\n");
        std::fs::write(self.path("hosts.yaml"), text).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A configuration called `name`.
    pub fn config(&self, name: &str) -> PathBuf {
        let debug = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/debug.yaml");
        let path = self.path(&format!("{name}.yaml"));
        std::fs::write(&path, format!("extends: {}\nname: {name}\n", debug.display())).unwrap();
        path
    }

    pub fn command<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Command {
        self.command_of(TEMPER, args)
    }

    /// Another program in the client's place.
    pub fn command_of<S: AsRef<std::ffi::OsStr>>(&self, program: &str, args: &[S]) -> Command {
        let mut command = Command::new(program);
        command.args(args).current_dir(self.dir.path()).env_remove("TEMPER_HOSTS");
        command.env("TEMPER_LOCKS", self.path("locks"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn run<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs to the end, which must be a success; stdout.
    pub fn succeed<S: AsRef<std::ffi::OsStr> + std::fmt::Debug>(&self, args: &[S]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {:?}\n{}", output.status, text(&output.stderr));
        text(&output.stdout)
    }

    /// Runs to an error, which must be one line with exit code `code`; the line.
    pub fn fail<S: AsRef<std::ffi::OsStr> + std::fmt::Debug>(&self, code: i32, args: &[S]) -> String {
        let output = self.run(args);
        let line = text(&output.stderr);
        assert_eq!((output.status.code(), line.lines().count()), (Some(code), 1), "{args:?}: {line}");
        line
    }

    /// The words that submit configuration `name` with the stand-in.
    pub fn submission(&self, name: &str) -> Vec<String> {
        let (config, binary) = (self.config(name), self.path("stand-in"));
        ["submit", config.to_str().unwrap(), "--json", "--binary", binary.to_str().unwrap()].map(String::from).to_vec()
    }

    /// Submits configuration `name` with the stand-in; the job's id.
    pub fn submit(&self, name: &str, more: &[&str]) -> String {
        let mut args = self.submission(name);
        args.extend(more.iter().map(|a| a.to_string()));
        let answer: Value = serde_json::from_str(&self.succeed(&args)).unwrap();
        answer["job"].as_str().unwrap().to_string()
    }

    /// What `temper status ID --json` says of it.
    pub fn job(&self, id: &str) -> Value {
        let answer: Value = serde_json::from_str(&self.succeed(&["status", id, "--json"])).unwrap();
        answer["hosts"][0]["jobs"][0].clone()
    }

    pub fn state(&self, id: &str) -> String {
        self.job(id)["state"].as_str().unwrap_or("none").to_string()
    }

    pub fn wait_for(&self, id: &str, state: &str) -> Value {
        let mut last = Value::Null;
        let is_there = || {
            last = self.job(id);
            last["state"] == state
        };
        assert!(comes_true(is_there), "waited in vain: {id} is {state}; last seen: {last}");
        last
    }

    /// A file of the job's run directory over there.
    pub fn run_file(&self, id: &str, name: &str) -> PathBuf {
        self.root.join("runs").join(id).join(name)
    }

    /// The lines that the stand-in wrote when it started: pid, CUDA_VISIBLE_DEVICES, arguments, NOTE.
    pub fn starts(&self, id: &str) -> Vec<Vec<String>> {
        let text = std::fs::read_to_string(self.run_file(id, "starts")).unwrap_or_default();
        text.lines().map(|line| line.split('|').map(String::from).collect()).collect()
    }

    pub fn wait_for_start(&self, id: &str) -> Vec<String> {
        wait_until(&format!("{id} starts"), || !self.starts(id).is_empty());
        self.starts(id).remove(0)
    }

    /// Whole or not at all: a stand-in that found the file before its code was in it would end with 2.
    pub fn end(&self, id: &str, code: i32) {
        let written = self.run_file(id, "stop.part");
        std::fs::write(&written, code.to_string()).unwrap();
        std::fs::rename(written, self.run_file(id, "stop")).unwrap();
    }

    /// Names below a directory of the host's root, hidden ones too, sorted.
    pub fn names(&self, below: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.root.join(below)).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

impl Drop for Client {
    /// Nothing that a test started outlives it.
    fn drop(&mut self) {
        for id in self.names("jobs") {
            for attempt in self.names(&format!("jobs/{id}")) {
                for name in ["supervisor.pid", "job.pid"] {
                    let file = self.root.join("jobs").join(&id).join(&attempt).join(name);
                    let pid = std::fs::read_to_string(file).unwrap_or_default().trim().to_string();
                    if !pid.is_empty() {
                        let _ = Command::new("kill")
                            .args(["-KILL", "--", &format!("-{pid}")])
                            .stderr(Stdio::null())
                            .status();
                    }
                }
            }
            if let Ok(child) = std::fs::read_to_string(self.run_file(&id, "child")) {
                let _ = Command::new("kill").args(["-KILL", child.trim()]).stderr(Stdio::null()).status();
            }
        }
    }
}

pub fn program(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub fn wait_until(what: &str, ready: impl FnMut() -> bool) {
    assert!(comes_true(ready), "waited in vain: {what}");
}

/// Whether `ready` is true before patience ends.
fn comes_true(mut ready: impl FnMut() -> bool) -> bool {
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        if ready() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    false
}
