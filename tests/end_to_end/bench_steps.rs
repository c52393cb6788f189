//! `bench train`, `bench rollout` and `--profile`: whole steps of configs/debug.yaml on made-up prompts, and their traces.

use std::path::Path;

use serde_json::Value;

use crate::support::{config, run, stderr_of, succeed, train_args};

fn debug_yaml() -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/debug.yaml").display().to_string()
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("{key}: {value}"))
}

/// The events of a trace: (name, begin, end, number).
fn events(file: &Path) -> Vec<(String, f64, f64, Option<u64>)> {
    let trace: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let event = |e: &Value| {
        let (begin, duration) = (number(e, "ts"), number(e, "dur"));
        assert!(e["ph"] == "X" && e["pid"].is_u64() && e["tid"].is_u64(), "{e}");
        (e["name"].as_str().unwrap().to_string(), begin, begin + duration, e["args"]["number"].as_u64())
    };
    trace["traceEvents"].as_array().unwrap().iter().map(event).collect()
}

/// Every span of these names lies in one of `outer`.
fn assert_inside(events: &[(String, f64, f64, Option<u64>)], inner: &[&str], outer: &str) {
    for name in inner {
        let mut found = 0;
        for (_, begin, end, _) in events.iter().filter(|e| e.0 == *name) {
            found += 1;
            let inside = events.iter().any(|(n, b, e, _)| n == outer && b <= begin && end <= &(e + 1e-3));
            assert!(inside, "a {name} lies in no {outer}");
        }
        assert!(found > 0, "no {name}");
    }
}

