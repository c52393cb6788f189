//! Static activation scales from the start of a run to the evaluation of its checkpoints: calibrated once, before step 0,
//! carried by every checkpoint, used by eval, and made anew where a model has none.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use temper::data::generated::{Split, Task};

use crate::support::{assert_same_run, config, model, names, rows, run, run_dir, stderr_of, succeed, train_args};

const STATIC: &str = "
trainer: {val_every: 6, save_every: 3, keep_last: 9}
optimizer: {lr: 0.01}
reward: {mode: numeric}
fake_quant: {enabled: true, weights: nvfp4, activations: nvfp4, activation_scale: static, calibration_prompts: 5}";

const FILE: &str = "activation_amax.json";

/// `eval MODEL --config CONFIG --json`: (correct answers by condition, stderr).
fn eval(model: &Path, config: &Path, sets: &[&str]) -> (Vec<(String, u64)>, String) {
    let mut args = vec!["eval", model.to_str().unwrap(), "--config", config.to_str().unwrap(), "--json"];
    args.extend(["--device", "cpu"]);
    sets.iter().for_each(|set| args.extend(["--set", set]));
    let output = run(&args);
    let stderr = stderr_of(&output);
    assert!(output.status.success(), "{stderr}");
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let of = |c: &Value| (c["name"].as_str().unwrap().to_string(), c["correct"].as_u64().unwrap());
    (json["conditions"].as_array().unwrap().iter().map(of).collect(), stderr)
}

/// A copy of the files of `model`, without what lies below it, as `to` with `scales` beside the weights.
fn with_scales(model: &Path, to: PathBuf, scales: &str) -> PathBuf {
    std::fs::create_dir_all(&to).unwrap();
    for name in names(model).iter().filter(|name| model.join(name).is_file()) {
        std::fs::copy(model.join(name), to.join(name)).unwrap();
    }
    std::fs::write(to.join(FILE), scales).unwrap();
    to
}

#[test]
fn calibrated_once_carried_and_used() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), "static", STATIC);
    let out = dir.path().join("out");
    let result: Value =
        serde_json::from_str(&succeed(&[train_args(&config, &out), vec!["--json".into()]].concat())).unwrap();
    let names_of: Vec<&str> =
        result["conditions"].as_array().unwrap().iter().map(|c| c["condition"].as_str().unwrap()).collect();
    assert_eq!(names_of, ["clean", "noisy", "quantized", "deployed"]);
    assert_eq!(result["disagreeing_steps"], 0);

    // The same bytes in every checkpoint although the weights move; a number above 0 for each of 4 x 7 linears.
    let whole = run_dir(&out);
    let checkpoints: Vec<PathBuf> =
        names(&whole.join("checkpoints")).iter().map(|name| whole.join("checkpoints").join(name)).collect();
    assert_eq!(checkpoints.len(), 4);
    let scales = std::fs::read(checkpoints[0].join(FILE)).unwrap();
    assert!(checkpoints.iter().all(|checkpoint| std::fs::read(checkpoint.join(FILE)).unwrap() == scales));
    let scales: Value = serde_json::from_slice(&scales).unwrap();
    let amax: Vec<f64> = scales.as_object().unwrap().values().map(|a| a.as_f64().unwrap()).collect();
    assert!(amax.len() == 28 && amax.iter().all(|a| *a > 0.0 && f64::from(*a as f32) == *a), "{scales}");

    // Measured from the tensors used, in each phase of a step.
    let injection = rows(&whole.join("injection.jsonl"));
    let row = injection.iter().find(|r| r["module"] == "model.layers.2.mlp.down_proj").unwrap();
    for phase in ["rollout", "old_logprobs", "forward"] {
        let measured = &row["quant_activations"][phase];
        assert_eq!((&measured["format"], &measured["scale"]), (&"nvfp4".into(), &"static".into()), "{row}");
        assert!(measured["sqnr_db"].as_f64().unwrap() > 8.0 && measured["n"].as_u64().unwrap() > 0, "{row}");
    }
    assert_eq!(row["quant"]["format"], "nvfp4");
    let metrics = rows(&whole.join("metrics.jsonl"));
    let step = metrics.iter().find(|r| r["kind"] == "train").unwrap();
    for key in ["quant/sqnr_db", "quant/activation_sqnr_db"] {
        assert!(step[key].as_f64().unwrap() > 10.0, "{key}: {step}");
    }

    // A resume after the first checkpoint quantizes with the scales of step 0, not with new ones.
    let again = dir.path().join("again");
    std::fs::create_dir(&again).unwrap();
    let copy = again.join(whole.file_name().unwrap());
    let status = std::process::Command::new("cp").arg("-a").args([&whole, &copy]).status().unwrap();
    assert!(status.success());
    for name in names(&copy.join("checkpoints")).iter().skip(1) {
        std::fs::remove_dir_all(copy.join("checkpoints").join(name)).unwrap();
    }
    std::fs::remove_file(copy.join("latest")).unwrap();
    std::os::unix::fs::symlink("checkpoints/step_000003", copy.join("latest")).unwrap();
    succeed(&[train_args(&config, &again), vec!["--resume".into()]].concat());
    assert_same_run(&whole, &run_dir(&again));

    // eval of the last checkpoint finds them and repeats the run's last validation.
    let last = checkpoints.last().unwrap();
    let (found, stderr) = eval(last, &config, &[]);
    assert!(!stderr.contains("calibrating"), "{stderr}");
    for (name, correct) in &found {
        assert_eq!(metrics.last().unwrap()[format!("val/correct_{name}")], *correct, "{name}");
    }
    // With the scales of step 0 the start model is what it is with its own; with scales that clip everything to
    // nothing no answer is right, and the clean condition is as it was.
    let (sound, _) = eval(model(), &config, &[]);
    let (same, stderr) = eval(&with_scales(model(), dir.path().join("same"), &scales.to_string()), &config, &[]);
    assert!(same == sound && !stderr.contains("calibrating"), "{same:?} {sound:?}: {stderr}");
    let mut clipping = scales.clone();
    clipping.as_object_mut().unwrap().values_mut().for_each(|a| *a = (1e-6).into());
    let (clipped, _) = eval(&with_scales(model(), dir.path().join("clipped"), &clipping.to_string()), &config, &[]);
    assert_eq!(clipped[0], sound[0]);
    assert!(sound[2].1 > 0 && clipped[2].1 == 0, "{sound:?} {clipped:?}");
}

