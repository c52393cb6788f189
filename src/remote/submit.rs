//! Sending a job: what it runs goes over, is tried there, and is started detached.

use std::fs::File;
use std::io::Read;

use serde_json::Value;

use super::connection::{Connection, Input, pairs};
use super::hosts::{Executor, Host};
use super::job;
use super::quote;
use super::snapshot::Snapshot;
use crate::run::console::Console;
use crate::{Error, Result, bail_input};

/// When a job may start that runs after another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// Only where the other one finished with exit code 0.
    Ok,
    Any,
}

pub struct Request<'a> {
    /// Names the job and its run directory.
    pub id: &'a str,
    pub snapshot: &'a Snapshot,
    /// Go on where an earlier attempt stopped.
    pub resume: bool,
    /// Go on with a run directory that is there already, whoever began it.
    pub continue_run: bool,
    pub after: Vec<(After, String)>,
    /// What it takes one of; `Host::tokens` where nothing else was asked for.
    pub tokens: Vec<String>,
    /// Install torch of this version below ROOT/runtime first.
    pub install_torch: Option<&'a str>,
    /// Run `doctor` and `train --dry-run` over there before.
    pub check: bool,
}

/// One call of the agent.
struct Call {
    operation: &'static str,
    arguments: Vec<String>,
    /// What stdin holds after the agent.
    input: String,
}

impl Call {
    fn new(operation: &'static str, arguments: impl IntoIterator<Item = String>) -> Call {
        Call { operation, arguments: arguments.into_iter().collect(), input: String::new() }
    }

    fn arguments(&self) -> Vec<&str> {
        self.arguments.iter().map(String::as_str).collect()
    }

    fn run(&self, connection: &Connection) -> Result<String> {
        connection.text(self.operation, &self.arguments(), Input::Bytes(&mut self.input.as_bytes()))
    }
}

impl Request<'_> {
    fn probe(&self) -> Call {
        Call::new("probe", [self.snapshot.blob.clone(), self.snapshot.hash()])
    }

    fn install(&self, host: &Host) -> Option<Call> {
        let version = self.install_torch?;
        Some(Call::new("install_runtime", [host.python.clone(), version.to_string()]))
    }

    fn blob(&self) -> Call {
        Call::new("receive_blob", [self.snapshot.blob.clone(), self.snapshot.binary_bytes.to_string()])
    }

    fn snapshot(&self) -> Call {
        let snapshot = self.snapshot;
        Call::new("receive_snapshot", [snapshot.hash(), snapshot.blob.clone(), snapshot.config.clone()])
    }

    /// temper, as the job will find it, with other arguments.
    fn attempt(&self, host: &Host, arguments: &[&str]) -> Call {
        let call = Call::new("try", arguments.iter().map(|a| a.to_string()));
        Call { input: launch_script(host, &self.snapshot.hash()), ..call }
    }

    fn dry_run_there(&self, host: &Host) -> Call {
        self.attempt(host, &["--device", "cpu", "-q", "train", &self.config_path(host), "--dry-run"])
    }

    fn start(&self, host: &Host) -> Call {
        let word = |after: &(After, String)| match after {
            (After::Ok, id) => format!("ok {id}"),
            (After::Any, id) => format!("any {id}"),
        };
        let after: Vec<String> = self.after.iter().map(word).collect();
        let mut all = vec![
            format!("id={}", self.id),
            format!("mode={}", if self.resume { "resume" } else { "new" }),
            format!("executor={}", if host.executor == Executor::Slurm { "slurm" } else { "detached" }),
            format!("snapshot={}", self.snapshot.hash()),
            format!("tokens={}", self.tokens.join(" ")),
            format!("after={}", after.join("\n")),
            format!("options={}", host.slurm.join("\n")),
            format!("poll={}", host.poll_s),
            format!("beat={}", host.heartbeat_s),
            format!("locks={}", host.locks.as_deref().unwrap_or_default()),
            "--".to_string(),
        ];
        if let Some(device) = device(host) {
            all.extend(["--device".to_string(), device]);
        }
        all.extend(["train", &self.config_path(host), "--out", &in_root(host, "runs")].map(String::from));
        if self.resume || self.continue_run {
            all.push("--resume".to_string());
        }
        Call { input: launch_script(host, &self.snapshot.hash()), ..Call::new("submit", all) }
    }

    fn config_path(&self, host: &Host) -> String {
        in_root(host, &format!("snapshots/{}/config.yaml", self.snapshot.hash()))
    }
}

/// A path below the root, as seen from where jobs run: in the root, or in a directory of the host's own, whose root is
/// absolute.
fn in_root(host: &Host, path: &str) -> String {
    match &host.directory {
        Some(_) => format!("{}/{path}", host.root.trim_end_matches('/')),
        None => path.to_string(),
    }
}

