use std::fs;
use std::path::Path;

use temper::run::checkpoints::{CheckpointScore, CheckpointStore, Retention};

const KEEP_ALL: Retention = Retention { keep_last: 100, keep_best: 0 };

fn score(value: f64) -> Option<CheckpointScore> {
    Some(CheckpointScore { metric: "val/acc_noisy".to_string(), value })
}

fn save(store: &CheckpointStore, step: u64, value: f64) {
    let pending = store.begin(step).unwrap();
    fs::write(pending.path().join("model.safetensors"), step.to_string()).unwrap();
    fs::write(pending.trainer_path().join("state.bin"), "s").unwrap();
    pending.commit(score(value)).unwrap();
}

fn kept(run: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(run.join("checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn latest_points_at_the_newest_complete_one() {
    let run = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(run.path(), KEEP_ALL).unwrap();
    assert_eq!(store.latest_complete().unwrap(), None);
    save(&store, 58, 0.5);
    save(&store, 116, 0.4);
    assert_eq!(fs::read_link(run.path().join("latest")).unwrap(), Path::new("checkpoints/step_000116"));
    assert_eq!(fs::read_to_string(run.path().join("latest/model.safetensors")).unwrap(), "116");
    let (step, path) = store.latest_complete().unwrap().unwrap();
    assert_eq!(step, 116);
    assert!(path.join("trainer/state.bin").exists());
}

#[test]
fn an_abandoned_checkpoint_leaves_nothing() {
    let run = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(run.path(), KEEP_ALL).unwrap();
    drop(store.begin(5).unwrap());
    assert!(kept(run.path()).is_empty());
}

#[test]
fn what_a_killed_process_left_is_cleaned() {
    let run = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(run.path(), KEEP_ALL).unwrap();
    save(&store, 1, 0.1);
    save(&store, 2, 0.2);
    let dir = run.path().join("checkpoints");
    // Killed while writing step 3, while deleting an old one, between the renames of a replaced step 2, and before
    // `latest` was swapped; and a final name whose marker is missing (copied by hand, half).
    std::mem::forget(store.begin(3).unwrap());
    fs::create_dir(dir.join(".removing_step_000000")).unwrap();
    fs::rename(dir.join("step_000002"), dir.join(".replaced_step_000002")).unwrap();
    fs::create_dir_all(dir.join("step_000009/trainer")).unwrap();
    fs::remove_file(run.path().join("latest")).unwrap();
    let store = CheckpointStore::open(run.path(), KEEP_ALL).unwrap();
    assert_eq!(kept(run.path()), ["step_000001", "step_000002", "step_000009"]);
    assert_eq!(store.latest_complete().unwrap().unwrap().0, 2);
    assert_eq!(fs::read_link(run.path().join("latest")).unwrap(), Path::new("checkpoints/step_000002"));
}

#[test]
fn the_last_and_the_best_stay() {
    let run = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(run.path(), Retention { keep_last: 2, keep_best: 1 }).unwrap();
    for (step, value) in [(1, 0.2), (2, 0.9), (3, f64::NAN), (4, 0.9), (5, 0.1), (6, 0.3)] {
        save(&store, step, value);
    }
    // 4 ties with 2 and is later; 5 and 6 are the last two.
    assert_eq!(kept(run.path()), ["step_000004", "step_000005", "step_000006"]);
    // Whoever keeps none still keeps what resume needs.
    let store = CheckpointStore::open(run.path(), Retention { keep_last: 0, keep_best: 0 }).unwrap();
    save(&store, 7, 0.0);
    assert_eq!(kept(run.path()), ["step_000007"]);
}

#[test]
fn a_step_can_be_written_again() {
    let run = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(run.path(), KEEP_ALL).unwrap();
    save(&store, 4, 0.1);
    let pending = store.begin(4).unwrap();
    fs::write(pending.path().join("model.safetensors"), "again").unwrap();
    pending.commit(None).unwrap();
    assert_eq!(kept(run.path()), ["step_000004"]);
    assert_eq!(fs::read_to_string(run.path().join("latest/model.safetensors")).unwrap(), "again");
}
