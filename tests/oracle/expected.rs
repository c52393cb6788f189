//! What transformers computed (see make_models.py), and how close is close enough.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use serde::Deserialize;

/// Largest difference of a log-probability computed in f32.
pub const LOGPROB_TOLERANCE: f64 = 1e-3;

#[derive(Deserialize)]
pub struct Expected {
    #[serde(skip)]
    pub root: PathBuf,
    pub models: Vec<Model>,
}

#[derive(Deserialize)]
pub struct Model {
    pub name: String,
    pub scores: Vec<Score>,
    pub generations: Vec<Generation>,
    pub gradient: Gradient,
}

/// `logprobs[i]` is of `ids[i + 1]` given `ids[0..=i]`.
#[derive(Deserialize)]
pub struct Score {
    pub ids: Vec<u32>,
    pub logprobs: Vec<f64>,
}

#[derive(Deserialize)]
pub struct Generation {
    pub ids: Vec<u32>,
    pub max_new_tokens: usize,
    pub new_ids: Vec<u32>,
}

/// Gradient of the mean negative log-probability of `ids[1..]`, in `file`.
#[derive(Deserialize)]
pub struct Gradient {
    pub ids: Vec<u32>,
    pub loss: f64,
    pub file: String,
}

impl Model {}

impl Expected {
    pub fn dir(&self, model: &Model) -> PathBuf {
        self.root.join(&model.name)
    }
}

/// The random models and their expected values, made once per test process; None where Python lacks the means.
pub fn expected() -> Option<&'static Expected> {
    static EXPECTED: OnceLock<Option<Expected>> = OnceLock::new();
    let made = EXPECTED.get_or_init(make_models).as_ref();
    if made.is_none() {
        println!("skipped: no Python with transformers (see the first such line); set TEMPER_PYTHON");
    }
    made
}

fn make_models() -> Option<Expected> {
    if let Err(reason) = python_has("torch, transformers, safetensors") {
        println!("skipped: {reason}");
        return None;
    }
    let root = scratch("oracle_models");
    let output = python("make_models.py", &[root.to_str().unwrap()]);
    assert!(output.status.success(), "make_models.py failed: {}", String::from_utf8_lossy(&output.stderr));
    let text = std::fs::read_to_string(root.join("expected.json")).unwrap();
    let mut expected: Expected = serde_json::from_str(&text).unwrap();
    expected.root = root;
    Some(expected)
}

/// Runs one of this directory's scripts.
pub fn python(script: &str, args: &[&str]) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle").join(script);
    python_command().arg(script).args(args).output().unwrap()
}

/// Whether the oracle's Python can import `modules` (separated by commas); else why not.
pub fn python_has(modules: &str) -> Result<(), String> {
    let check = python_command().args(["-c", &format!("import {modules}")]).output();
    match check {
        Err(error) => Err(format!("no Python with {modules} ({error}); set TEMPER_PYTHON")),
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr).trim().to_string();
            let reason = text.lines().last().unwrap_or("").to_string();
            Err(format!("no Python with {modules} ({reason}); set TEMPER_PYTHON"))
        }
    }
}

pub fn python_command() -> Command {
    let local = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python");
    let mut command = Command::new(std::env::var_os("TEMPER_PYTHON").unwrap_or(local.into()));
    // The Rust side's libtorch must not be mixed into Python's torch.
    command.env_remove("LD_LIBRARY_PATH").env("PYTHONDONTWRITEBYTECODE", "1");
    command
}

/// An empty directory under the build directory.
pub fn scratch(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// `stories260k_qwen2` and its greedy continuation of token 1; None where ../shared is absent.
pub fn stories() -> Option<(PathBuf, Vec<u32>)> {
    let shared = std::env::var_os("TEMPER_SHARED")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
    let dir = shared.join("fixtures/stories260k_qwen2");
    let Ok(text) = std::fs::read_to_string(dir.join("greedy_ids.txt")) else {
        println!("skipped: no {}; set TEMPER_SHARED", dir.display());
        return None;
    };
    let ids = text.split_whitespace().map(|i| i.parse().unwrap()).collect();
    Some((dir, ids))
}

/// Returns the largest difference.
pub fn assert_logprobs(got: &[f64], want: &[f64], tolerance: f64, what: &str) -> f64 {
    assert_eq!(got.len(), want.len(), "{what}: number of log-probs");
    let mut worst = 0f64;
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance, "{what}: log-prob {i} is {g}, transformers {w}");
        worst = worst.max((g - w).abs());
    }
    worst
}
