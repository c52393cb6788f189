use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use temper::Result;
use temper::run::checkpoints::{CheckpointStore, Retention};
use temper::run::directory::{RunDir, RunSpec, Start};
use temper::run::jsonl::JsonlWriter;

fn spec(root: &Path) -> RunSpec<'_> {
    RunSpec {
        root,
        name: "e5c",
        config_hash: "a1b2c3d4",
        seed: 7,
        inputs: &[],
        config_yaml: "name: e5c\n",
        resume: false,
        device: "cpu",
        threads: 2,
        libtorch_version: Some("2.11.0".to_string()),
        noise_version: 1,
    }
}

fn error_of(result: Result<RunDir>) -> String {
    let error = result.err().unwrap();
    assert_eq!(error.exit_code(), 2, "{error}");
    assert!(!error.to_string().contains('\n'), "{error}");
    error.to_string()
}

#[test]
fn a_fresh_start_records_what_it_is() {
    let root = tempfile::tempdir().unwrap();
    let run = RunDir::open(&spec(root.path())).unwrap();
    assert_eq!(run.path(), root.path().join("e5c-a1b2c3d4-s7"));
    assert_eq!(*run.start(), Start::Fresh);
    assert_eq!(fs::read_to_string(run.file("config.yaml")).unwrap(), "name: e5c\n");
    let json: Value = serde_json::from_slice(&fs::read(run.file("run.json")).unwrap()).unwrap();
    for (key, value) in
        [("config_hash", json!("a1b2c3d4")), ("seed", json!(7)), ("threads", json!(2)), ("noise_version", json!(1))]
    {
        assert_eq!(json[key], value, "{key}");
    }
    assert!(json["time_utc"].as_str().unwrap().ends_with('Z'));
}

#[test]
fn two_processes_cannot_write_one_run() {
    let root = tempfile::tempdir().unwrap();
    let first = RunDir::open(&spec(root.path())).unwrap();
    let resume = RunSpec { resume: true, ..spec(root.path()) };
    assert!(error_of(RunDir::open(&resume)).contains("another process"));
    drop(first);
    RunDir::open(&resume).unwrap();
}

#[test]
fn a_second_start_needs_resume() {
    let root = tempfile::tempdir().unwrap();
    drop(RunDir::open(&spec(root.path())).unwrap());
    assert!(error_of(RunDir::open(&spec(root.path()))).contains("--resume"));
}

#[test]
fn a_directory_of_something_else_is_refused_and_untouched() {
    let root = tempfile::tempdir().unwrap();
    let place = root.path().join("e5c-a1b2c3d4-s7");
    // Somebody's files.
    fs::create_dir(&place).unwrap();
    fs::write(place.join("thesis.txt"), "x").unwrap();
    assert!(error_of(RunDir::open(&spec(root.path()))).contains("thesis.txt"));
    assert_eq!(fs::read_dir(&place).unwrap().count(), 1);
    // A run of another configuration that was renamed.
    let other = RunSpec { config_hash: "ffff0000", ..spec(root.path()) };
    let other_place = RunDir::open(&other).unwrap().path().to_path_buf();
    fs::remove_dir_all(&place).unwrap();
    fs::rename(other_place, &place).unwrap();
    for resume in [false, true] {
        let message = error_of(RunDir::open(&RunSpec { resume, ..spec(root.path()) }));
        assert!(message.contains("ffff0000") && message.contains("a1b2c3d4"), "{message}");
    }
    // A file in the place of the directory, and a name that is no directory name.
    fs::remove_dir_all(&place).unwrap();
    fs::write(&place, "x").unwrap();
    error_of(RunDir::open(&spec(root.path())));
    for name in ["", "..", "a/b", "a b"] {
        error_of(RunDir::open(&RunSpec { name, ..spec(root.path()) }));
    }
}

#[test]
fn a_start_that_died_while_setting_up_can_be_repeated() {
    let root = tempfile::tempdir().unwrap();
    let place = root.path().join("e5c-a1b2c3d4-s7");
    fs::create_dir(&place).unwrap();
    fs::write(place.join(".lock"), "").unwrap();
    fs::write(place.join(".run.json.tmp"), "{").unwrap();
    fs::write(place.join("config.yaml"), "na").unwrap();
    RunDir::open(&spec(root.path())).unwrap();
}

#[test]
fn resume_cuts_every_jsonl_file_back_to_the_checkpoint() {
    let root = tempfile::tempdir().unwrap();
    let resume = RunSpec { resume: true, ..spec(root.path()) };
    let write = |run: &RunDir, steps: std::ops::Range<u64>| {
        for name in ["metrics.jsonl", "injection.jsonl"] {
            let mut writer = JsonlWriter::open(&run.file(name)).unwrap();
            for step in steps.clone() {
                writer.write(&json!({"step": step})).unwrap();
            }
        }
    };
    // Killed before any checkpoint: from the beginning, with empty files.
    let run = RunDir::open(&spec(root.path())).unwrap();
    write(&run, 0..3);
    drop(run);
    let run = RunDir::open(&resume).unwrap();
    assert_eq!(*run.start(), Start::Fresh);
    assert_eq!(fs::read(run.file("metrics.jsonl")).unwrap(), b"");
    // Killed at step 4 with a checkpoint of step 2.
    write(&run, 0..3);
    let store = CheckpointStore::open(run.path(), Retention { keep_last: 1, keep_best: 0 }).unwrap();
    store.begin(2).unwrap().commit(None).unwrap();
    write(&run, 3..5);
    drop(run);
    let run = RunDir::open(&RunSpec { threads: 8, ..resume }).unwrap();
    assert_eq!(run.start().step(), 2);
    for name in ["metrics.jsonl", "injection.jsonl"] {
        assert_eq!(fs::read_to_string(run.file(name)).unwrap(), "{\"step\":0}\n{\"step\":1}\n{\"step\":2}\n");
    }
    assert_eq!(run.warnings().len(), 1);
    assert!(run.warnings()[0].contains("threads was 2, is 8"), "{:?}", run.warnings());
    let json: Value = serde_json::from_slice(&fs::read(run.file("run.json")).unwrap()).unwrap();
    assert_eq!(json["resumes"].as_array().unwrap().len(), 2);
    assert_eq!(json["resumes"][1]["from_step"], 2);
}

#[test]
fn other_content_under_the_same_name_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let inputs = |digest: &str| [("data.train".to_string(), digest.to_string())];
    drop(RunDir::open(&RunSpec { inputs: &inputs("aa"), ..spec(root.path()) }).unwrap());
    let resume = RunSpec { resume: true, ..spec(root.path()) };
    let message = error_of(RunDir::open(&RunSpec { inputs: &inputs("bb"), ..resume }));
    assert!(message.contains("data.train: found other content"), "{message}");
    RunDir::open(&RunSpec { inputs: &inputs("aa"), resume: true, ..spec(root.path()) }).unwrap();
}
