//! `temper plan`: the JSON that checks read, and errors with exit code 2.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use super::registry_file;

/// Runs the binary in `dir`, where no data lies.
fn temper(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_temper")).env("HF_HUB_CACHE", dir).current_dir(dir).args(args).output().unwrap()
}

fn plan(args: &[&str]) -> Output {
    let dir = tempfile::tempdir().unwrap();
    let file = registry_file("e9b.yaml").display().to_string();
    temper(dir.path(), &[&["plan", &file], args].concat())
}

#[test]
fn json_needs_neither_data_nor_weights() {
    let output = plan(&["--json", "--steps-per-epoch", "58"]);
    assert!(output.status.success());
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&json["steps_per_epoch"], &json["total_steps"]), (&58.into(), &116.into()));
    let sigma = json["sigma"].as_array().unwrap();
    assert_eq!(sigma.len(), 116);
    assert_eq!((&sigma[0]["step"], &sigma[0]["epoch"], &sigma[0]["sigma"]), (&1.into(), &0.into(), &0.0.into()));
    assert_eq!((&sigma[10]["step"], &sigma[10]["sigma"]), (&11.into(), &0.01.into()));
    assert_eq!(sigma[115]["epoch"], 1);
    let modules = json["modules"].as_array().unwrap();
    assert_eq!(modules.len(), 255);
    let module = modules.iter().find(|m| m["name"] == "model.layers.14.input_layernorm").unwrap();
    assert_eq!((&module["kind"], &module["layer"]), (&"rmsnorm".into(), &14.into()));
    assert_eq!((&module["aqn_multiplier"], &module["matmul_error"]), (&1.5.into(), &0.0.into()));
    assert!(module["weight_format"].is_null() && module["activation_format"].is_null());
    let linear = modules.iter().find(|m| m["name"] == "model.layers.3.mlp.up_proj").unwrap();
    assert_eq!((&linear["kind"], &linear["matmul_error"]), (&"linear".into(), &0.05.into()));
}

#[test]
fn training_rows_are_counted_when_they_are_there() {
    let dir = tempfile::tempdir().unwrap();
    let rows: String = (0..300).map(|i| format!("{{\"question\": \"{i}\", \"answer\": \"#### {i}\"}}\n")).collect();
    let data = super::write(dir.path(), "train.jsonl", &rows);
    let output = plan(&["--json", "--set", &format!("data.train={}", data.display())]);
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["steps_per_epoch"], 2);
}

#[test]
fn what_is_missing_is_one_line_with_the_remedy() {
    for (args, part) in [
        (
            &[] as &[&str],
            "data.train: data/gsm8k_train.jsonl: no such file or directory; set it with --set data.train=FILE, or give --steps-per-epoch N",
        ),
        (&["--steps-per-epoch", "0"], "--steps-per-epoch: found 0, expected 1 to 65534"),
        (
            &["--steps-per-epoch", "58", "--set", "model.preset=null"],
            "model.path: Qwen/Qwen2.5-1.5B-Instruct: no such directory, and not in the local HF cache",
        ),
        (
            &["--steps-per-epoch", "58", "--set", "noise_injection.layer_sigma_config.layer_multipliers.28=1"],
            "layer_multipliers: found layer 28, expected 0 to 27",
        ),
        (&["--steps-per-epoch", "58", "--set", "noisy_ops.target_modules=[q_porj]"], "`q_porj` matches no module"),
    ] {
        let output = plan(args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(output.stdout.is_empty());
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert!(stderr.contains(part), "{stderr}");
    }
}

#[test]
fn unused_keys_and_reproduced_defects_are_said() {
    let set = |keys: &[&str]| {
        let mut args = vec!["--json", "--steps-per-epoch", "58"];
        keys.iter().for_each(|key| args.extend(["--set", key]));
        plan(&args)
    };
    let output = set(&["noise_injection.num_stages=10"]);
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["unused_keys"][0], "noise_injection.num_stages");
    assert!(String::from_utf8(output.stderr).unwrap().contains("noise_injection.num_stages: set, but not used"));

    let output = set(&[
        "noise_injection.compat=original",
        "noisy_ops.exclude_modules=[]",
        "noisy_ops.dw_draw=per_microbatch",
        "trainer.microbatch_tokens=null",
    ]);
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["notices"].as_array().unwrap().len(), 4);
    assert!(json["sigma"].as_array().unwrap().iter().all(|s| s["sigma"] == 0.0));
    assert_eq!(json["modules"].as_array().unwrap().last().unwrap()["matmul_error"], 0.05);

    // What is allowed, and not meant.
    let output = set(&["trainer.best_metric=val/acc_clean", "trainer.val_every=20", "data.max_response_tokens=60000"]);
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let notices: Vec<&str> = json["notices"].as_array().unwrap().iter().map(|n| n.as_str().unwrap()).collect();
    for part in ["61024 together, but the model has 32768 positions", "save_every: 58 is no multiple of val_every: 20"]
    {
        assert!(notices.iter().any(|notice| notice.contains(part)), "{part}: {notices:?}");
    }
}

