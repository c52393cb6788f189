//! The run directory `ROOT/<name>-<config hash>-s<seed>/`: one configuration, one process at a time.
//!
//! `RunDir::open` answers one question: may this process write here, and from which step? It refuses a directory that
//! another process is writing (a lock that the kernel drops when the process dies), one that holds another
//! configuration, and a second start without `--resume`. On a resume it cuts the jsonl files back to the newest
//! complete checkpoint, or to nothing when there is none.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::machine::{self, CpuKind};
use super::{atomic_file, checkpoints, jsonl};
use crate::{Error, Result, bail_input, input_error};

/// The files whose lines carry a step; a resume cuts them.
const JSONL_FILES: [&str; 4] = ["metrics.jsonl", "timing.jsonl", "injection.jsonl", "samples.jsonl"];

/// What identifies the run, and what run.json records.
pub struct RunSpec<'a> {
    /// `--out`; usually `runs`.
    pub root: &'a Path,
    pub name: &'a str,
    pub config_hash: &'a str,
    pub seed: u64,
    /// The resolved configuration, written to config.yaml.
    pub config_yaml: &'a str,
    /// What the run reads, by name (`model`, `data.train`), with a digest: the hash knows only the last part of a path.
    pub inputs: &'a [(String, String)],
    pub resume: bool,
    /// `cpu`, or the GPU's name.
    pub device: &'a str,
    /// Threads that libtorch uses.
    pub threads: usize,
    pub libtorch_version: Option<String>,
    pub noise_version: u32,
}

/// Where training begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// Step 0, with empty files (also: a resume that found no complete checkpoint).
    Fresh,
    /// After `step` steps, with the state in `checkpoint`.
    Resume { step: u64, checkpoint: PathBuf },
}

impl Start {
    /// Steps already done.
    pub fn step(&self) -> u64 {
        match self {
            Start::Fresh => 0,
            Start::Resume { step, .. } => *step,
        }
    }
}

/// An open run directory. The lock lives as long as this value.
pub struct RunDir {
    path: PathBuf,
    start: Start,
    warnings: Vec<String>,
    _lock: Lock,
}

/// The lock file, held. A process that is being forked elsewhere in this one (to ask git for the commit) shares the
/// open file until it execs, so closing ours would not free the lock at once: dropping unlocks it.
struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        // Nothing to do about a failure: the lock ends with the process at the latest.
        let _ = self.0.unlock();
    }
}

/// One start of the run, as run.json keeps it.
#[derive(Debug, Serialize, Deserialize)]
struct Launch {
    time_utc: String,
    from_step: u64,
    argv: Vec<String>,
    git_commit: Option<String>,
    #[serde(default)]
    sources: String, // machine::SOURCES
    temper_version: String,
    libtorch_version: Option<String>,
    noise_version: u32,
    device: String,
    threads: usize,
    cpu: CpuKind,
}

/// run.json: the first start, and every resume after it.
#[derive(Debug, Serialize, Deserialize)]
struct RunJson {
    name: String,
    config_hash: String,
    seed: u64,
    #[serde(default)]
    inputs: BTreeMap<String, String>,
    #[serde(flatten)]
    start: Launch,
    #[serde(default)]
    resumes: Vec<Launch>,
}

