//! The machines that jobs are sent to: a YAML file that each user writes once.
//!
//! ```yaml
//! hosts:
//!   a100:
//!     ssh: a100-box                   # a destination as in ~/.ssh/config
//!     ssh_options: [-p, "2222"]
//!     container: temper-dev           # docker exec into it
//!     root: /data/temper              # everything is kept below it
//!     gpus: [0, 1, 2, 3]              # one job on each; a job waits for the first that is free
//!     libtorch: /opt/torch            # a directory with lib/libtorch_cpu.so
//!     env: {HF_HOME: /data/hf, HTTPS_PROXY: "http://proxy:3128"}
//!     setup: . /opt/env.sh            # shell (sh, no login), before temper
//!   cluster: {executor: slurm, ssh: login, root: /scratch/me/temper, slurm: [--partition=gpu, --gres=gpu:1]}
//!   here: {executor: local, root: ~/temper-jobs, device: cpu, slots: 2}
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::one_line;
use crate::run::atomic_file;
use crate::{Error, Result, bail_input, input_error};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Executor {
    /// A detached process on the machine that ssh leads to.
    #[default]
    Ssh,
    /// `sbatch` on the machine that ssh leads to (or on this one, without `ssh`).
    Slurm,
    /// A detached process on this machine.
    Local,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    #[serde(skip)]
    pub name: String,
    #[serde(default)]
    pub executor: Executor,
    #[serde(default)]
    pub ssh: Option<String>,
    #[serde(default)]
    pub ssh_options: Vec<String>,
    #[serde(default)]
    pub container: Option<String>,
    /// Absolute, or below the home directory of whoever logs in (on this machine: the current directory).
    pub root: String,
    /// Where jobs run, from which a configuration's relative paths are seen (default: the root; on this machine the
    /// current directory).
    #[serde(default)]
    pub directory: Option<String>,
    #[serde(default)]
    pub gpus: Vec<u32>,
    /// Jobs at a time where there are no GPUs.
    #[serde(default)]
    pub slots: Option<u32>,
    /// `--device` of the job.
    #[serde(default)]
    pub device: Option<String>,
    #[serde(default)]
    pub libtorch: Option<String>,
    /// The Python that `--install-runtime` makes an environment with.
    #[serde(default = "python3")]
    pub python: String,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    #[serde(default)]
    pub setup: Option<String>,
    /// Where GPUs are locked (default: /tmp/temper-locks, for all roots and users of the machine).
    #[serde(default)]
    pub locks: Option<String>,
    /// Options of sbatch.
    #[serde(default)]
    pub slurm: Vec<String>,
    /// Seconds between two looks of a job that waits.
    #[serde(default = "two")]
    pub poll_s: f64,
    /// Seconds between two heartbeats.
    #[serde(default = "five")]
    pub heartbeat_s: f64,
}

fn python3() -> String {
    "python3".to_string()
}

fn two() -> f64 {
    2.0
}

fn five() -> f64 {
    5.0
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HostsFile {
    hosts: BTreeMap<String, Host>,
}

/// All hosts of a file.
#[derive(Debug)]
pub struct Hosts {
    path: PathBuf,
    hosts: BTreeMap<String, Host>,
}

impl Hosts {
    /// The file that was named, else $TEMPER_HOSTS, else ./hosts.yaml, else ~/.config/temper/hosts.yaml.
    ///
    /// # Errors
    /// One line: none of these is there; or the file, the host and the key.
    pub fn find(named: Option<&Path>) -> Result<Hosts> {
        let from_environment = std::env::var_os("TEMPER_HOSTS").map(PathBuf::from);
        if let Some(path) = named.map(Path::to_path_buf).or(from_environment) {
            return Hosts::read(&path);
        }
        let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".config/temper/hosts.yaml"));
        let places: Vec<PathBuf> = [Some(PathBuf::from("hosts.yaml")), home].into_iter().flatten().collect();
        match places.iter().find(|path| path.exists()) {
            Some(path) => Hosts::read(path),
            None => {
                let places: Vec<String> = places.iter().map(|path| path.display().to_string()).collect();
                bail_input!("no file of hosts: expected --hosts FILE, TEMPER_HOSTS, or {}", places.join(" or "))
            }
        }
    }

    fn read(path: &Path) -> Result<Hosts> {
        let shown = path.display();
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        let file: HostsFile = serde_yaml::from_str(&text).map_err(|e| input_error!("{shown}: {}", one_line(e)))?;
        let mut hosts = file.hosts;
        for (name, host) in &mut hosts {
            host.name = name.clone();
            if host.executor == Executor::Local {
                host.see_paths_from_here()?;
            }
            host.check().map_err(|e| e.at(format!("{shown}: hosts.{name}")))?;
        }
        Ok(Hosts { path: path.to_path_buf(), hosts })
    }

    /// The host called `name`; without a name, the only one.
    pub fn get(&self, name: Option<&str>) -> Result<&Host> {
        let names: Vec<&str> = self.hosts.keys().map(String::as_str).collect();
        let found = match name {
            Some(name) => self.hosts.get(name),
            None if names.len() == 1 => self.hosts.values().next(),
            None => None,
        };
        found.ok_or_else(|| {
            let path = self.path.display();
            let asked = name.map_or("found no --host".to_string(), |name| format!("--host {name:?}: not in {path}"));
            input_error!("{asked}, expected one of {} ({path})", names.join(", "))
        })
    }

    pub fn all(&self) -> impl Iterator<Item = &Host> {
        self.hosts.values()
    }
}