/// `--device` of the job; a host with GPUs must not fall back to its CPU in silence.
fn device(host: &Host) -> Option<String> {
    host.device.clone().or_else(|| (!host.gpus.is_empty()).then(|| "cuda".to_string()))
}

/// A script that runs the snapshot's temper with its own arguments, in the host's environment.
fn launch_script(host: &Host, snapshot: &str) -> String {
    let directory = host.directory.as_ref().map_or("\"$TEMPER_ROOT\"".to_string(), |own| quote::word(own));
    let mut lines = vec![format!("cd {directory} || exit 1")];
    lines.extend(host.env.iter().map(|(name, value)| format!("export {name}={}", quote::word(value))));
    if let Some(libtorch) = &host.libtorch {
        lines.push(format!("LD_LIBRARY_PATH={}/lib${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}", quote::word(libtorch)));
        lines.push("export LD_LIBRARY_PATH".to_string());
    } else {
        // Resolved: libtorch looks for its neighbours from where it really lies.
        lines.push("if [ -e \"$TEMPER_ROOT/runtime/torch\" ]; then".to_string());
        lines.push(
            "  LD_LIBRARY_PATH=$(readlink -f \"$TEMPER_ROOT/runtime/torch\")/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
                .to_string(),
        );
        lines.push("  export LD_LIBRARY_PATH".to_string());
        lines.push("fi".to_string());
    }
    // What it prints is not the job's output; what it fails at must not be trained without.
    lines.extend(host.setup.iter().map(|setup| format!("{{ {setup}\n}} >&2 || exit 1")));
    lines.push(format!("exec \"$TEMPER_ROOT/snapshots/{snapshot}/temper\" \"$@\" </dev/null"));
    lines.join("\n")
}

/// Every command that [`submit`] would run, in order.
pub fn shown(connection: &Connection, request: &Request) -> String {
    let host = connection.host;
    let mut calls = vec![request.probe()];
    calls.extend(request.install(host));
    calls.extend([request.blob(), request.snapshot()]);
    if request.check {
        calls.extend([request.attempt(host, &["doctor", "--json"]), request.dry_run_there(host)]);
    }
    calls.push(request.start(host));
    let sent = format!("{} ({} bytes)", request.snapshot.binary.display(), request.snapshot.binary_bytes);
    let line = |call: &Call| {
        let input = match call.operation {
            "receive_blob" => format!(" and {sent}"),
            _ if call.input.is_empty() => String::new(),
            _ => " and the launch script".to_string(),
        };
        format!("{}   # stdin: the agent{input}", connection.shown(call.operation, &call.arguments()))
    };
    let lines: Vec<String> = calls.iter().map(line).collect();
    let script = launch_script(host, &request.snapshot.hash());
    format!("{}\n\n# the launch script\n{script}", lines.join("\n"))
}

/// Sends and starts the job; its attempt's number.
///
/// # Errors
/// `Input`: what the host lacks, a path of the configuration that is not there, a job that is there already. `Unavailable`:
/// the host was not reached; nothing half is left there.
pub fn submit(connection: &Connection, request: &Request, console: &Console) -> Result<u64> {
    let call = |call: Call| call.run(connection).map(|text| pairs(&text));
    let host = connection.host;
    if !request.resume {
        refuse_twice(connection, request.id)?;
    }
    let found = call(request.probe())?;
    let has = |key: &str| found.iter().any(|(k, v)| k == key && v == "yes");
    if let Some(install) = request.install(host).filter(|_| !has("runtime")) {
        console.note(&format!("{}: installing torch (2 to 5 GB)", host.name));
        call(install)?;
    }
    if !has("snapshot") {
        if !has("blob") {
            send_binary(connection, request, console)?;
        }
        call(request.snapshot())?;
    }
    if request.check {
        check(connection, request, console)?;
    }
    let started = call(request.start(host))?;
    let attempt = started.iter().find(|(key, _)| key == "attempt").and_then(|(_, value)| value.parse().ok());
    attempt.ok_or_else(|| Error::Unavailable(format!("{}: the answer was cut off; ask `temper status`", host.name)))
}

fn refuse_twice(connection: &Connection, id: &str) -> Result<()> {
    let overview = job::overview(connection, &[id])?;
    let Some(before) = overview.jobs.first() else { return Ok(()) };
    let (host, state) = (&connection.host.name, before.state());
    let remedy = match state {
        state if !state.is_over() => format!("watch it: temper logs -f {id} --host {host}"),
        job::State::Finished => format!("fetch it: temper fetch {id} --host {host}; or choose another seed"),
        _ => "pass --resume to go on where it stopped, or choose another seed".to_string(),
    };
    bail_input!("{host}: {id} was submitted before and is {}; {remedy}", state.name())
}