impl RunDir {
    /// Opens the directory for writing. Errors: `Input` when it may not be used (the message says what to do),
    /// `Io` when it cannot be written.
    pub fn open(spec: &RunSpec) -> Result<RunDir> {
        let path = run_path(spec.root, spec.name, spec.config_hash, spec.seed)?;
        refuse_foreign(&path, spec)?;
        fs::create_dir_all(&path).map_err(|e| Error::io(&path, e))?;
        let lock = lock(&path)?;
        // Asked again under the lock: another process may have started the run in between.
        let previous = refuse_foreign(&path, spec)?;

        checkpoints::clean_leftovers(&path)?;
        let start = match checkpoints::latest_complete(&path)? {
            Some((step, checkpoint)) if previous.is_some() => Start::Resume { step, checkpoint },
            _ => Start::Fresh,
        };
        if previous.is_some() {
            let step = matches!(start, Start::Resume { .. }).then(|| start.step());
            for file in JSONL_FILES {
                jsonl::truncate_to_step(&path.join(file), step)?;
            }
        }
        let launch = launch(spec, start.step());
        let warnings = previous.as_ref().map(|p| differences(p, &launch)).unwrap_or_default();
        let run_json = match previous {
            Some(mut run) => {
                run.resumes.push(launch);
                run
            }
            None => RunJson {
                name: spec.name.to_string(),
                config_hash: spec.config_hash.to_string(),
                seed: spec.seed,
                inputs: spec.inputs.iter().cloned().collect(),
                start: launch,
                resumes: Vec::new(),
            },
        };
        // config.yaml first: a directory with run.json is a started run, so everything else must be there.
        atomic_file::write(&path.join("config.yaml"), spec.config_yaml.as_bytes())?;
        let run_json_path = path.join("run.json");
        let text = serde_json::to_string_pretty(&run_json)
            .map_err(|e| Error::Runtime(format!("{}: {e}", run_json_path.display())))?;
        atomic_file::write(&run_json_path, (text + "\n").as_bytes())?;
        Ok(RunDir { path, start, warnings, _lock: lock })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn start(&self) -> &Start {
        &self.start
    }

    /// What the user should know about this resume (another thread count or CPU: not bitwise).
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The path of a file in this directory, e.g. `metrics.jsonl`.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

/// `root/<name>-<config hash>-s<seed>`. The name must be usable as one path component.
pub fn run_path(root: &Path, name: &str, config_hash: &str, seed: u64) -> Result<PathBuf> {
    if !usable_name(name) {
        bail_input!(
            "name: found {name:?}, expected letters, digits, '.', '_', '-' or '+', not beginning with '.' or '-'"
        );
    }
    Ok(root.join(format!("{name}-{config_hash}-s{seed}")))
}

/// Whether `name` can begin the name of a directory that is typed on command lines.
pub fn usable_name(name: &str) -> bool {
    let usable = |c: char| c.is_ascii_alphanumeric() || "._-+".contains(c);
    !name.is_empty() && !name.starts_with(['.', '-']) && name.chars().all(usable)
}

/// Reads run.json and refuses what this start may not touch. `None`: nothing is there yet.
fn refuse_foreign(path: &Path, spec: &RunSpec) -> Result<Option<RunJson>> {
    let shown = path.display();
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) if e.kind() == std::io::ErrorKind::NotADirectory => {
            bail_input!("{shown}: found a file, expected a run directory or nothing")
        }
        Err(e) => return Err(Error::io(path, e)),
    };
    let run_json = path.join("run.json");
    let text = match fs::read_to_string(&run_json) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            // A process that died while it set the directory up leaves the lock, temporary files and config.yaml.
            for entry in entries.flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if !name.starts_with('.') && name != "config.yaml" {
                    bail_input!("{shown}: not empty and not a run (found {name}, no run.json); choose another --out");
                }
            }
            return Ok(None);
        }
        Err(e) => return Err(Error::io(&run_json, e)),
    };
    let run: RunJson = serde_json::from_str(&text)
        .map_err(|e| input_error!("{}: {e}; this is not a run.json that temper wrote", run_json.display()))?;
    if run.config_hash != spec.config_hash || run.seed != spec.seed {
        bail_input!(
            "{shown}: holds a run of another configuration (found hash {} seed {}, expected hash {} seed {}); choose \
             another --out",
            run.config_hash,
            run.seed,
            spec.config_hash,
            spec.seed
        );
    }
    for (what, digest) in spec.inputs {
        if let Some(before) = run.inputs.get(what).filter(|before| *before != digest) {
            bail_input!(
                "{shown}: {what}: found other content than this run was started with (digest {digest}, expected \
                 {before}); choose another --out"
            );
        }
    }
    if !spec.resume {
        bail_input!("{shown}: this run was started before; pass --resume to continue it, or another --out");
    }
    Ok(Some(run))
}

/// The kernel drops the lock with the process, also on kill -9, so a stale lock file means nothing.
fn lock(path: &Path) -> Result<Lock> {
    let lock_path = path.join(".lock");
    let file = File::create(&lock_path).map_err(|e| Error::io(&lock_path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(Lock(file)),
        Err(TryLockError::WouldBlock) => {
            bail_input!("{}: another process is writing this run; wait for it or stop it", path.display())
        }
        Err(TryLockError::Error(e)) => Err(Error::io(&lock_path, e)),
    }
}

fn launch(spec: &RunSpec, from_step: u64) -> Launch {
    Launch {
        time_utc: machine::utc_now(),
        from_step,
        argv: std::env::args().collect(),
        git_commit: machine::git_commit(),
        sources: machine::SOURCES.to_string(),
        temper_version: env!("CARGO_PKG_VERSION").to_string(),
        libtorch_version: spec.libtorch_version.clone(),
        noise_version: spec.noise_version,
        device: spec.device.to_string(),
        threads: spec.threads,
        cpu: CpuKind::of_this_machine(),
    }
}

/// Differences from the launch before that make a resume not bitwise.
fn differences(run: &RunJson, now: &Launch) -> Vec<String> {
    let before = run.resumes.last().unwrap_or(&run.start);
    let facts = [
        ("threads", before.threads.to_string(), now.threads.to_string()),
        ("cpu", before.cpu.model.clone(), now.cpu.model.clone()),
        ("simd", before.cpu.simd.clone(), now.cpu.simd.clone()),
        ("device", before.device.clone(), now.device.clone()),
        ("noise_version", before.noise_version.to_string(), now.noise_version.to_string()),
    ];
    facts
        .into_iter()
        .filter(|(_, was, is)| was != is)
        .map(|(what, was, is)| format!("{what} was {was}, is {is}: this resume is not bitwise"))
        .collect()
}
