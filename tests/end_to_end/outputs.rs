//! What goes to stdout and to the disk: one JSON value alone, nothing from a dry run, one line when the disk is full.

use std::fs::File;
use std::process::Command;

use serde_json::Value;

use crate::support::{
    assert_same_run, config, files, model, names, rows, run_dir, stderr_of, succeed, temper, train_args,
};

fn json(args: &[&str]) -> Value {
    let text = succeed(args);
    assert_eq!(text.lines().count(), 1, "{args:?}: {text}");
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{args:?}: {e}: {text}"))
}

const SHORT: &str = "trainer: {epochs: 1, save_every: 2, val_every: 3}";

#[test]
fn json_is_alone_on_stdout() {
    let dir = tempfile::tempdir().unwrap();
    let (out, model) = (dir.path().join("out"), model().to_str().unwrap());
    let config = config(dir.path(), "json", SHORT);
    let config = config.to_str().unwrap();
    let trained = json(&["train", config, "--out", out.to_str().unwrap(), "--json", "--device", "cpu"]);
    assert_eq!(trained["run_dir"], run_dir(&out).to_str().unwrap(), "{trained}");
    assert_eq!(trained["steps"], 6, "{trained}");

    let plan = json(&["plan", config, "--json"]);
    assert_eq!((&plan["steps_per_epoch"], &plan["total_steps"]), (&Value::from(6), &Value::from(6)));
    let sigma = plan["sigma"].as_array().unwrap();
    assert_eq!(sigma.iter().map(|s| s["step"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6]);
    let norm = plan["modules"].as_array().unwrap().iter().find(|m| m["name"] == "model.layers.3.input_layernorm");
    let norm = norm.unwrap();
    assert_eq!((&norm["kind"], &norm["layer"]), (&Value::from("rmsnorm"), &Value::from(3)));
    assert_eq!(norm["aqn_multiplier"].as_f64(), Some(1.0));
    for key in ["matmul_error", "weight_format", "activation_format"] {
        assert!(norm.get(key).is_some(), "{norm}");
    }
    // A dry run prints the same plan, and nothing else.
    assert_eq!(json(&["train", config, "--dry-run", "--json", "--device", "cpu"]), plan);

    let answers = dir.path().join("answers.jsonl");
    let eval = ["eval", model, "--config", config, "--json", "--device", "cpu", "--answers", answers.to_str().unwrap()];
    let eval = json(&eval);
    assert_eq!(eval["n"], 8, "{eval}");
    let conditions = eval["conditions"].as_array().unwrap();
    assert_eq!(conditions.iter().map(|c| c["name"].as_str().unwrap()).collect::<Vec<_>>(), ["clean", "noisy"]);
    let answers = crate::support::rows(&answers);
    for condition in conditions {
        let (correct, accuracy) = (condition["correct"].as_u64().unwrap(), condition["accuracy"].as_f64().unwrap());
        assert_eq!(accuracy, correct as f64 / 8.0);
        let interval: Vec<f64> = condition["ci95"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        assert!(interval.len() == 2 && interval[0] <= accuracy && accuracy <= interval[1], "{condition}");
        let of_condition = answers.iter().filter(|a| a["condition"] == condition["name"]);
        assert_eq!(of_condition.filter(|a| a["correct"] == true).count() as u64, correct);
    }
    let score = json(&["score", model, "--ids", "1,2,3", "--json", "--device", "cpu"]);
    assert_eq!(score["ids"], serde_json::json!([1, 2, 3]));
    assert_eq!(score["logprobs"].as_array().unwrap().len(), 2);
    let generated = json(&["generate", model, "--ids", "1,2", "--max-new-tokens", "4", "--greedy", "--json"]);
    assert!(generated["ids"].as_array().unwrap().len() <= 4 && generated["text"].is_string(), "{generated}");
    let quantized = dir.path().join("quantized");
    let quantized = json(&["quantize", model, quantized.to_str().unwrap(), "--format", "mxfp4", "--json"]);
    assert!(quantized["mean"]["sqnr_db"].as_f64().unwrap() > 10.0 && quantized["tensors"].is_array());
}

#[test]
fn a_dry_run_makes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), "dry", SHORT);
    let before = files(dir.path());
    let out = dir.path().join("out");
    let mut args = train_args(&config, &out);
    args.push("--dry-run".to_string());
    let text = succeed(&args);
    assert!(text.contains("model.layers.*.input_layernorm"), "{text}");
    let output = temper(&["train", config.to_str().unwrap(), "--dry-run"]).current_dir(dir.path()).output().unwrap();
    assert!(output.status.success());
    assert_eq!(files(dir.path()), before);
}

