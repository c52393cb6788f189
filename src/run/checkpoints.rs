//! Checkpoints: `checkpoints/step_000058/` is a model directory, with `trainer/` inside it for resume.
//!
//! What stands under a final name is complete. A checkpoint is written into `.writing_step_000058` beside its place,
//! every file is synced, then the directory is renamed, then `latest` (a relative link in the run directory) is
//! swapped by a rename of its own. Deleting goes the other way: rename first, remove after. A process that dies
//! anywhere leaves only names that begin with a dot, which the next `open` cleans.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::atomic_file;
use crate::{Error, Result};

const WRITING: &str = ".writing_";
const REPLACED: &str = ".replaced_";
const REMOVING: &str = ".removing_";

/// How many checkpoints stay. The newest one always stays: resume needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    pub keep_last: usize,
    /// Besides the last ones, the best by `CheckpointScore::value`.
    pub keep_best: usize,
}

/// What `keep_best` compares: the larger value is better, the later step wins a tie.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointScore {
    /// The metric's name as in metrics.jsonl, e.g. `val/acc_noisy`.
    pub metric: String,
    pub value: f64,
}

/// `trainer/checkpoint.json`: the last file written, so a directory that has it is whole.
#[derive(Debug, Serialize, Deserialize)]
struct Marker {
    step: u64,
    score: Option<CheckpointScore>,
}

pub struct CheckpointStore {
    run_dir: PathBuf,
    dir: PathBuf,
    retention: Retention,
}

impl CheckpointStore {
    /// Opens (and creates) `run_dir/checkpoints`, cleans what a dead process left behind, mends `latest` and prunes.
    /// Only the process that holds the run directory's lock may call this.
    pub fn open(run_dir: &Path, retention: Retention) -> Result<CheckpointStore> {
        let dir = run_dir.join("checkpoints");
        fs::create_dir_all(&dir).map_err(|e| Error::io(&dir, e))?;
        let store = CheckpointStore { run_dir: run_dir.to_path_buf(), dir, retention };
        clean_leftovers(run_dir)?;
        match store.latest_complete()? {
            Some((step, _)) => store.point_latest_at(step)?,
            None => store.remove_latest()?,
        }
        // A process may have died between the rename of its last checkpoint and this.
        store.prune()?;
        Ok(store)
    }

    /// The newest complete checkpoint.
    pub fn latest_complete(&self) -> Result<Option<(u64, PathBuf)>> {
        Ok(latest_complete(&self.run_dir)?.map(|found| (found.0, found.1)))
    }

    /// Starts the checkpoint of `step`. Write into `.path()`, then `.commit()`; dropping it instead removes it.
    pub fn begin(&self, step: u64) -> Result<PendingCheckpoint<'_>> {
        let path = self.dir.join(format!("{WRITING}{}", directory_name(step)));
        remove_tree(&path)?;
        let trainer = path.join("trainer");
        fs::create_dir_all(&trainer).map_err(|e| Error::io(&trainer, e))?;
        Ok(PendingCheckpoint { store: self, step, path, committed: false })
    }

    /// Swaps `latest` by renaming a new link over it: a reader sees the old or the new one, never none.
    fn point_latest_at(&self, step: u64) -> Result<()> {
        let latest = self.run_dir.join("latest");
        let target = Path::new("checkpoints").join(directory_name(step));
        if fs::read_link(&latest).is_ok_and(|found| found == target) {
            return Ok(());
        }
        let next = self.run_dir.join(".latest.tmp");
        if let Err(e) = fs::remove_file(&next)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            return Err(Error::io(&next, e));
        }
        std::os::unix::fs::symlink(&target, &next)
            .and_then(|()| fs::rename(&next, &latest))
            .map_err(|e| Error::io(&latest, e))?;
        atomic_file::sync_dir(&self.run_dir)
    }

    fn remove_latest(&self) -> Result<()> {
        let latest = self.run_dir.join("latest");
        match fs::remove_file(&latest) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(&latest, e)),
            _ => Ok(()),
        }
    }

    fn prune(&self) -> Result<()> {
        let all = complete_checkpoints(&self.run_dir)?;
        let keep = steps_to_keep(&all, self.retention);
        for (step, ..) in all.iter().filter(|(step, ..)| !keep.contains(step)) {
            let place = self.dir.join(directory_name(*step));
            let doomed = self.dir.join(format!("{REMOVING}{}", directory_name(*step)));
            remove_tree(&doomed)?;
            fs::rename(&place, &doomed).map_err(|e| Error::io(&place, e))?;
            remove_tree(&doomed)?;
        }
        Ok(())
    }
}

/// A checkpoint that is being written.
#[must_use = "a checkpoint that is not committed is removed"]
pub struct PendingCheckpoint<'a> {
    store: &'a CheckpointStore,
    step: u64,
    path: PathBuf,
    committed: bool,
}

