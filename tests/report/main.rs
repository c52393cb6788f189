//! `temper report`: what is on the page, that it is true, that nothing in it runs or is loaded; its figures as files; and
//! what other tools are given of a run (TensorBoard, Weights & Biases).
#![allow(clippy::unwrap_used)]

mod browser;
mod page;
mod python;
mod runs;

use std::path::Path;
use std::process::{Command, Output};

pub fn temper(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_temper")).args(args).env("OMP_WAIT_POLICY", "PASSIVE").output().unwrap()
}

/// Runs to the end, which must be a success; stdout.
pub fn succeed(args: &[&str]) -> String {
    let output = temper(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The page of what is in `runs`, written beside it.
pub fn page_of(runs: &Path) -> String {
    let page = runs.with_extension("html");
    succeed(&["report", text(runs), "-o", text(&page)]);
    std::fs::read_to_string(page).unwrap()
}