/// A limit on the size of files stands for a full disk: writing the weights fails part of the way.
#[test]
fn a_full_disk_is_one_line_and_leaves_no_half_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), "full", SHORT);
    let (whole, out) = (dir.path().join("whole"), dir.path().join("out"));
    succeed(&train_args(&config, &whole));
    let mut args = train_args(&config, &out);
    let limited = |args: &[String]| {
        // The shell's blocks are 512 or 1024 bytes; model.safetensors has 610 KB. Ignoring the signal makes it an error.
        let script = "trap '' XFSZ; ulimit -f 400; exec \"$0\" \"$@\"";
        let mut command = Command::new("sh");
        command.args(["-c", script, env!("CARGO_BIN_EXE_temper")]).args(args);
        command.output().unwrap()
    };
    let output = limited(&args);
    let stderr = stderr_of(&output);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let errors: Vec<&str> = stderr.lines().filter(|line| !line.starts_with("step:")).collect();
    let [start, error] = errors[..] else { panic!("{stderr}") };
    assert!(start.starts_with("run directory ") && error.starts_with("error: "), "{stderr}");
    assert!(error.contains("model.safetensors") && error.contains("arge"), "{error}");
    assert!(output.stdout.is_empty());
    assert!(names(&run_dir(&out).join("checkpoints")).is_empty());
    assert!(std::fs::symlink_metadata(run_dir(&out).join("latest")).is_err());
    // With room again, the run goes on as if nothing had been.
    args.push("--resume".to_string());
    succeed(&args);
    assert_same_run(&run_dir(&whole), &run_dir(&out));

    let quantized = dir.path().join("quantized").to_str().unwrap().to_string();
    let before = names(dir.path());
    let output = limited(&["quantize", model().to_str().unwrap(), &quantized, "--format", "mxfp4"].map(String::from));
    assert_eq!(output.status.code(), Some(1), "{}", stderr_of(&output));
    assert_eq!(stderr_of(&output).lines().count(), 1, "{}", stderr_of(&output));
    assert_eq!(names(dir.path()), before);
}

/// Results that cannot be written are an error line and no panic; a reader that has seen enough is no error.
#[test]
fn stdout_that_is_full_or_closed() {
    if !std::path::Path::new("/dev/full").exists() {
        println!("skipped: /dev/full is absent");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), "stdout", SHORT);
    let (config, model) = (config.to_str().unwrap(), model().to_str().unwrap());
    for args in [
        &["plan", config][..],
        &["plan", config, "--json"],
        &["eval", model, "--config", config],
        &["score", model, "--ids", "1,2,3"],
        &["score", model, "--ids", "1,2,3", "--json"],
        &["generate", model, "--ids", "1,2,3", "--max-new-tokens", "2"],
        &["train", config, "--out", dir.path().join("out").to_str().unwrap(), "-q"],
        &["doctor"],
        &["doctor", "--json"],
    ] {
        let output = temper(args).stdout(File::create("/dev/full").unwrap()).output().unwrap();
        let stderr = stderr_of(&output);
        let lines: Vec<&str> = stderr.lines().filter(|line| !line.starts_with("notice: ")).collect();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
        assert!(lines.len() == 1 && lines[0].starts_with("error: stdout: "), "{args:?}: {stderr}");
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let resumed = [args, &["--resume"]].concat();
        let args = if args[0] == "train" { &resumed } else { args };
        let output = temper(args).stdout(writer).output().unwrap();
        let stderr = stderr_of(&output);
        assert!(!stderr.contains("panicked") && !stderr.contains("error: "), "{args:?}: {stderr}");
    }
    // Nobody reads the notices, or the error.
    for (set, code) in [("noisy_ops.exclude_modules=[]", 0), ("noisy_ops.exclude_module=[]", 2)] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = temper(&["plan", config, "--set", set]).stderr(writer).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{set}");
    }
}

/// The best checkpoint is that of `trainer.best_metric`, the newest of equals; by default of the run's own condition. Its score
/// says which metric that was.
#[test]
fn the_best_checkpoint_is_the_best_by_the_metric_that_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let lines = "
trainer: {save_every: 1, val_every: 1, keep_last: 1, keep_best: 1}
data: {generated: {val_problems: 40}}
optimizer: {lr: 5e-4}
noisy_ops: {error_scale: 0.1}
reward: {mode: numeric}";
    let path = config(dir.path(), "best", lines);
    for (metric, set) in [("val/acc_noisy", None), ("val/acc_clean", Some("trainer.best_metric=val/acc_clean"))] {
        let out = dir.path().join(metric.replace('/', "_"));
        let mut args = train_args(&path, &out);
        args.extend(set.iter().flat_map(|set| ["--set".to_string(), set.to_string()]));
        succeed(&args);
        let run = run_dir(&out);
        let metrics = rows(&run.join("metrics.jsonl"));
        let validated = metrics.iter().filter(|row| row["kind"] == "val" && row["step"] != 0);
        let scores: Vec<(f64, u64)> =
            validated.map(|row| (row[metric].as_f64().unwrap(), row["step"].as_u64().unwrap())).collect();
        let &(best, step) = scores.iter().max_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))).unwrap();
        assert!(scores.iter().any(|(score, _)| *score < best), "{metric}: there is a choice");
        let mut kept = [step, 12].map(|step| format!("step_{step:06}")).to_vec();
        kept.dedup();
        assert_eq!(names(&run.join("checkpoints")), kept, "{metric}");
        let marker = std::fs::read(run.join(format!("checkpoints/step_{step:06}/trainer/checkpoint.json"))).unwrap();
        let marker: Value = serde_json::from_slice(&marker).unwrap();
        assert_eq!((marker["score"]["metric"].as_str(), marker["score"]["value"].as_f64()), (Some(metric), Some(best)));
    }
}
