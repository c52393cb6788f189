//! One tiny trained model for all tests, the configuration that trains it further in a second, and ways to call temper.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use temper::data::generated::{self, Task};
use temper::model::config::Qwen2Config;
use temper::model::load::save_model;
use temper::model::section::Dtype;
use temper::model::tokenizer::Tokenizer;
use temper::rl::supervised::{self, SupervisedRecipe};

/// A model directory of preset tiny-4x64 after a few supervised steps: some of its answers are right and some are not,
/// so that advantages and gradients are not 0.
pub fn model() -> &'static Path {
    static MODEL: OnceLock<PathBuf> = OnceLock::new();
    MODEL.get_or_init(|| {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("end_to_end_model");
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        let config = Qwen2Config::preset("tiny-4x64").unwrap();
        generated::write_tokenizer(&dir).unwrap();
        let tokenizer = Tokenizer::from_dir(&dir).unwrap().with_model_vocab_size(config.vocab_size).unwrap();
        let recipe = SupervisedRecipe { steps: 120, lr: 4e-3, batch: 16, warmup_steps: 10, seed: 0 };
        let task = Task::new(0);
        let model = supervised::train(config, &task, &tokenizer, &recipe, tch::Device::Cpu, |_, _| {}).unwrap();
        save_model(&model, Dtype::F32, None, &dir).unwrap();
        dir
    })
}

/// configs/debug.yaml on [`model`] with `lines` of YAML added, as `name.yaml` in `dir`.
pub fn config(dir: &Path, name: &str, lines: &str) -> PathBuf {
    let debug = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs").join("debug.yaml");
    let (debug, model) = (debug.display(), model().display());
    let path = dir.join(format!("{name}.yaml"));
    // A section that `lines` names replaces none of these keys: the file in between has them.
    std::fs::write(
        dir.join("base.yaml"),
        format!("extends: {debug}\nmodel: {{path: {model}, preset: null}}\ntrainer: {{threads: 1}}\n"),
    )
    .unwrap();
    std::fs::write(&path, format!("extends: base.yaml\nname: {name}\n{lines}\n")).unwrap();
    path
}

pub fn temper<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_temper"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.env("OMP_WAIT_POLICY", "PASSIVE");
    command
}

pub fn run<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Output {
    temper(args).output().unwrap()
}

pub fn stderr_of(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Runs to the end, which must be a success; stdout.
pub fn succeed<S: AsRef<std::ffi::OsStr> + std::fmt::Debug>(args: &[S]) -> String {
    let output = run(args);
    assert!(output.status.success(), "{args:?}: {:?}\n{}", output.status, stderr_of(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// `train CONFIG --out OUT --device cpu`, to which more can be added.
pub fn train_args(config: &Path, out: &Path) -> Vec<String> {
    ["train", config.to_str().unwrap(), "--out", out.to_str().unwrap(), "--device", "cpu"].map(String::from).to_vec()
}

/// The one run directory in `out`.
pub fn run_dir(out: &Path) -> PathBuf {
    let names = names(out);
    assert_eq!(names.len(), 1, "{names:?}");
    out.join(&names[0])
}

/// Names in a directory, sorted; none where there is no directory.
pub fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Every file below `dir`, as paths relative to it, sorted.
pub fn files(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for name in names(dir) {
        let path = dir.join(&name);
        match path.is_dir() {
            true => found.extend(files(&path).into_iter().map(|below| format!("{name}/{below}"))),
            false => found.push(name),
        }
    }
    found
}

/// Rows of a .jsonl file.
pub fn rows(path: &Path) -> Vec<serde_json::Value> {
    std::fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Waits (up to two minutes) until `ready`.
pub fn wait_until(what: &str, mut ready: impl FnMut() -> bool) {
    for _ in 0..120_000 {
        if ready() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("waited in vain: {what}");
}

/// What a run leaves that depends on the configuration and seed alone must be the same, byte for byte.
pub fn assert_same_run(expected: &Path, found: &Path) {
    for file in ["metrics.jsonl", "injection.jsonl", "samples.jsonl", "config.yaml"] {
        assert_same_file(expected, found, file);
    }
    assert_eq!(std::fs::read_link(expected.join("latest")).unwrap(), std::fs::read_link(found.join("latest")).unwrap());
    assert_eq!(files(&expected.join("checkpoints")), files(&found.join("checkpoints")));
    for file in files(&expected.join("checkpoints")) {
        assert_same_file(&expected.join("checkpoints"), &found.join("checkpoints"), &file);
    }
}

fn assert_same_file(expected: &Path, found: &Path, file: &str) {
    let read = |dir: &Path| std::fs::read(dir.join(file)).unwrap();
    let (expected, found) = (read(expected), read(found));
    if expected != found {
        let at = expected.iter().zip(&found).position(|(a, b)| a != b).unwrap_or(expected.len().min(found.len()));
        let shown = |bytes: &[u8]| {
            let (from, to) = (at.saturating_sub(60).min(bytes.len()), (at + 60).min(bytes.len()));
            String::from_utf8_lossy(&bytes[from..to]).into_owned()
        };
        panic!(
            "{file}: {} bytes and {}, first difference at {at}:\n{}\n{}",
            expected.len(),
            found.len(),
            shown(&expected),
            shown(&found)
        );
    }
}
