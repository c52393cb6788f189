//! `temper scan` through the binary.

use serde_json::Value;

use crate::{directory, temper, text};

fn json(args: &[&str]) -> Value {
    let output = temper(&[&["scan", "--json", "-q"], args].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn error_line(args: &[&str]) -> String {
    let output = temper(&[&["scan", "-q"], args].concat());
    let line = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.status.code(), line.lines().count()), (Some(2), 1), "{line}");
    assert!(output.stdout.is_empty());
    line
}

#[test]
fn gaussian_weights_give_the_known_figures() {
    let scan = json(&["--gaussian", "0.02", "--format", "nvfp4,mxfp4,nvfp4_single_level"]);
    let mean = |format: &str, metric: &str| {
        let formats = scan["formats"].as_array().unwrap();
        formats.iter().find(|f| f["format"] == format).unwrap()["mean"][metric].as_f64().unwrap()
    };
    for (format, metric, low, high) in [
        ("nvfp4", "sqnr_db", 20.4, 20.46),
        ("nvfp4", "relative_error", 0.178, 0.180),
        ("nvfp4", "deadzone_ratio", 0.067, 0.069),
        ("mxfp4", "sqnr_db", 18.6, 18.9),
        ("nvfp4_single_level", "sqnr_db", 17.6, 19.0),
        ("nvfp4_single_level", "relative_error", 0.23, 0.30),
    ] {
        let found = mean(format, metric);
        assert!((low..=high).contains(&found), "{format} {metric}: {found}");
    }
    assert_eq!(scan["mean"]["sqnr_db"], scan["formats"][0]["mean"]["sqnr_db"]);
    assert_eq!(scan["wins"]["sqnr_db"]["nvfp4"], 28);
    assert_eq!(scan["tensors"].as_array().unwrap().len(), 28 * 7 * 3);
}

#[test]
fn weights_alone_are_what_quantize_says() {
    let parent = tempfile::tempdir().unwrap();
    let dir = directory(parent.path(), 2);
    let out = parent.path().join("out");
    let quantized = temper(&["quantize", text(&dir), text(&out), "--format", "nvfp4:sr", "--json", "-q"]);
    let quantized: Value = serde_json::from_slice(&quantized.stdout).unwrap();
    let scan = json(&[text(&dir), "--format", "nvfp4:sr"]);
    assert_eq!(scan["tensors"], quantized["tensors"]);
    assert_eq!(scan["mean"], quantized["mean"]);
}

#[test]
fn multipliers_are_a_file_that_plan_accepts() {
    let parent = tempfile::tempdir().unwrap();
    let dir = directory(parent.path(), 4);
    let (file, out) = (parent.path().join("layers.json"), parent.path().join("scan.json"));
    let args = [text(&dir), "--sensitivity", "--activations", "--format", "mxfp4", "--out", text(&out)];
    let rule = ["--multipliers", text(&file), "--rule", "quantile"];
    let scan = json(&[&args[..], &rule].concat());
    assert_eq!(scan, serde_json::from_slice::<Value>(&std::fs::read(&out).unwrap()).unwrap());
    assert_eq!(scan["activations"]["layers"].as_array().unwrap().len(), 4);
    let layers = scan["sensitivity"][0]["layers"].as_array().unwrap();
    let kl = |l: usize| layers[l]["kl"].as_f64().unwrap();
    let most = (0..4).max_by(|&a, &b| kl(a).total_cmp(&kl(b))).unwrap();
    let config: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(config["layer_multipliers"][most.to_string()], 1.5, "{config}");
    assert_eq!(config["_scan"]["sha256_16"].as_str().unwrap().len(), 16);
    let set = format!("noise_injection.layer_sigma_config={}", text(&file));
    let model = format!("model.path={}", text(&dir));
    let root = env!("CARGO_MANIFEST_DIR");
    let debug = format!("{root}/configs/debug.yaml");
    let plan = temper(&[
        "plan",
        &debug,
        "--steps-per-epoch",
        "4",
        "--set",
        &set,
        "--set",
        &model,
        "--set",
        "model.preset=null",
        "--json",
    ]);
    assert!(plan.status.success(), "{}", String::from_utf8_lossy(&plan.stderr));
    let plan: Value = serde_json::from_slice(&plan.stdout).unwrap();
    let modules = plan["modules"].as_array().unwrap();
    let norm = modules.iter().find(|m| m["layer"] == most && m["kind"] == "rmsnorm").unwrap();
    assert_eq!(norm["aqn_multiplier"], 1.5);
}

#[test]
fn what_changed_since_an_earlier_checkpoint() {
    let parent = tempfile::tempdir().unwrap();
    let dir = directory(parent.path(), 2);
    let out = parent.path().join("quantized");
    temper(&["quantize", text(&dir), text(&out), "--format", "mxfp4", "-q"]);
    let scan = json(&[text(&out), "--since", text(&dir)]);
    for layer in scan["changes"]["layers"].as_array().unwrap() {
        let change = layer["relative_change"].as_f64().unwrap();
        assert!((0.05..0.2).contains(&change), "{layer}");
    }
    assert_eq!(scan["changes"]["outside_layers"]["relative_change"], 0.0);
    assert!(scan.get("tensors").is_none());
}

