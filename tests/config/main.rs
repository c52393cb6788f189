//! Configuration: what is accepted, what is refused and how, what it resolves to.
#![allow(clippy::unwrap_used)]

mod bad_input;
mod explained;
mod plan_command;
mod registry;
mod sources;

use std::path::{Path, PathBuf};

use temper::config::{self, Config};

/// A file of configs/.
fn registry_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("configs").join(name)
}

fn load(name: &str) -> Config {
    config::load(&registry_file(name), &[]).unwrap()
}

/// Writes `text` as `name` into `dir`.
fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

/// A configuration that is as short as it can be, with `text` added.
fn load_text(text: &str) -> Result<Config, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "x.yaml", &format!("name: x\nmodel: {{preset: qwen2.5-1.5b}}\n{text}\n"));
    config::load(&path, &[]).map_err(|e| {
        assert_eq!(e.exit_code(), 2, "{e}");
        e.to_string().replace(&format!("{}/", dir.path().display()), "")
    })
}
