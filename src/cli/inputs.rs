//! Digests of what a run reads, so that it is not resumed on other data or weights under the same names.

use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::config::Config;
use crate::data::section::DataKind;
use crate::model::checkpoint::resolve_model_path;
use crate::{Error, Result};

/// Of a weights file only the size and this much from its start are read: the header and the first tensors.
const WEIGHTS_BYTES: u64 = 1 << 20;

/// (`model` | `tokenizer` | `data.train` | `data.val`, short digest).
pub fn digests(config: &Config, tokenizer_dir: &Path) -> Result<Vec<(String, String)>> {
    let mut all = vec![("tokenizer".to_string(), of_files(&[tokenizer_dir.join("tokenizer.json")], u64::MAX)?)];
    if let Some(path) = &config.model.path {
        all.push(("model".to_string(), of_files(&model_files(&resolve_model_path(path)?)?, WEIGHTS_BYTES)?));
    }
    if config.data.kind != DataKind::Generated {
        for (key, path) in [("data.train", &config.data.train), ("data.val", &config.data.val)] {
            if let Some(path) = path {
                all.push((key.to_string(), of_files(&[PathBuf::from(path)], u64::MAX)?));
            }
        }
    }
    Ok(all)
}

/// config.json and the weights, in the order of their names.
fn model_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))?;
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.ends_with("config.json") || path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    files.sort();
    Ok(files)
}

fn of_files(paths: &[PathBuf], limit: u64) -> Result<String> {
    let mut digest = Sha256::new();
    for path in paths {
        let file = std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
        digest.update(file.metadata().map_err(|e| Error::io(path, e))?.len().to_le_bytes());
        let mut bytes = Vec::new();
        file.take(limit).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
        digest.update(&bytes);
    }
    Ok(digest.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect())
}