#[test]
fn a_planted_fault_is_reported_and_a_preset_will_do() {
    let parent = tempfile::tempdir().unwrap();
    let dir = directory(parent.path(), 3);
    let scan = json(&[text(&dir), "--faults", "--plant", "bias@1:0.05:sparse"]);
    let suspects = scan["faults"][0]["suspects"].as_array().unwrap();
    assert_eq!(
        (suspects.len(), &suspects[0]["layer"], &suspects[0]["kind"]),
        (1, &Value::from(1), &Value::from("bias"))
    );
    let scan = json(&["--preset", "tiny-4x64", "--seed", "3", "--faults", "--noise", "0.05"]);
    assert_eq!((&scan["fault_prompts"], scan.get("prompts")), (&Value::from("random ids"), None));
    assert_eq!(scan["faults"][0]["suspects"], Value::Array(Vec::new()));
    assert_eq!(scan["faults"][0]["probes"].as_array().unwrap().len(), 4);
}

#[test]
fn bad_input_is_one_line() {
    let parent = tempfile::tempdir().unwrap();
    let one = directory(parent.path(), 1);
    let dir = directory(parent.path(), 2);
    let file = parent.path().join("m.json");
    let rule = ["--multipliers", text(&file), "--rule"];
    let weights = dir.join("model.safetensors");
    let prompts = parent.path().join("prompts.txt");
    std::fs::write(&prompts, "1,2,3\n4,x\n").unwrap();
    for (args, part) in [
        (vec![text(&dir), "--format", "mxfp5"], "mxfp5"),
        (vec![text(&dir), "--format", "mxfp4,mxfp4"], "mxfp4 twice"),
        ([&[text(&one)][..], &rule, &["quantile"]].concat(), "one band"),
        ([&[text(&dir)][..], &rule, &["bands"]].concat(), "--activations"),
        ([&[text(&dir)][..], &rule, &["best"]].concat(), "quantile"),
        ([&[text(&dir)][..], &rule, &["quantile", "--score", "output_kl"]].concat(), "--sensitivity"),
        ([&[text(&weights)][..], &["--activations"]].concat(), "config.json"),
        ([&[text(&dir)][..], &["--activations", "--prompts", text(&prompts)]].concat(), "line 2"),
        ([&[text(&dir)][..], &["--sensitivity", "--window", "3"]].concat(), "--window"),
        ([&[text(&dir)][..], &["--since", text(&one)]].concat(), "missing"),
        (vec!["--gaussian", "0"], "--gaussian"),
        (vec!["no/such/model"], "no/such/model"),
        (vec!["--preset", "tiny-4x64"], "--faults"),
        (vec!["--preset", "tiny-5x5", "--faults"], "tiny-5x5"),
        (vec![text(&dir), "--faults", "--plant", "clip@2"], "below 2"),
        (vec![text(&dir), "--faults", "--plant", "clap@1"], "deadzone"),
    ] {
        let line = error_line(&args);
        assert!(line.contains(part), "{args:?}: {line}");
    }
    assert!(!file.exists());
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    assert!(error_line(&[text(&dir)]).contains("model.safetensors"));
}

#[test]
fn nan_weights_are_counted() {
    use std::borrow::Cow;
    use temper::model::checkpoint::{StoredDtype, TensorBytes, TensorSpec, write_safetensors};
    let parent = tempfile::tempdir().unwrap();
    let file = parent.path().join("w.safetensors");
    let mut values = vec![0.01f32; 4 * 64];
    values[5] = f32::NAN;
    values[200] = f32::INFINITY;
    let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let spec = TensorSpec::new("model.layers.0.mlp.up_proj.weight", StoredDtype::F32, &[4, 64]);
    write_safetensors(&file, &[TensorBytes { spec, data: Cow::Owned(data) }]).unwrap();
    let scan = json(&[text(&file), "--format", "mxfp4"]);
    assert_eq!(
        (&scan["nonfinite_blocks"], &scan["tensors"][0]["nonfinite_blocks"]),
        (&Value::from(2), &Value::from(2))
    );
    assert!(scan["mean"]["sqnr_db"].as_f64().unwrap() > 10.0);
}

#[test]
fn charts_are_svg_and_png() {
    let parent = tempfile::tempdir().unwrap();
    let dir = directory(parent.path(), 3);
    let plots = parent.path().join("plots");
    json(&[text(&dir), "--weights", "--sensitivity", "--plots", text(&plots)]);
    for name in ["weights_sqnr_db", "weights_relative_error", "weights_deadzone", "sensitivity_kl"] {
        let svg = std::fs::read_to_string(plots.join(name).with_extension("svg")).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("mxfp4") && svg.contains("nvfp4"), "{name}");
        let png = std::fs::read(plots.join(name).with_extension("png")).unwrap();
        // The signature, then the header's width and height.
        assert!(png.starts_with(b"\x89PNG\r\n\x1a\n"), "{name}");
        assert_eq!((&png[16..20], &png[20..24]), (&900u32.to_be_bytes()[..], &480u32.to_be_bytes()[..]));
        assert!(png.len() > 8000, "{name}: {} bytes", png.len());
    }
}