impl Host {
    /// This machine, for runs that go straight to `out`: jobs run in the current directory, a few at a time.
    ///
    /// # Errors
    /// `Io`: `out/.jobs` cannot be made.
    pub fn here(out: &Path, gpus: Vec<u32>, slots: Option<u32>, device: Option<String>) -> Result<Host> {
        let root = out.join(".jobs");
        std::fs::create_dir_all(&root).map_err(|e| Error::io(&root, e))?;
        let runs = root.join("runs");
        if !runs.is_dir() {
            std::os::unix::fs::symlink("..", &runs).map_err(|e| Error::io(&runs, e))?;
        }
        let absolute = |path: &Path| {
            let path = path.canonicalize().map_err(|e| Error::io(path, e))?;
            path.to_str().map(String::from).ok_or_else(|| input_error!("{}: not UTF-8", path.display()))
        };
        // By this file `temper status`, `logs` and `cancel` find the jobs.
        let file = root.join("hosts.yaml");
        let place = serde_json::to_string(&absolute(&root)?).map_err(|e| Error::Runtime(e.to_string()))?;
        atomic_file::write(&file, format!("hosts:\n  here: {{executor: local, root: {place}}}\n").as_bytes())?;
        Ok(Host {
            name: "here".to_string(),
            executor: Executor::Local,
            ssh: None,
            ssh_options: Vec::new(),
            container: None,
            root: absolute(&root)?,
            directory: Some(absolute(Path::new("."))?),
            gpus,
            slots,
            device,
            libtorch: None,
            python: python3(),
            env: BTreeMap::new(),
            setup: None,
            locks: None,
            slurm: Vec::new(),
            poll_s: 1.0,
            heartbeat_s: five(),
        })
    }

    /// On this machine relative paths are meant as everywhere here: from the current directory.
    fn see_paths_from_here(&mut self) -> Result<()> {
        let here = std::env::current_dir().map_err(|e| Error::io(".", e))?;
        if let (Some(below), Some(home)) = (self.root.strip_prefix("~/"), std::env::var_os("HOME")) {
            self.root = PathBuf::from(home).join(below).to_string_lossy().into_owned();
        } else if !self.root.is_empty() {
            self.root = here.join(&self.root).to_string_lossy().into_owned();
        }
        let directory = here.join(self.directory.as_deref().unwrap_or_default());
        self.directory = Some(directory.to_string_lossy().into_owned());
        Ok(())
    }

