//! LoRA end to end: what a run with adapters trains and writes, what the commands do with it, and what is no adapter.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use temper::model::checkpoint::Checkpoint;

use crate::support::{config, model, names, rows, run, run_dir, stderr_of, succeed, train_args};

const LORA: &str = "
model: {lora: {rank: 4, targets: [q_proj, down_proj]}}
trainer: {val_every: 12, save_every: 12}
algorithm: {kl_coef: 0.05}
optimizer: {lr: 2e-3}
reward: {mode: numeric}
noisy_ops: {adapters: true}
fake_quant: {enabled: true, weights: nvfp4}";

/// The run directory of LORA and its last checkpoint.
fn trained(dir: &Path) -> (PathBuf, PathBuf) {
    let out = dir.join("out");
    succeed(&train_args(&config(dir, "lora", LORA), &out));
    let run = run_dir(&out);
    let checkpoint = run.join("checkpoints/step_000012");
    (run, checkpoint)
}

fn accuracies(json: &str) -> Vec<(String, f64)> {
    let result: Value = serde_json::from_str(json).unwrap();
    let of = |c: &Value| (c["name"].as_str().unwrap().to_string(), c["accuracy"].as_f64().unwrap());
    result["conditions"].as_array().unwrap().iter().map(of).collect()
}

#[test]
fn a_run_trains_adapters_alone_and_its_checkpoint_is_an_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let (run, checkpoint) = trained(dir.path());
    let metrics = rows(&run.join("metrics.jsonl"));
    let train: Vec<&Value> = metrics.iter().filter(|row| row["kind"] == "train").collect();
    assert_eq!(train.len(), 12);
    assert!(train.iter().all(|row| row["injection/disagreements"] == 0), "planned is measured");
    assert!(train.iter().all(|row| row["kl/ref"].as_f64().unwrap() >= 0.0), "the base is the reference");
    let names = names(&checkpoint);
    assert!(names.contains(&"adapter_model.safetensors".to_string()) && !names.contains(&"model.safetensors".into()));
    let adapter = Checkpoint::open(&checkpoint.join("adapter_model.safetensors")).unwrap();
    let expected: Vec<String> = (0..4)
        .flat_map(|layer| ["mlp.down_proj", "self_attn.q_proj"].map(|name| (layer, name)))
        .flat_map(|(layer, name)| {
            ["A", "B"].map(|m| format!("base_model.model.model.layers.{layer}.{name}.lora_{m}.weight"))
        })
        .collect();
    assert_eq!(adapter.names().collect::<Vec<_>>(), expected);
    assert!(adapter.tensor_f32(&expected[1]).unwrap().iter().any(|b| *b != 0.0), "B was trained");
    // Every step's row of an adapter: planned .05, measured .05; B's dW too.
    let of_b = rows(&run.join("injection.jsonl"));
    let of_b = of_b.iter().filter(|row| row["module"].as_str().unwrap().ends_with("lora_B"));
    assert_eq!(of_b.clone().count(), 12 * 8);
    assert!(of_b.clone().all(|row| row["matmul"]["dw"]["planned"] == 0.05 && row["quant"].is_null()));

    // Evaluated, it is the model of the last validation.
    let config = run.join("config.yaml");
    let eval = |model: &Path| {
        let args = ["eval", model.to_str().unwrap(), "--config", config.to_str().unwrap(), "--json", "--device", "cpu"];
        accuracies(&succeed(&args))
    };
    let validated = metrics.iter().rfind(|row| row["kind"] == "val").unwrap();
    for (name, accuracy) in eval(&checkpoint) {
        assert_eq!(validated[format!("val/acc_{name}")].as_f64().unwrap(), accuracy, "{name}");
    }
    // Merged, it is the same model where nothing is quantized.
    let merged = dir.path().join("merged");
    succeed(&["merge", checkpoint.to_str().unwrap(), merged.to_str().unwrap()]);
    let clean = |of: Vec<(String, f64)>| of.into_iter().find(|(name, _)| name == "clean").unwrap().1;
    assert_eq!(clean(eval(&merged)), clean(eval(&checkpoint)));
    let (base, merged) = (Checkpoint::open(model()).unwrap(), Checkpoint::open(&merged).unwrap());
    for name in base.names() {
        let changed = base.tensor_f32(name).unwrap() != merged.tensor_f32(name).unwrap();
        assert_eq!(changed, name.contains("q_proj.weight") || name.contains("down_proj"), "{name}");
    }
}

