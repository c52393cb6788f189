//! What other tools are given of a run: TensorBoard's own package reads what a training run wrote, and
//! scripts/wandb_sync.py sends a run's rows, once.
//!
//! Python: `$TEMPER_PYTHON`, else the venv that `scripts/bootstrap.sh --with-test-tools` makes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::runs::PLAIN;
use crate::{succeed, text};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// A Python that can import `modules`; None, and a line that says so, where there is none.
fn python(modules: &str) -> Option<String> {
    let python = std::env::var("TEMPER_PYTHON").unwrap_or_else(|_| format!("{ROOT}/.venv/bin/python"));
    let found = Command::new(&python).args(["-c", &format!("import {modules}")]).output();
    if found.is_ok_and(|output| output.status.success()) {
        return Some(python);
    }
    println!("skipped what Python reads: {python} cannot import {modules}");
    None
}

/// In the order of the file; a name may have two values at a step, one of training and one of validation.
type Scalars = BTreeMap<String, Vec<(u64, f32)>>;

#[test]
fn tensorboard_reads_every_scalar_of_a_training_run() {
    let Some(python) = python("tensorboard") else { return };
    let dir = tempfile::tempdir().unwrap();
    let config = format!("{ROOT}/configs/debug.yaml");
    succeed(&["train", &config, "--out", text(dir.path()), "--device", "cpu", "-q", "--set", "trainer.threads=1"]);
    let run = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
    let script = "import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
a = EventAccumulator(sys.argv[1], size_guidance={'scalars': 0}); a.Reload()
print(json.dumps({tag: [[e.step, e.value] for e in a.Scalars(tag)] for tag in a.Tags()['scalars']}))";
    let output = Command::new(python).args(["-c", script, text(&run.join("tb"))]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let read: Scalars = serde_json::from_slice(&output.stdout).unwrap();
    let mut expected = Scalars::new();
    for line in fs::read_to_string(run.join("metrics.jsonl")).unwrap().lines() {
        let row: Value = serde_json::from_str(line).unwrap();
        for (tag, value) in row.as_object().unwrap().iter().filter(|(tag, _)| *tag != "step") {
            if let Some(value) = value.as_f64() {
                let values = expected.entry(tag.clone()).or_default();
                values.push((row["step"].as_u64().unwrap(), value as f32));
            }
        }
    }
    assert_eq!(expected["reward/mean"].len(), 12);
    assert!(expected.keys().any(|tag| tag.starts_with("val/acc_")));
    assert_eq!(read, expected);
    // The run is a real one: its page has every part, too.
    let page = crate::page_of(dir.path());
    assert!(
        page.contains("agrees with the plan in all 12 steps") && page.contains("<figure id=\"layers_aqn_std_debug\"")
    );
}

/// Keeps what it is given, as one line of JSON for each call.
const FAKE_WANDB: &str = "import json, os
def keep(*what): open(os.environ['FAKE_WANDB_LOG'], 'a').write(json.dumps(what) + '\\n')
class Run:
    def log(self, values, step): keep('log', step, values)
    def finish(self): keep('finish')
def init(**settings): keep('init', settings); return Run()
";

fn sync(python: &str, fake: &Path, arguments: &[&str]) -> (Output, Vec<Value>) {
    let log = fake.join("log");
    let _ = fs::remove_file(&log);
    let output = Command::new(python)
        .arg(format!("{ROOT}/scripts/wandb_sync.py"))
        .args(arguments)
        .env("PYTHONPATH", fake)
        .env("FAKE_WANDB_LOG", &log)
        .output()
        .unwrap();
    let calls =
        fs::read_to_string(&log).unwrap_or_default().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    (output, calls)
}

#[test]
fn wandb_gets_every_row_once() {
    let Some(python) = python("yaml") else { return };
    let dir = tempfile::tempdir().unwrap();
    let fake = dir.path().join("fake");
    fs::create_dir(&fake).unwrap();
    fs::write(fake.join("wandb.py"), FAKE_WANDB).unwrap();
    let run: PathBuf = PLAIN.write(dir.path());
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();

    // A run that is being written: it holds its lock, and its newest step may lack its validation.
    let lock = fs::File::create(run.join(".lock")).unwrap();
    lock.lock().unwrap();
    let begun: String = metrics.lines().take(5).map(|line| format!("{line}\n")).collect();
    fs::write(run.join("metrics.jsonl"), format!("{begun}{{\"step\": 5, \"ki")).unwrap();
    let (output, calls) = sync(&python, &fake, &["--project", "p", "--offline", text(&run)]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let settings = &calls[0][1];
    assert_eq!(
        (&settings["project"], &settings["mode"], &settings["resume"]),
        (&json!("p"), &json!("offline"), &json!("allow"))
    );
    assert_eq!((&settings["name"], &settings["group"]), (&json!("pair-off-00000001-s0"), &json!("pair-off-00000001")));
    assert_eq!(settings["config"]["noisy_ops"]["error_scale"], 0.05);
    assert_eq!(steps(&calls), [0, 1, 2, 3]);
    let third = calls.iter().find(|call| call[1] == 3).unwrap();
    assert_eq!((&third[2]["entropy"], &third[2]["timing/step_s"]), (&json!(0.5), &json!(2.0)));
    assert!(third[2].get("kind").is_none());

    // Later it has ended: the rest, and nothing twice.
    drop(lock);
    fs::write(run.join("metrics.jsonl"), &metrics).unwrap();
    let (_, calls) = sync(&python, &fake, &[text(&run)]);
    assert_eq!(steps(&calls), [4, 5, 6, 7, 8]);
    assert_eq!(calls.iter().find(|call| call[1] == 8).unwrap()[2]["val/correct_clean"], 18);
    let (_, calls) = sync(&python, &fake, &[text(&run)]);
    assert!(calls.is_empty(), "{calls:?}");

    let (output, _) = sync(&python, &fake, &[text(dir.path())]);
    assert_line(&output, 2, "no run.json");
    fs::write(fake.join("wandb.py"), "raise ModuleNotFoundError('wandb')").unwrap();
    let (output, _) = sync(&python, &fake, &[text(&run)]);
    assert_line(&output, 1, "pip install wandb");
}

fn steps(calls: &[Value]) -> Vec<u64> {
    calls.iter().filter(|call| call[0] == "log").map(|call| call[1].as_u64().unwrap()).collect()
}

fn assert_line(output: &Output, code: i32, part: &str) {
    let line = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), line.lines().count()), (Some(code), 1), "{line}");
    assert!(line.contains(part), "{line}");
}