    /// What would otherwise fail on the way, or do something else than it says.
    fn check(&self) -> Result<()> {
        let word = |key: &str, text: &str| match text.is_empty() || text.starts_with('-') || text.contains(['\n', '\0'])
        {
            true => bail_input!("{key}: found {text:?}, expected a name that begins with no '-'"),
            false => Ok(()),
        };
        match (self.executor, &self.ssh) {
            (Executor::Ssh, None) => bail_input!("ssh: found nothing, expected a destination such as user@machine"),
            (Executor::Local, Some(_)) => bail_input!("ssh: found a destination, expected none with executor: local"),
            _ => {}
        }
        // A destination that begins with '-' would be read by ssh as an option, one of which runs a command.
        self.ssh.iter().try_for_each(|text| word("ssh", text))?;
        self.container.iter().try_for_each(|text| word("container", text))?;
        word("root", &self.root)?;
        word("python", &self.python)?;
        if self.locks.as_ref().is_some_and(|locks| !locks.starts_with('/')) {
            bail_input!("locks: found {:?}, expected an absolute path", self.locks.as_deref().unwrap_or_default());
        }
        if let Some(directory) = &self.directory
            && !(directory.starts_with('/') && self.root.starts_with('/'))
        {
            bail_input!("directory: found {directory:?} with root {:?}, expected two absolute paths", self.root);
        }
        if self.root.trim_end_matches('/').is_empty() {
            bail_input!("root: found {:?}, expected a directory of its own", self.root);
        }
        let variable = |name: &str| {
            let head = name.chars().next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
            head && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        };
        if let Some(name) = self.env.keys().find(|name| !variable(name)) {
            bail_input!("env: found {name:?}, expected the name of a variable");
        }
        if self.executor != Executor::Slurm && !self.slurm.is_empty() {
            bail_input!("slurm: found options, expected none without executor: slurm");
        }
        if let Some(option) = self.slurm.iter().find(|o| !o.starts_with('-') || o.contains('\n')) {
            bail_input!("slurm: found {option:?}, expected an option of sbatch such as --gres=gpu:1");
        }
        if let (Some(slots), false) = (self.slots, self.gpus.is_empty()) {
            bail_input!("slots: found {slots} beside gpus, expected one of them");
        }
        for (key, value) in [("poll_s", self.poll_s), ("heartbeat_s", self.heartbeat_s)] {
            if !(0.05..=3600.0).contains(&value) {
                bail_input!("{key}: found {value}, expected 0.05 to 3600 seconds");
            }
        }
        Ok(())
    }

    /// What a job must hold one of while it runs; none: as many jobs as are sent.
    pub fn tokens(&self) -> Vec<String> {
        match self.slots {
            Some(slots) => (0..slots).map(|slot| format!("slot-{slot}")).collect(),
            None => self.gpus.iter().map(|gpu| format!("gpu-{gpu}")).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Hosts> {
        let dir = tempfile::tempdir().map_err(|e| Error::io("temporary directory", e))?;
        let path = dir.path().join("hosts.yaml");
        std::fs::write(&path, text).map_err(|e| Error::io(&path, e))?;
        Hosts::read(&path)
    }

    #[test]
    fn hosts_are_named_and_checked() {
        let hosts =
            read("hosts:\n  a: {ssh: box, root: /r, gpus: [2, 5]}\n  b: {executor: local, root: ~/x, slots: 2}\n");
        let hosts = hosts.unwrap_or_else(|e| unreachable!("{e}"));
        assert_eq!(hosts.get(Some("a")).map(Host::tokens).ok(), Some(vec!["gpu-2".into(), "gpu-5".into()]));
        assert_eq!(hosts.get(Some("b")).map(Host::tokens).ok(), Some(vec!["slot-0".into(), "slot-1".into()]));
        assert!(hosts.get(None).is_err_and(|e| e.to_string().contains("a, b")));
        assert!(hosts.get(Some("c")).is_err_and(|e| e.to_string().contains("\"c\"")));
        for (text, part) in [
            ("a: {root: /r}", "ssh"),
            ("a: {ssh: -oProxyCommand=x, root: /r}", "ssh"),
            ("a: {ssh: x, root: /}", "root"),
            ("a: {ssh: x, root: ''}", "root"),
            ("a: {ssh: x, root: /r, env: {'A B': c}}", "env"),
            ("a: {ssh: x, root: /r, container: --privileged}", "container"),
            ("a: {ssh: x, root: /r, gpu: [0]}", "gpu"),
            ("a: {ssh: x, root: /r, gpus: [0], slots: 1}", "slots"),
            ("a: {ssh: x, root: /r, slurm: [--gres=gpu:1]}", "slurm"),
            ("a: {ssh: x, root: /r, poll_s: 0}", "poll_s"),
            ("a: {ssh: x, root: r, directory: /d}", "directory"),
            ("a: {executor: pbs, root: /r}", "pbs"),
            ("a: {executor: local, ssh: x, root: /r}", "ssh"),
        ] {
            let error = read(&format!("hosts:\n  {text}\n")).err().map(|e| (e.exit_code(), e.to_string()));
            let (code, line) = error.unwrap_or_default();
            assert!(code == 2 && line.contains("hosts.yaml") && line.contains(part), "{text}: {line}");
        }
    }
}