impl PendingCheckpoint<'_> {
    /// Where the model directory's files go (config.json, model.safetensors, tokenizer files).
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the trainer's own state goes: `path()/trainer`, which exists already.
    pub fn trainer_path(&self) -> PathBuf {
        self.path.join("trainer")
    }

    /// Syncs every file, gives the directory its final name, swaps `latest`, prunes. Returns the final path.
    /// On an error (full disk) nothing under a final name has changed.
    pub fn commit(mut self, score: Option<CheckpointScore>) -> Result<PathBuf> {
        // JSON has no NaN: a checkpoint without a usable score is kept by its age alone.
        let marker = Marker { step: self.step, score: score.filter(|s| s.value.is_finite()) };
        let marker_path = self.trainer_path().join("checkpoint.json");
        let bytes = serde_json::to_vec_pretty(&marker)
            .map_err(|e| Error::Runtime(format!("{}: {e}", marker_path.display())))?;
        sync_tree(&self.path)?;
        atomic_file::write(&marker_path, &bytes)?;
        atomic_file::sync_dir(&self.path)?;

        let store = self.store;
        let place = store.dir.join(directory_name(self.step));
        let replaced = store.dir.join(format!("{REPLACED}{}", directory_name(self.step)));
        if place.exists() {
            remove_tree(&replaced)?;
            fs::rename(&place, &replaced).map_err(|e| Error::io(&place, e))?;
        }
        fs::rename(&self.path, &place).map_err(|e| Error::io(&place, e))?;
        self.committed = true;
        atomic_file::sync_dir(&store.dir)?;
        store.point_latest_at(self.step)?;
        remove_tree(&replaced)?;
        store.prune()?;
        Ok(place)
    }
}

impl Drop for PendingCheckpoint<'_> {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing reads this name; if it cannot be removed now, the next `open` does it.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// The newest complete checkpoint of a run directory, without opening a store (reads only): step and path.
pub fn latest_complete(run_dir: &Path) -> Result<Option<(u64, PathBuf)>> {
    Ok(complete_checkpoints(run_dir)?.pop().map(|(step, path, _)| (step, path)))
}

/// Removes what a dead process left under names that begin with a dot, and puts back a checkpoint that it was
/// replacing. Only the process that holds the run directory's lock may call this.
pub fn clean_leftovers(run_dir: &Path) -> Result<()> {
    let dir = run_dir.join("checkpoints");
    if !dir.exists() {
        return Ok(());
    }
    for name in names_in(&dir)? {
        let path = dir.join(&name);
        if let Some(original) = name.strip_prefix(REPLACED) {
            let place = dir.join(original);
            if place.exists() {
                remove_tree(&path)?;
            } else {
                // Died between the two renames of a replacement: the old one is still the complete one.
                fs::rename(&path, &place).map_err(|e| Error::io(&path, e))?;
            }
        } else if name.starts_with(WRITING) || name.starts_with(REMOVING) {
            remove_tree(&path)?;
        }
    }
    Ok(())
}

type Found = (u64, PathBuf, Option<CheckpointScore>);

/// All complete checkpoints, oldest first. A directory whose marker is missing or names another step is not one.
fn complete_checkpoints(run_dir: &Path) -> Result<Vec<Found>> {
    let dir = run_dir.join("checkpoints");
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for name in names_in(&dir)? {
        let Some(step) = name.strip_prefix("step_").and_then(|digits| digits.parse::<u64>().ok()) else {
            continue;
        };
        let path = dir.join(&name);
        let marker = fs::read(path.join("trainer").join("checkpoint.json"))
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Marker>(&bytes).ok());
        if let Some(marker) = marker.filter(|m| m.step == step) {
            found.push((step, path, marker.score));
        }
    }
    found.sort_by_key(|(step, ..)| *step);
    Ok(found)
}

/// `all` is sorted by step.
fn steps_to_keep(all: &[Found], retention: Retention) -> Vec<u64> {
    let last = all.iter().rev().take(retention.keep_last.max(1)).map(|(step, ..)| *step);
    let mut scored: Vec<(f64, u64)> =
        all.iter().filter_map(|(step, _, score)| score.as_ref().map(|s| (s.value, *step))).collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
    last.chain(scored.into_iter().take(retention.keep_best).map(|(_, step)| step)).collect()
}

fn directory_name(step: u64) -> String {
    format!("step_{step:06}")
}

fn names_in(dir: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(dir).map_err(|e| Error::io(dir, e))?;
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| Error::io(dir, e))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

fn sync_tree(dir: &Path) -> Result<()> {
    for name in names_in(dir)? {
        let path = dir.join(name);
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            File::open(&path).and_then(|file| file.sync_all()).map_err(|e| Error::io(&path, e))?;
        }
    }
    atomic_file::sync_dir(dir)
}

fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path, e)),
        _ => Ok(()),
    }
}
