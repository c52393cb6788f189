//! `temper eval --error-scales --formats`: every cell is what an evaluation of its own would give, and is held against clean.

use std::path::Path;

use serde_json::{Value, json};

use crate::support::{config, model, names, rows, run, stderr_of, succeed};

fn eval(config: &Path, more: &[&str]) -> Value {
    let args =
        ["eval", model().to_str().unwrap(), "--config", config.to_str().unwrap(), "--json", "--device", "cpu", "-q"];
    serde_json::from_str(&succeed(&[&args[..], more].concat())).unwrap()
}

#[test]
fn cells_are_evaluations_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    // Its own format is none of those asked for, and its noise spares validation: the cells must not.
    let yaml = "data: {generated: {val_problems: 24}}\nnoisy_ops: {phases: [rollout]}\n\
                fake_quant: {enabled: true, weights: nvfp4}";
    let config = config(dir.path(), "cells", yaml);
    let (answers, stem) = (dir.path().join("answers.jsonl"), dir.path().join("curve"));
    let found = eval(
        &config,
        &[
            "--error-scales",
            "0,0.3",
            "--formats",
            "none,mxfp4",
            "--answers",
            answers.to_str().unwrap(),
            "--plot",
            stem.to_str().unwrap(),
        ],
    );
    assert_eq!(found["n"], 24);
    let conditions: Vec<&str> =
        found["conditions"].as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect();
    assert_eq!(conditions, ["clean", "quantized"]);
    let cells = found["robustness"].as_array().unwrap();
    let labels: Vec<(f64, &str)> =
        cells.iter().map(|c| (c["error_scale"].as_f64().unwrap(), c["format"].as_str().unwrap())).collect();
    assert_eq!(labels, [(0.0, "none"), (0.3, "none"), (0.0, "mxfp4"), (0.3, "mxfp4")]);

    let answers = rows(&answers);
    assert_eq!(answers.len(), (2 + 4) * 24);
    let texts = |of: &dyn Fn(&Value) -> bool| -> Vec<(Value, bool)> {
        let chosen = answers.iter().filter(|row| of(row));
        chosen.map(|row| (row["text"].clone(), row["correct"] == true)).collect()
    };
    let clean = texts(&|row| row["condition"] == "clean");
    for cell in cells {
        let own = texts(&|row| row["error_scale"] == cell["error_scale"] && row["format"] == cell["format"]);
        let count = |of: &dyn Fn(bool, bool) -> bool| clean.iter().zip(&own).filter(|(c, o)| of(c.1, o.1)).count();
        assert_eq!(cell["correct"], count(&|_, own| own), "{cell}");
        assert_eq!((&cell["lost"], &cell["gained"]), (&json!(count(&|c, o| c && !o)), &json!(count(&|c, o| !c && o))));
        let change = cell["difference_from_clean"].as_f64().unwrap();
        assert!((change - (count(&|_, o| o) as f64 - count(&|c, _| c) as f64) / 24.0).abs() < 1e-12, "{cell}");
        let p = cell["p_mid"].as_f64().unwrap();
        assert!(p > 0.0 && p <= 1.0 && cell["ci95"].as_array().unwrap().len() == 2, "{cell}");
        // An evaluation under this cell's configuration alone gives the same answers.
        let (scale, quantized) = (cell["error_scale"].as_f64().unwrap(), cell["format"] != "none");
        let alone = dir.path().join("alone.jsonl");
        let sets = [
            format!("noisy_ops={{enabled: {}, error_scale: {scale}, phases: [validation]}}", scale > 0.0),
            format!("fake_quant={{enabled: {quantized}, weights: mxfp4}}"),
        ];
        let _ = std::fs::remove_file(&alone);
        eval(&config, &["--set", &sets[0], "--set", &sets[1], "--answers", alone.to_str().unwrap()]);
        let alone: Vec<Value> = rows(&alone).iter().rev().take(24).rev().map(|row| row["text"].clone()).collect();
        assert_eq!(own.iter().map(|(text, _)| text.clone()).collect::<Vec<_>>(), alone, "{cell}");
    }
    // Otherwise cells could be mixed up unnoticed.
    let of_nvfp4 = texts(&|row| row["condition"] == "quantized");
    let of_mxfp4 = texts(&|row| row["error_scale"] == 0.0 && row["format"] == "mxfp4");
    assert!(of_nvfp4 != of_mxfp4 && of_mxfp4 != clean);
    let svg = std::fs::read_to_string(dir.path().join("curve.svg")).unwrap();
    assert!(svg.contains("mxfp4") && svg.contains("n = 24"));
    assert!(names(dir.path()).contains(&"curve.png".to_string()));

    // What is left out is the configuration's own; without either option there are no cells.
    let found = eval(&config, &["--error-scales", "0"]);
    assert_eq!(
        (&found["robustness"][0]["format"], &found["robustness"].as_array().unwrap().len()),
        (&json!("nvfp4"), &1)
    );
    assert_eq!(found["robustness"][0]["correct"], found["conditions"][1]["correct"]);
    let found = eval(&config, &["--formats", "none"]);
    assert_eq!(found["robustness"][0]["error_scale"], 0.05);
    assert!(eval(&config, &[]).get("robustness").is_none());
}

#[test]
fn activations_follow_the_format() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), "both", "fake_quant: {enabled: true, weights: mxfp4, activations: mxfp4}");
    let found = eval(&config, &["--error-scales", "0", "--formats", "nvfp4:sr,mxfp8"]);
    let formats: Vec<(&Value, &Value)> =
        found["robustness"].as_array().unwrap().iter().map(|cell| (&cell["weights"], &cell["activations"])).collect();
    assert_eq!(formats, [(&json!("nvfp4:sr"), &json!("nvfp4:sr")), (&json!("mxfp8"), &json!("mxfp8"))]);
}

#[test]
fn mistakes_are_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), "bad", "");
    for (more, expected) in [
        (&["--error-scales", "0,2"][..], "noisy_ops.error_scale: found 2, expected a number in [0, 1]"),
        (&["--error-scales", "nan"], "noisy_ops.error_scale: found"),
        (&["--error-scales", "0,five"], "five"),
        (&["--error-scales", "0,0.1,0.10"], "--error-scales: found 0.1 twice"),
        (&["--formats", "none,mxfp9"], "--formats: "),
        (&["--formats", "mxfp4,mxfp4:floor"], "--formats: found mxfp4 twice"),
        (&["--plot", "x"], "--plot: expected --error-scales or --formats"),
        (&["--error-scales", "0", "--plot", "no/such/place"], "--plot: no/such: no such file or directory"),
    ] {
        let args = ["eval", model().to_str().unwrap(), "--config", config.to_str().unwrap(), "--device", "cpu"];
        let output = run(&[&args[..], more].concat());
        let line = stderr_of(&output);
        assert_eq!((output.status.code(), line.lines().count()), (Some(2), 1), "{more:?}: {line}");
        assert!(line.contains(expected), "{more:?}: {line}");
    }
}
