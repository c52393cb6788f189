//! Files that users bring: models, tokenizers, questions. What is sound is read exactly; what is broken is one
//! line and exit code 2, and nothing is written.
#![allow(clippy::unwrap_used)]

mod broken_files;
mod model_config;
mod model_weights;
mod packed;
mod packed_input;
mod quantize;
mod questions;
mod tokenizers;
mod validate;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use temper::model::checkpoint::{StoredDtype, TensorSpec, write_model_dir};
use temper::model::config::Qwen2Config;

/// Test data outside the repository; `None` (printed) where it is absent.
pub fn shared(relative: &str) -> Option<PathBuf> {
    let root = std::env::var_os("TEMPER_SHARED")
        .map(PathBuf::from)
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join("shared"));
    let path = root.join(relative);
    if !path.exists() {
        println!("skipped: {} is absent", path.display());
        return None;
    }
    Some(path)
}

/// A file of tests/files/golden.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join("files").join("golden").join(name)
}

pub fn temper(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_temper")).args(args).output().unwrap()
}

/// stdout of a command that must succeed.
pub fn stdout_of(args: &[&str]) -> String {
    let output = temper(args);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{args:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// The one stderr line of a command that must refuse its input.
pub fn refusal_of(args: &[&str]) -> String {
    let output = temper(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{args:?}");
    stderr
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Deterministic values of mixed size for parameter `index`.
pub fn values(index: usize, count: usize) -> Vec<f32> {
    let mut state = 0x9E37_79B9u32.wrapping_mul(index as u32 + 1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state as f32 / u32::MAX as f32 - 0.5) * 0.2
    };
    (0..count).map(|_| next()).collect()
}

/// Writes a complete model of `config` with f32 weights into the existing directory `dir`.
pub fn write_model(dir: &Path, config: &Qwen2Config) {
    let specs: Vec<TensorSpec> =
        config.parameter_shapes().iter().map(|(name, shape)| TensorSpec::new(name, StoredDtype::F32, shape)).collect();
    write_model_dir(dir, config, None, &specs, |index, sink| {
        let count = specs[index].shape.iter().product();
        let bytes: Vec<u8> = values(index, count).iter().flat_map(|v| v.to_le_bytes()).collect();
        sink.write(&bytes)
    })
    .unwrap();
}

/// A small model directory.
pub fn tiny_model() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let config = Qwen2Config { num_hidden_layers: 2, ..Qwen2Config::preset("tiny-4x64").unwrap() };
    write_model(dir.path(), &config);
    dir
}

/// Names in a directory, sorted.
pub fn listing(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