/// The message of a command that fails on its input.
fn refused(args: &[&str]) -> String {
    let output = run(args);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr_of(&output));
    let text = stderr_of(&output);
    assert_eq!(text.trim_end().lines().count(), 1, "{args:?}: {text}");
    text
}

#[test]
fn what_is_no_adapter_or_no_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (run, checkpoint) = trained(dir.path());
    let (adapter, config) = (checkpoint.to_str().unwrap(), run.join("config.yaml"));
    let (config, out) = (config.to_str().unwrap(), dir.path().join("new"));
    let out = out.to_str().unwrap();
    for args in [
        &["quantize", adapter, out, "--format", "mxfp4"][..],
        &["scan", adapter, "--format", "mxfp4"],
        &["train", config, "--out", out, "--set", &format!("model.path={adapter}")],
    ] {
        let text = refused(args);
        assert!(text.contains("found an adapter") && text.contains("temper merge"), "{text}");
    }
    // What looks at the model as it computes takes the adapter along.
    for scan in ["--sensitivity", "--faults"] {
        succeed(&["scan", adapter, scan, "--format", "mxfp4", "--json", "--device", "cpu"]);
    }
    let text = refused(&["merge", model().to_str().unwrap(), out]);
    assert!(text.contains("found no adapter_config.json"), "{text}");
    let text = refused(&["merge", adapter, model().to_str().unwrap()]);
    assert!(text.contains("already exists"), "{text}");

    let path = checkpoint.join("adapter_config.json");
    let whole: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (key, value, parts) in [
        ("use_dora", json!(true), ["use_dora: found true", "expected the default"]),
        ("bias", json!("all"), ["bias: found \"all\"", "expected the default"]),
        ("modules_to_save", json!(["lm_head"]), ["modules_to_save: found [\"lm_head\"]", "expected the default"]),
        ("init_lora_weights", json!("pissa"), ["init_lora_weights: found \"pissa\"", "leaves the base as it is"]),
        ("peft_type", json!("IA3"), ["peft_type: found", "LORA"]),
        ("r", json!(5), ["lora_A.weight: found [4,", "expected [5,"]),
        ("lora_alpha", json!("x"), ["lora_alpha: found \"x\"", "expected a positive number"]),
        ("base_model_name_or_path", json!("/nowhere"), ["base_model_name_or_path: /nowhere", "--base DIR"]),
        ("base_model_name_or_path", json!(adapter), ["base_model_name_or_path", "found an adapter"]),
        ("base_model_name_or_path", Value::Null, ["base_model_name_or_path: missing", "expected"]),
    ] {
        let mut damaged = whole.clone();
        damaged[key] = value;
        std::fs::write(&path, damaged.to_string()).unwrap();
        let text = refused(&["score", adapter, "--ids", "1,2,3"]);
        assert!(parts.iter().all(|part| text.contains(part)), "{key}: {text}");
        refused(&["merge", adapter, out]);
        assert!(!Path::new(out).exists(), "{key}: nothing is left behind");
    }
    // The base lies elsewhere now: named, it is found.
    let mut moved = whole.clone();
    moved["base_model_name_or_path"] = json!("/nowhere");
    std::fs::write(&path, moved.to_string()).unwrap();
    let base = model().to_str().unwrap();
    succeed(&["score", adapter, "--ids", "1,2,3", "--base", base]);
    succeed(&["eval", adapter, "--config", config, "--base", base, "--device", "cpu"]);
    // The scales that were calibrated for it go along.
    std::fs::write(checkpoint.join("activation_amax.json"), "{}").unwrap();
    succeed(&["merge", adapter, out, "--base", base]);
    assert!(Path::new(out).join("activation_amax.json").exists());
    assert!(refused(&["score", base, "--ids", "1,2,3", "--base", base]).contains("expected an adapter"));

    std::fs::write(&path, whole.to_string()).unwrap();
    let weights = checkpoint.join("adapter_model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() - 7]).unwrap();
    assert!(refused(&["score", adapter, "--ids", "1,2,3"]).contains("adapter_model.safetensors"));
}

#[test]
fn an_adapter_needs_weights_that_can_be_named() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), "lora", LORA);
    let out = dir.path().join("out");
    let mut args = train_args(&config, &out);
    args.extend(["--set", "model.path=null", "--set", "model.preset=tiny-4x64"].map(String::from));
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let text = refused(&args);
    assert!(text.contains("model.path: found null with model.lora"), "{text}");
}
