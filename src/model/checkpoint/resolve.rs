//! Where a model named on the command line or in YAML lies: a path, or a hub id in the local HF cache.

use std::path::{Path, PathBuf};

use crate::model::lora::ADAPTER_CONFIG;
use crate::{Result, bail_input};

/// A directory or file that exists, else the snapshot of a hub id (`Qwen/Qwen2.5-1.5B-Instruct`) in the local
/// HF cache: `$HF_HUB_CACHE`, `$HF_HOME/hub`, or `~/.cache/huggingface/hub`. Nothing is downloaded.
///
/// # Errors
/// `Error::Input` that prints the download command when a hub id is not in the cache.
pub fn resolve_model_path(name: &str) -> Result<PathBuf> {
    resolve_in(name, hub_cache().as_deref())
}

/// As [`resolve_model_path`], with the cache's directory given.
fn resolve_in(name: &str, cache: Option<&Path>) -> Result<PathBuf> {
    let path = Path::new(name);
    if path.exists() {
        return Ok(path.to_path_buf());
    }
    if !is_hub_id(name) {
        bail_input!("{name}: no such file or directory");
    }
    let repository = cache.map(|dir| dir.join(format!("models--{}", name.replace('/', "--"))));
    match repository.as_deref().and_then(newest_snapshot) {
        Some(snapshot) => Ok(snapshot),
        None => bail_input!(
            "{name}: no such directory, and not in the local HF cache{}; download it with: hf download {name}",
            cache.map(|dir| format!(" ({})", dir.display())).unwrap_or_default()
        ),
    }
}

/// `snapshots/<commit>` of `refs/main`.
fn newest_snapshot(repository: &Path) -> Option<PathBuf> {
    let commit = std::fs::read_to_string(repository.join("refs").join("main")).ok()?;
    let snapshot = repository.join("snapshots").join(commit.trim());
    let is_model = ["config.json", ADAPTER_CONFIG].iter().any(|file| snapshot.join(file).exists());
    is_model.then_some(snapshot)
}

/// `organisation/name` in the characters the hub allows; anything else can only be a path.
fn is_hub_id(name: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    name.split_once('/').is_some_and(|(organisation, model)| part(organisation) && part(model))
}

fn hub_cache() -> Option<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("HF_HUB_CACHE")
        .or_else(|| Some(var("HF_HOME")?.join("hub")))
        .or_else(|| Some(var("XDG_CACHE_HOME")?.join("huggingface").join("hub")))
        .or_else(|| Some(var("HOME")?.join(".cache").join("huggingface").join("hub")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_hub_id_is_the_snapshot_of_refs_main() {
        let cache = tempfile::tempdir().unwrap();
        let repository = cache.path().join("models--Org--Model-1.5B");
        let snapshot = repository.join("snapshots").join("abc123");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(repository.join("refs")).unwrap();
        std::fs::write(repository.join("refs").join("main"), "abc123\n").unwrap();
        let missing = resolve_in("Org/Model-1.5B", Some(cache.path())).unwrap_err();
        assert!(missing.to_string().ends_with("hf download Org/Model-1.5B"), "{missing}");
        std::fs::write(snapshot.join("config.json"), "{}").unwrap();
        assert_eq!(resolve_in("Org/Model-1.5B", Some(cache.path())).unwrap(), snapshot);
    }

    #[test]
    fn what_cannot_be_a_hub_id_is_a_missing_path() {
        for name in ["./models/a", "/models/a", "a", "a/b/c", "../a/b", "a//b", ""] {
            let error = resolve_in(name, None).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(!error.to_string().contains("hf download"), "{error}");
        }
    }
}
