use std::fs;
use std::path::Path;

use serde_json::json;
use temper::run::jsonl::{JsonlWriter, truncate_to_step};

fn rows(path: &Path, steps: std::ops::RangeInclusive<u64>) {
    let mut writer = JsonlWriter::open(path).unwrap();
    for step in steps {
        writer
            .write_rows(&[
                json!({"step": step, "kind": "train", "x": 0.1 + step as f64}),
                json!({"step": step, "kind": "val"}),
            ])
            .unwrap();
    }
}

#[test]
fn cut_and_continued_equals_uninterrupted() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, cut) = (dir.path().join("whole.jsonl"), dir.path().join("cut.jsonl"));
    rows(&whole, 0..=9);
    let expected = fs::read(&whole).unwrap();
    // Cut the file at every byte, as a kill could, then resume from every checkpoint that could exist by then.
    for length in 0..=expected.len() {
        let lines = expected[..length].iter().filter(|b| **b == b'\n').count() as u64;
        for checkpoint in (0..lines / 2).rev().take(2) {
            fs::write(&cut, &expected[..length]).unwrap();
            truncate_to_step(&cut, Some(checkpoint)).unwrap();
            rows(&cut, checkpoint + 1..=9);
            assert_eq!(fs::read(&cut).unwrap(), expected, "cut at byte {length}, resumed after step {checkpoint}");
        }
    }
}

#[test]
fn no_checkpoint_cuts_to_nothing_and_a_missing_file_stays_missing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    truncate_to_step(&path, None).unwrap();
    assert!(!path.exists());
    rows(&path, 0..=3);
    truncate_to_step(&path, None).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"");
}

#[test]
fn a_zeroed_tail_is_dropped_but_a_damaged_middle_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    fs::write(&path, b"{\"step\":1}\n\0\0\0\0\n").unwrap();
    truncate_to_step(&path, Some(5)).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"{\"step\":1}\n");
    fs::write(&path, b"{\"step\":1}\nedited\n{\"step\":2}\n").unwrap();
    let error = truncate_to_step(&path, Some(5)).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("line 2"), "{error}");
}

#[test]
fn a_full_disk_is_a_typed_error() {
    let mut writer = JsonlWriter::open(Path::new("/dev/full")).unwrap();
    let error = writer.write(&json!({"step": 1})).unwrap_err();
    assert_eq!(error.exit_code(), 1);
    assert!(!error.to_string().contains('\n') && error.to_string().contains("/dev/full"), "{error}");
}