/// Every row of the registry, as a user sees it: steps, modules with AQN, error, formats.
#[test]
fn every_row_of_the_registry_has_a_plan() {
    let dir = tempfile::tempdir().unwrap();
    let clean = "matmul error: ";
    for (name, steps, aqn, shows, lacks) in [
        ("baseline", 58, 0, "", clean),
        ("baseline_2ep", 116, 0, "", clean),
        ("mxfp4_only", 58, 0, "mxfp4", clean),
        ("mxfp4_aqn", 58, 57, "mxfp4", clean),
        ("1a", 174, 196, "mxfp4", clean),
        ("1c", 174, 196, "5.000e-3", clean),
        ("1d", 174, 196, "1.000e-3", clean),
        ("1e", 174, 57, "5.000e-2", clean),
        ("nvfp4", 174, 57, "nvfp4", clean),
        ("w4a4_mxfp4", 58, 0, "activation scale token", clean),
        ("w4a4_nvfp4", 58, 0, "activation scale token", clean),
        ("e5", 116, 0, clean, "mxfp4"),
        ("e5a", 116, 57, clean, "mxfp4"),
        ("e5b", 116, 57, clean, "mxfp4"),
        ("e5c", 116, 57, "1.000e-2", "mxfp4"),
        ("e5d", 116, 57, "1.000e-4", "mxfp4"),
        ("e9a", 116, 8, "14-17", "mxfp4"),
        ("e9b", 116, 57, "10-13, 18-21", "mxfp4"),
        ("e9c", 116, 8, "1.5", "mxfp4"),
        ("dapo", 58, 0, "", clean),
        ("dr_grpo", 58, 0, "", clean),
        ("gspo", 58, 0, "", clean),
        ("mxfp4_lora", 58, 0, "alpha 16; 36929536 of 1580643840 parameters", clean),
        ("nvfp4_lora", 58, 0, "mlp.down_proj.lora_B", "mxfp4 "),
        ("dapo_lora", 58, 0, "LoRA: rank 32", "fake quantization"),
        ("e5_forward", 116, 0, "phases rollout, validation, old_logprobs, ref_logprobs, forward;", "mxfp4"),
        ("e5_backward", 116, 0, "phases backward;", "mxfp4"),
    ] {
        let file = registry_file(&format!("{name}.yaml")).display().to_string();
        let output = temper(dir.path(), &["plan", &file, "--steps-per-epoch", "58"]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{name}");
        let head = text.lines().next().unwrap();
        assert!(head.starts_with(&format!("{name} (")), "{head}");
        assert!(head.ends_with(&format!("): {steps} steps = {} epochs x 58", steps / 58)), "{head}");
        assert!(text.contains(shows), "{name} lacks {shows}:\n{text}");
        assert!(!text.contains(lacks), "{name} has {lacks}:\n{text}");
        assert_eq!(text.contains(&format!("AQN: {aqn} modules")), aqn > 0, "{name}:\n{text}");
    }
}

#[test]
fn the_table_shows_stages_and_modules() {
    let output = plan(&["--steps-per-epoch", "58"]);
    let text = String::from_utf8(output.stdout).unwrap();
    for part in
        ["11-20", "1.000e-2", "model.layers.*.input_layernorm", "10-13, 18-21", "1.2", "lm_head", "AQN: 57 modules"]
    {
        assert!(text.contains(part), "{part} is missing from\n{text}");
    }
    let output = plan(&["--steps-per-epoch", "58", "-v"]);
    assert!(String::from_utf8(output.stdout).unwrap().contains("model.layers.27.mlp.down_proj"));
}

#[test]
fn quantized_activations_are_shown() {
    let set = |keys: &[&str], json: bool| {
        let mut args = vec!["--steps-per-epoch", "58", "--set", "fake_quant.enabled=true"];
        keys.iter().for_each(|key| args.extend(["--set", key]));
        args.extend(json.then_some("--json"));
        let output = plan(&args);
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let w4a4 = ["fake_quant.weights=mxfp4:even", "fake_quant.activations=nvfp4"];
    let (text, _) = set(&w4a4, false);
    let row = text.lines().find(|line| line.contains("mlp.up_proj")).unwrap();
    assert!(row.contains("mxfp4:even") && row.contains(" nvfp4"), "{row}");
    let head = text.lines().find(|line| line.contains("lm_head")).unwrap();
    assert!(!head.contains("nvfp4"), "{head}");
    assert!(text.contains("activation scale token\n"), "{text}");

    let scale = "fake_quant.activation_scale=static";
    let (text, _) = set(&[w4a4[0], w4a4[1], scale, "fake_quant.calibration_prompts=7"], false);
    assert!(text.contains("activation scale static, from the first 7 training prompts\n"), "{text}");
    let (text, _) = set(&[w4a4[0], w4a4[1], scale], true);
    let json: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["activation_scale"], "static");
    let module =
        json["modules"].as_array().unwrap().iter().find(|m| m["name"] == "model.layers.3.mlp.up_proj").unwrap();
    assert_eq!((&module["weight_format"], &module["activation_format"]), (&"mxfp4:even".into(), &"nvfp4".into()));

    let (_, notices) = set(&["fake_quant.weights=nvfp4", "fake_quant.share_tensor_scale=false"], false);
    assert!(notices.contains("share_tensor_scale: false: q/k/v and gate/up have a tensor scale each"), "{notices}");
    let (_, notices) = set(&[w4a4[1], "fake_quant.calibration_prompts=7"], false);
    assert!(notices.contains("calibration_prompts: set, but only activation_scale: static is calibrated"), "{notices}");
    let (_, notices) = set(&[scale], false);
    assert!(notices.contains("activation_scale: static: set, but no activations are quantized"), "{notices}");
}

#[test]
fn memory_is_estimated_without_weights_by_phase_and_card() {
    let memory = |keys: &[&str]| {
        let mut args = vec!["--json", "--steps-per-epoch", "58"];
        keys.iter().for_each(|key| args.extend(["--set", key]));
        let json: Value = serde_json::from_slice(&plan(&args).stdout).unwrap();
        json["memory"].clone()
    };
    let found = memory(&[]);
    let phases = found["phases"].as_array().unwrap();
    let names: Vec<&str> = phases.iter().map(|p| p["phase"].as_str().unwrap()).collect();
    assert_eq!(names, ["rollout", "logprobs", "update", "optimizer", "validation"]);
    for phase in phases {
        let parts = phase["parts"].as_array().unwrap();
        let sum: u64 = parts.iter().map(|part| part["bytes"].as_u64().unwrap()).sum();
        assert_eq!(phase["bytes"], sum, "{phase}");
    }
    let largest = phases.iter().max_by_key(|p| p["bytes"].as_u64().unwrap()).unwrap();
    assert_eq!((&found["peak_phase"], &found["peak_bytes"]), (&largest["phase"], &largest["bytes"]));
    let cards = found["cards"].as_array().unwrap();
    assert_eq!([&cards[0]["name"], &cards[1]["name"], &cards[2]["name"]], ["80 GB", "40 GB", "24 GB"]);
    assert!(cards[2]["microbatch_tokens"].is_null() && cards[2]["remedies"][0].as_str().unwrap().contains("GB"));

    let bytes = |memory: &Value| memory["peak_bytes"].as_u64().unwrap();
    assert!(bytes(&memory(&["data.max_response_tokens=256"])) < bytes(&found));
    let smaller = memory(&["model.preset=qwen2.5-0.5b"]);
    assert!(bytes(&smaller) < bytes(&found) && smaller["cards"][2]["microbatch_tokens"].as_u64().unwrap() >= 2048);

    let text = String::from_utf8(plan(&["--steps-per-epoch", "58"]).stdout).unwrap();
    for part in ["kv_cache", "moments", "80 GB", "biggest micro-batch, tokens", "every sequence at its longest"] {
        assert!(text.contains(part), "{part} is missing from\n{text}");
    }
}
