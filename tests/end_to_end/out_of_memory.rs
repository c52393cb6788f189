//! Memory that really runs out, by a limit on the process: the micro-batch is halved, the update is done again, and the run is
//! the one that had the smaller micro-batch from the beginning, to rounding.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::Value;

use crate::support::{config, rows, run_dir, stderr_of, temper, train_args};

/// One step on 512 sequences, whose update needs a few hundred megabytes at once.
const LARGE: &str = "
data: {prompts_per_step: 64, generated: {train_problems: 64}}
rollout: {group_size: 8}
trainer: {epochs: 1, minibatch_prompts: 64, val_before_train: false, val_every: 0, save_every: 0}
reward: {mode: numeric}";
const COMPARED: [&str; 6] =
    ["loss/policy", "loss/kl", "grad_norm", "entropy", "reward/mean", "noisy_ops/measured_std_forward"];

/// Runs to the end; the largest address space that the process had, in KiB.
fn peak_kib(mut command: Command) -> u64 {
    let mut child = command.spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmPeak:"));
        peak = line.and_then(|l| l.trim().strip_suffix(" kB")?.parse().ok()).unwrap_or(peak);
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(child.wait().unwrap().success());
    peak
}

/// The command, in an address space of `limit` KiB.
fn limited(limit: u64, args: &[String]) -> Output {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("ulimit -v {limit}; exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_temper")]);
    command.args(args).output().unwrap()
}

/// Training of `config` into `out`, with `set`.
fn args_with(config: &Path, out: &Path, set: String) -> Vec<String> {
    [train_args(config, out), vec!["--set".to_string(), set]].concat()
}

/// KiB between what the one needs and what the other does, which is much more.
fn limit_between(small: &[String], large: &[String]) -> u64 {
    let (small, large) = (peak_kib(temper(small)), peak_kib(temper(large)));
    assert!(large > small + 100_000, "{large} KiB, {small} KiB: what is halved must need the memory");
    (small + large) / 2
}

/// A validation that decodes too many at once decodes half of them, from then on, and its answers are the same.
#[test]
fn halved_validations_give_the_same_answers() {
    let dir = tempfile::tempdir().unwrap();
    let lines = "
data: {prompts_per_step: 4, generated: {train_problems: 4, val_problems: 4096}}
trainer: {epochs: 1, minibatch_prompts: 4, val_before_train: true, val_every: 1, save_every: 0}
reward: {mode: numeric}";
    let config = config(dir.path(), "validated", lines);
    let args = |name: &str, at_once: usize| {
        args_with(&config, &dir.path().join(name), format!("trainer.val_batch_size={at_once}"))
    };
    let limit = limit_between(&args("small", 512), &args("large", 4096));
    let output = limited(limit, &args("limited", 4096));
    let text = stderr_of(&output);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("out of memory: ") && text.contains("as with a smaller trainer.val_batch_size"), "{text}");
    assert_eq!(text.matches("out of memory: ").count(), text.matches("fewer than").count());
    let validations = |name: &str| {
        let all = rows(&run_dir(&dir.path().join(name)).join("metrics.jsonl")).into_iter();
        all.filter(|row| row["kind"] == "val").collect::<Vec<Value>>()
    };
    assert_eq!(validations("small").len(), 2);
    assert_eq!(validations("limited"), validations("small"));
}

fn first_row(out: &Path) -> Value {
    rows(&run_dir(out).join("metrics.jsonl")).into_iter().find(|row| row["kind"] == "train").unwrap()
}

#[test]
fn halved_micro_batches_give_the_same_step() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), "large", LARGE);
    let args = |name: &str, sequences: usize| {
        args_with(&config, &dir.path().join(name), format!("trainer.microbatch_sequences={sequences}"))
    };
    let limit = limit_between(&args("small", 128), &args("large", 512));
    let output = limited(limit, &args("limited", 512));
    let text = stderr_of(&output);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("out of memory: ") && text.contains("as with trainer.microbatch_sequences: 256"), "{text}");
    let (got, want) = (first_row(&dir.path().join("limited")), first_row(&dir.path().join("small")));
    for key in COMPARED {
        let (a, b) = (got[key].as_f64().unwrap(), want[key].as_f64().unwrap());
        assert!((a - b).abs() <= 1e-5 * b.abs().max(1.0), "{key}: {a}, expected {b}");
    }

    // Where the split is part of the experiment it stays, and the error says what to do.
    let fixed = ["--set".to_string(), "noisy_ops.dw_draw=per_microbatch".to_string()];
    let output = limited(limit, &[args("refused", 512), fixed.to_vec()].concat());
    let text = stderr_of(&output);
    let error = text.lines().last().unwrap_or_default();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(error.contains("out of memory: ") && error.contains("per_update"), "{text}");
}
