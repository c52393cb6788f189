//! The event files, read by a second implementation: a parser of records and protobuf written from their descriptions,
//! and by the official package where a Python has it.

use std::fs;

use serde_json::json;
use temper::run::TensorBoard;

/// The payloads of the records of one file; lengths and checksums are checked.
fn records(bytes: &[u8]) -> Vec<Vec<u8>> {
    let masked = |data: &[u8]| {
        let crc = crc_bitwise(data);
        crc.rotate_right(15).wrapping_add(0xa282_ead8)
    };
    let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let (mut at, mut found) = (0, Vec::new());
    while at < bytes.len() {
        let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        assert_eq!(u32_at(at + 8), masked(&bytes[at..at + 8]));
        let data = &bytes[at + 12..at + 12 + length];
        assert_eq!(u32_at(at + 12 + length), masked(data));
        found.push(data.to_vec());
        at += 16 + length;
    }
    found
}

/// CRC-32C by its definition, one bit at a time.
fn crc_bitwise(data: &[u8]) -> u32 {
    !data.iter().fold(!0u32, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |c, _| (c >> 1) ^ (0x82f6_3b78 * (c & 1))))
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn rows_become_scalars_and_a_resume_purges() {
    let dir = tempfile::tempdir().unwrap();
    let row = json!({"step": 300, "kind": "train", "reward/mean": 0.5, "kl": null});
    TensorBoard::open(dir.path(), None).unwrap().row(300, row.as_object().unwrap()).unwrap();
    drop(TensorBoard::open(dir.path(), Some(58)).unwrap());
    let mut files: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    assert_eq!(files.len(), 2, "a resume begins a file of its own, even in the same second");

    let first = records(&fs::read(&files[0]).unwrap());
    assert!(contains(&first[0], b"\x1a\x0dbrain.Event:2"));
    // After the 9 bytes of wall_time: step 300, then summary { value { tag, simple_value 0.5 } } and nothing else.
    assert_eq!(first[1][9..], *b"\x10\xac\x02\x2a\x14\x0a\x12\x0a\x0breward/mean\x15\x00\x00\x00\x3f");
    let second = records(&fs::read(&files[1]).unwrap());
    assert_eq!(second[1][9..], [0x10, 59, 0x3a, 2, 0x08, 1]);
}

/// Needs a Python that has the tensorboard package: $TEMPER_PYTHON, or the venv that
/// `scripts/bootstrap.sh --with-test-tools` makes.
#[test]
fn the_official_package_reads_the_same_values() {
    let python = std::env::var("TEMPER_PYTHON")
        .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/.venv/bin/python").to_string());
    let run = |args: &[&str]| std::process::Command::new(&python).args(args).output();
    if !run(&["-c", "import tensorboard"]).is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: {python} has no tensorboard package");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let write = |resumed_after, steps: std::ops::RangeInclusive<u64>, offset: f64| {
        let mut board = TensorBoard::open(dir.path(), resumed_after).unwrap();
        for step in steps {
            let row = json!({"step": step, "reward/mean": step as f64 * 0.25 + offset});
            board.row(step, row.as_object().unwrap()).unwrap();
        }
    };
    write(None, 0..=1, 50.0); // killed before any checkpoint
    write(None, 1..=5, 100.0); // killed after step 5, with a checkpoint of step 3
    write(Some(3), 4..=6, 0.0);
    let script = "import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
a = EventAccumulator(sys.argv[1]); a.Reload()
print([(e.step, e.value) for e in a.Scalars('reward/mean')])";
    let output = run(&["-c", script, &dir.path().to_string_lossy()]).unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim(),
        "[(1, 100.25), (2, 100.5), (3, 100.75), (4, 1.0), (5, 1.25), (6, 1.5)]",
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
