//! SIGINT and SIGTERM, a second start, two processes, which checkpoints stay.

use std::path::Path;
use std::process::{Child, Output};

use crate::support::{
    assert_same_run, config, names, rows, run, run_dir, stderr_of, succeed, temper, train_args, wait_until,
};

// keep_best 0: the checkpoint of an interruption is one more candidate, which the whole run does not have.
const YAML: &str = "
trainer: {save_every: 5, val_every: 4, epochs: 4, keep_last: 2, keep_best: 0}
algorithm: {kl_coef: 0.05}
reward: {mode: numeric}";

fn signal(child: &Child, name: &str) {
    let status = std::process::Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

fn steps_logged(out: &Path) -> usize {
    let runs = names(out);
    let text = runs.first().and_then(|run| std::fs::read_to_string(out.join(run).join("metrics.jsonl")).ok());
    text.map_or(0, |text| text.lines().filter(|line| line.contains("\"kind\":\"train\"")).count())
}

/// The lines on stderr that are not progress of steps and validations.
fn remarks(output: &Output) -> Vec<String> {
    let lines = stderr_of(output);
    let remarks = lines.lines().filter(|l| !l.starts_with("step:") && !l.starts_with("run directory "));
    remarks.map(String::from).collect()
}

fn refused(args: &[String], expected: &str) {
    let output = run(args);
    let stderr = stderr_of(&output);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with("error: ") && stderr.contains(expected), "{stderr}");
}

#[test]
fn a_signal_finishes_the_step_and_the_resumed_run_is_the_whole_one() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), "signals", YAML);
    let whole = dir.path().join("whole");
    succeed(&train_args(&config, &whole));
    for name in ["-INT", "-TERM"] {
        let out = dir.path().join(name.trim_start_matches('-'));
        let mut args = train_args(&config, &out);
        let child = temper(&args).spawn().unwrap();
        wait_until("the first steps", || steps_logged(&out) >= 3);
        signal(&child, name);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{}", stderr_of(&output));
        assert!(output.stdout.is_empty());
        let remarks = remarks(&output);
        let [line] = &remarks[..] else { panic!("{remarks:?}") };
        assert!(line.starts_with("error: interrupted: stopped after step ") && line.contains("--resume"), "{line}");
        let run_dir = run_dir(&out);
        let done = steps_logged(&out);
        let latest = std::fs::read_link(run_dir.join("latest")).unwrap();
        assert_eq!(latest, Path::new("checkpoints").join(format!("step_{done:06}")), "{line}");
        assert!(line.contains(&format!("after step {done} of 24")), "{line}");

        refused(&args, "--resume");
        args.push("--resume".to_string());
        succeed(&args);
        // The checkpoint at the interrupted step is one that the whole run does not write; it is pruned later.
        assert_same_run(&self::run_dir(&whole), &run_dir);
    }
}

#[test]
fn a_directory_of_another_configuration_and_a_second_process_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), "signals", YAML);
    let out = dir.path().join("out");
    let mut args = train_args(&config, &out);
    let child = temper(&args).spawn().unwrap();
    wait_until("the first step", || steps_logged(&out) >= 1);
    let mut second = args.clone();
    second.push("--resume".to_string());
    refused(&second, "another process is writing this run");
    signal(&child, "-TERM");
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(130));

    // Another learning rate has another hash and so a directory of its own ...
    let before = run_dir(&out);
    args.extend(["--set", "optimizer.lr=1e-3", "--dry-run"].map(String::from));
    succeed(&args);
    // ... unless somebody renames one.
    args.pop();
    let child = temper(&args).spawn().unwrap();
    wait_until("the second run directory", || {
        names(&out).iter().any(|n| out.join(n) != before && out.join(n).join("run.json").exists())
    });
    signal(&child, "-TERM");
    child.wait_with_output().unwrap();
    let other = names(&out).into_iter().map(|n| out.join(n)).find(|path| *path != before).unwrap();
    std::fs::remove_dir_all(&other).unwrap();
    std::fs::rename(&before, &other).unwrap();
    for resume in [false, true] {
        let mut args = args.clone();
        args.extend(resume.then(|| "--resume".to_string()));
        refused(&args, "holds a run of another configuration");
    }
    // A directory that is no run at all.
    std::fs::remove_dir_all(&other).unwrap();
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("thesis.tex"), "mine").unwrap();
    refused(&args, "not empty and not a run");
    assert_eq!(names(&other), ["thesis.tex"]);
}

#[test]
fn the_last_and_the_best_checkpoints_stay_and_can_be_used() {
    let dir = tempfile::tempdir().unwrap();
    let yaml = YAML.replace("save_every: 5, val_every: 4", "save_every: 2, val_every: 2");
    let yaml = yaml.replace("keep_best: 0", "keep_best: 1");
    let config = config(dir.path(), "kept", &yaml);
    let out = dir.path().join("out");
    succeed(&train_args(&config, &out));
    let run_dir = run_dir(&out);
    let validations: Vec<(u64, f64)> = rows(&run_dir.join("metrics.jsonl"))
        .iter()
        .filter(|r| r["kind"] == "val" && r["step"] != 0)
        .map(|r| (r["step"].as_u64().unwrap(), r["val/acc_noisy"].as_f64().unwrap()))
        .collect();
    let best = validations.iter().fold((0, -1.0), |best, &(step, acc)| if acc >= best.1 { (step, acc) } else { best });
    let mut expected: Vec<String> = [22, 24, best.0].iter().map(|step| format!("step_{step:06}")).collect();
    expected.sort();
    expected.dedup();
    assert_eq!(names(&run_dir.join("checkpoints")), expected, "{validations:?}");
    assert_eq!(std::fs::read_link(run_dir.join("latest")).unwrap(), Path::new("checkpoints/step_000024"));

    for checkpoint in [run_dir.join("checkpoints").join(&expected[0]), run_dir.join("latest")] {
        let checkpoint = checkpoint.to_str().unwrap();
        let text = succeed(&["score", checkpoint, "--ids", "1,2,3,4", "--json", "--device", "cpu"]);
        let score: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(score["logprobs"].as_array().unwrap().len(), 3, "{text}");
        succeed(&["eval", checkpoint, "--config", config.to_str().unwrap(), "--json", "--device", "cpu"]);
    }
}