fn send_binary(connection: &Connection, request: &Request, console: &Console) -> Result<()> {
    let snapshot = request.snapshot;
    let file = File::open(&snapshot.binary).map_err(|e| Error::io(&snapshot.binary, e))?;
    let mut bar = console.progress(&format!("{}: sending temper", connection.host.name), snapshot.binary_bytes);
    let mut counted = Counted { file, count: |n| bar.inc(n) };
    let call = request.blob();
    connection.text(call.operation, &call.arguments(), Input::Bytes(&mut counted))?;
    bar.finish();
    Ok(())
}

/// Counts what is read.
struct Counted<F> {
    file: File,
    count: F,
}

impl<F: FnMut(u64)> Read for Counted<F> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.file.read(buffer)?;
        (self.count)(n as u64);
        Ok(n)
    }
}

/// `doctor`, then everything that the run will read, by the binary and in the environment that the job will have.
fn check(connection: &Connection, request: &Request, console: &Console) -> Result<()> {
    let host = connection.host;
    let text = request.attempt(host, &["doctor", "--json"]).run(connection).map_err(with_remedy)?;
    let doctor: Value = serde_json::from_str(&text)
        .map_err(|e| Error::Runtime(format!("{}: temper doctor: {e}: {text:?}", host.name)))?;
    let list = |key: &str| doctor[key].as_array().into_iter().flatten().filter_map(Value::as_str);
    let wants_gpu = device(host).is_some_and(|device| device.starts_with("cuda"));
    let matters = |item: &&str| wants_gpu || !item.starts_with("GPU");
    list("to_do").filter(matters).for_each(|item| console.warn(&format!("{}: {item}", host.name)));
    // Slurm's login machine need not have what its nodes have.
    if wants_gpu && host.executor != Executor::Slurm && doctor["cuda_usable"] != Value::Bool(true) {
        bail_input!("{}: no usable GPU: {}", host.name, doctor["cuda_problem"].as_str().unwrap_or("no word why"));
    }
    request.dry_run_there(host).run(connection).map(drop)
}

/// A loader that does not find libtorch names a file; the user needs to know what to set.
fn with_remedy(error: Error) -> Error {
    let text = error.to_string();
    match text.contains("error while loading shared libraries") {
        true => Error::Input(format!(
            "{text}; set `libtorch` of this host to a directory that has lib/libtorch_cpu.so, or pass --install-runtime"
        )),
        false => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Below the root, also where jobs run in another directory.
    #[test]
    fn an_installed_torch_is_found() -> std::io::Result<()> {
        let dir = tempfile::tempdir()?;
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("runtime/torch/lib"))?;
        std::fs::create_dir_all(root.join("snapshots/h"))?;
        let temper = root.join("snapshots/h/temper");
        std::fs::write(&temper, "#!/bin/sh\nprintf '%s' \"$LD_LIBRARY_PATH\"\n")?;
        std::fs::set_permissions(&temper, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        for directory in ["null", "/"] {
            let text = format!("{{ssh: x, root: /r, directory: {directory}}}");
            let host: Host = serde_yaml::from_str(&text).unwrap_or_else(|e| unreachable!("{e}"));
            let output = std::process::Command::new("sh")
                .args(["-c", &launch_script(&host, "h")])
                .env("TEMPER_ROOT", &root)
                .env_remove("LD_LIBRARY_PATH")
                .output()?;
            let lib = root.canonicalize()?.join("runtime/torch/lib");
            assert_eq!(String::from_utf8_lossy(&output.stdout), lib.display().to_string(), "{directory}: {output:?}");
        }
        Ok(())
    }

    /// Whatever stands in a hosts file is data to the launch script.
    #[test]
    fn a_launch_script_keeps_values_whole() -> std::io::Result<()> {
        let dir = tempfile::tempdir()?;
        let root = dir.path().join("a b'$(touch pwned)");
        std::fs::create_dir_all(root.join("snapshots/h"))?;
        let temper = root.join("snapshots/h/temper");
        std::fs::write(&temper, "#!/bin/sh\nprintf '%s|' \"$V\" \"$LD_LIBRARY_PATH\" \"$PWD\" \"$@\"\n")?;
        std::fs::set_permissions(&temper, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let text = "{ssh: x, root: /r, libtorch: \"/l $(touch pwned)\", env: {V: \"v'; touch pwned\\n\\\"\"}}";
        let host: Host = serde_yaml::from_str(text).unwrap_or_else(|e| unreachable!("{e}"));
        let output = std::process::Command::new("sh")
            .args(["-c", &launch_script(&host, "h"), "launch", "one", "t w o"])
            .env("TEMPER_ROOT", &root)
            .env_remove("LD_LIBRARY_PATH")
            .current_dir(dir.path())
            .output()?;
        let expected = format!("v'; touch pwned\n\"|/l $(touch pwned)/lib|{}|one|t w o|", root.display());
        assert_eq!(String::from_utf8_lossy(&output.stdout), expected, "{output:?}");
        assert!(!dir.path().join("pwned").exists() && !root.join("pwned").exists());
        Ok(())
    }
}