#[test]
fn a_model_without_scales_is_calibrated_and_a_damaged_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = config(dir.path(), "static", STATIC);
    let (_, stderr) = eval(model(), &path, &[]);
    let note = format!("{} has no {FILE}: calibrating on 5 training prompts", model().display());
    assert!(stderr.contains(&note), "{stderr}");
    // Nothing to calibrate where each token has its own scale.
    let (_, stderr) = eval(model(), &path, &["fake_quant.activation_scale=token"]);
    assert!(!stderr.contains("calibrating"), "{stderr}");

    let refused = |model: &Path, sets: &[&str], expected: &str| {
        let mut args = vec!["eval", model.to_str().unwrap(), "--config", path.to_str().unwrap(), "--device", "cpu"];
        sets.iter().for_each(|set| args.extend(["--set", set]));
        let output = run(&args);
        let stderr = stderr_of(&output);
        assert_eq!((output.status.code(), stderr.lines().count()), (Some(2), 1), "{stderr}");
        assert!(stderr.contains(expected), "{stderr}");
    };
    let val = dir.path().join("val.jsonl");
    let question = &Task::new(0).questions(Split::Validation, 0..1)[0].question;
    std::fs::write(&val, format!("{}\n", json!({"question": question, "answer": "#### 2"}))).unwrap();
    let val = format!("data.val={}", val.display());
    let files = ["data.kind=gsm8k", val.as_str(), "data.train=null"];
    refused(model(), &files, &format!("has no {FILE}: calibrating: data.train: found null, expected a .jsonl"));

    let name = "model.layers.0.self_attn.q_proj";
    for (text, expected) in [
        ("{".to_string(), format!("broken/{FILE}: EOF")),
        ("{}".to_string(), format!("broken/{FILE}: module {name} is missing")),
        (format!("{{\"{name}\": -1}}"), format!("broken/{FILE}: {name}: found -1, expected an f32, 0 or more")),
    ] {
        refused(&with_scales(model(), dir.path().join("broken"), &text), &[], &expected);
    }
}
