//! Fuzz targets for the readers of files that others made: safetensors and YAML configurations.
//!
//! Good files are damaged at random; a reader must answer with a value that is sound, or with one line of
//! `Error::Input`, and never panic. Proptest shrinks what it finds. A short while by default; as long as wanted with
//! `PROPTEST_CASES=10000000 cargo test --release --test fuzz`.
#![allow(clippy::unwrap_used)]

mod config;
mod damage;
mod safetensors;

/// What every reader owes its user for a bad file.
fn assert_one_input_line(error: &temper::Error, input: &[u8]) {
    let text = error.to_string();
    let shown = || String::from_utf8_lossy(input).into_owned();
    assert!(matches!(error, temper::Error::Input(_)), "not the input's fault: {text}\n{}", shown());
    assert!(!text.is_empty() && !text.contains('\n'), "expected one line: {text:?}\n{}", shown());
}