#[test]
fn bench_train_times_every_phase_with_and_without_noise() {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace.json");
    // 4 prompts x 2 responses; each response has exactly 5 tokens, whatever is sampled.
    let args = ["bench", "train", &debug_yaml(), "--device", "cpu", "--steps", "2", "--lengths", "5", "--json", "-q"];
    let text = succeed(&[&args[..], &["--set", "trainer.threads=1", "--profile", trace.to_str().unwrap()]].concat());
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&report["bench"], &report["sequences"]), (&"train".into(), &8.into()), "{report}");
    assert_eq!((&report["response_tokens_mean"], &report["device"]), (&5.0.into(), &"cpu".into()));
    for key in ["config_hash", "machine", "version", "torch", "date", "commit", "peak_host_bytes"] {
        assert!(report.get(key).is_some(), "{key}: {report}");
    }
    let variants = report["variants"].as_array().unwrap();
    let names: Vec<&str> = variants.iter().map(|v| v["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["recipe", "without_matmul_error"]);
    for variant in variants {
        let phases = variant["phases"].as_array().unwrap();
        let names: Vec<&str> = phases.iter().map(|p| p["phase"].as_str().unwrap()).collect();
        assert_eq!(names, ["rollout", "logprobs", "update", "step"]);
        let seconds = |phase: usize| -> Vec<f64> {
            phases[phase]["seconds"]["all"].as_array().unwrap().iter().map(|s| s.as_f64().unwrap()).collect()
        };
        for step in 0..2 {
            let parts = seconds(0)[step] + seconds(1)[step] + seconds(2)[step];
            assert!(parts <= seconds(3)[step] && parts > 0.5 * seconds(3)[step], "{variant}");
        }
        assert_eq!(phases[0]["tokens"], 40, "8 responses of 5 tokens");
        for phase in phases {
            let median = number(&phase["seconds"], "median");
            assert!((number(phase, "tokens_per_s") * median - number(phase, "tokens")).abs() < 1e-6, "{phase}");
            assert!((number(phase, "flop_per_s") * median / number(phase, "flops") - 1.0).abs() < 1e-9, "{phase}");
            assert!(phase["mfu_ratio"].is_null() && number(phase, "flops") > 0.0);
        }
        assert!(variant["peak_device_bytes"].is_null());
        assert!(
            number(variant, "logprob_gap_abs") >= 0.0 && number(variant, "update_recomputed_flops") > 0.0,
            "{variant}"
        );
        for part in ["prefill", "decode", "old_logprobs", "reference_logprobs", "forward", "backward", "optimizer"] {
            assert!(number(&variant["breakdown_s"], part) > 0.0, "{part}: {variant}");
        }
    }
    assert_eq!(report["warnings"], serde_json::json!([]));
    let median = |variant: usize| number(&variants[variant]["phases"][3]["seconds"], "median");
    let ratio = number(&report["noise_time_ratio"], "step");
    assert!((ratio - median(0) / median(1)).abs() < 1e-9, "{ratio}");

    // Two measured steps of each variant, none of the warm-up's: 4 decode passes each after the prefill.
    let events = events(&trace);
    let count = |name: &str| events.iter().filter(|e| e.0 == name).count();
    assert_eq!((count("step"), count("prefill"), count("decode"), count("look")), (4, 4, 16, 16));
    assert_inside(&events, &["rollout", "logprobs", "update"], "step");
    assert_inside(&events, &["prefill", "decode", "look"], "rollout");
    assert_inside(&events, &["old_logprobs", "reference_logprobs"], "logprobs");
    assert_inside(&events, &["forward", "backward", "optimizer"], "update");
}

#[test]
fn bench_rollout_takes_lengths_from_a_file_and_a_model_directory() {
    let dir = tempfile::tempdir().unwrap();
    let lengths = dir.path().join("lengths.txt");
    std::fs::write(&lengths, "6 1 3\n9 4\n").unwrap();
    let file = config(dir.path(), "lengths", "noisy_ops: {enabled: false}");
    let args = ["bench", "rollout", file.to_str().unwrap(), "--device", "cpu", "--steps", "1", "--json", "-q"];
    let text = succeed(&[&args[..], &["--lengths", lengths.to_str().unwrap()]].concat());
    let report: Value = serde_json::from_str(&text).unwrap();
    let variants = report["variants"].as_array().unwrap();
    assert_eq!((variants.len(), &report["noise_time_ratio"]), (1, &Value::Null), "no error, no ratio: {report}");
    assert!(variants[0]["logprob_gap_abs"].is_null() && variants[0]["update_recomputed_flops"].is_null(), "{report}");
    let phases = variants[0]["phases"].as_array().unwrap();
    assert_eq!((phases.len(), &phases[0]["phase"]), (1, &"rollout".into()));
    // Lines in turn over 4 prompts of 2 members: 1 + 3 and 4 + 4, twice.
    assert_eq!((&phases[0]["tokens"], &report["prompt_tokens_mean"]), (&24.into(), &7.5.into()));
    assert_eq!(report["response_tokens_max"], 4);

    let text = succeed(&["bench", "rollout", &debug_yaml(), "--device", "cpu", "--steps", "1", "-q"]);
    for part in ["rollout", "without matmul error", "matmul error costs: rollout x", "lengths gsm8k", "host memory"] {
        assert!(text.contains(part), "{part} is missing from\n{text}");
    }
}

/// Frozen weights are quantized once in a run; here each variant measures its own.
#[test]
fn variants_of_adapters_beside_quantized_weights_are_injected_as_planned() {
    let dir = tempfile::tempdir().unwrap();
    let lines = "model: {lora: {rank: 2}}\nfake_quant: {enabled: true, weights: mxfp4}";
    let file = config(dir.path(), "adapters", lines);
    let args =
        ["bench", "train", file.to_str().unwrap(), "--device", "cpu", "--steps", "2", "--lengths", "5", "--json", "-q"];
    let report: Value = serde_json::from_str(&succeed(&args)).unwrap();
    assert_eq!(report["variants"].as_array().unwrap().len(), 2);
    assert_eq!(report["warnings"], serde_json::json!([]));
}

#[test]
fn what_is_wrong_with_a_step_benchmark_is_one_line() {
    let debug = debug_yaml();
    for (args, part) in [
        (&["--steps", "0"][..], "--steps <N>"),
        (&["--warmup", "18446744073709551615"], "--warmup <N>"),
        (&["--lengths", "0"], "--lengths 0"),
        (&["--lengths", "no/such/file"], "no/such/file: no such file"),
        (&["--profile", "no/such/dir/trace.json"], "--profile: no/such/dir/trace.json"),
        (&["--set", "trainer.microbatch_seqences=2"], "microbatch_sequences"),
    ] {
        let output = run(&[&["bench", "train", &debug, "--device", "cpu", "-q"][..], args].concat());
        let text = stderr_of(&output);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {text}");
        assert!(text.lines().count() == 1 && text.contains(part) && output.stdout.is_empty(), "{args:?}: {text}");
    }
}

#[test]
fn train_writes_a_trace_of_all_its_phases() {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace.json");
    let file = config(dir.path(), "traced", "trainer: {epochs: 1}");
    let mut args = train_args(&file, &dir.path().join("runs"));
    args.extend(["-q".to_string(), "--profile".to_string(), trace.display().to_string()]);
    succeed(&args);
    let events = events(&trace);
    let steps: Vec<Option<u64>> = events.iter().filter(|e| e.0 == "step").map(|e| e.3).collect();
    assert_eq!(steps, (1..=6).map(Some).collect::<Vec<_>>());
    assert_inside(&events, &["rollout", "logprobs", "update"], "step");
    assert_inside(&events, &["forward", "backward", "optimizer"], "update");
    let count = |name: &str| events.iter().filter(|e| e.0 == name).count();
    assert!(count("validation") > 0 && count("checkpoint") == 1, "{}", count("checkpoint"));
    assert!(events.windows(2).all(|pair| pair[0].1 <= pair[1].1), "sorted by begin");
}
