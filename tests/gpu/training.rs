//! A training run beside a fake GPU: its keys are in timing.jsonl, and nothing else changes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use temper::device::gpu::monitor::Watch;
use temper::device::gpu::selection::Card;

use crate::small_run::{recipe, train_small};
use crate::support::FakeNvml;

/// 4 steps on the CPU; the run directory.
fn run(out: &Path, monitor: Option<Watch>) -> PathBuf {
    let recipe = recipe(|r| r.algorithm.kl_coef = 0.1);
    train_small(&recipe, out, monitor, Clone::clone).unwrap().run_dir
}

#[test]
fn the_gpu_is_in_timing_jsonl_and_metrics_are_the_same_bytes() {
    temper::device::set_threads(Some(1));
    let dir = tempfile::tempdir().unwrap();
    let fake = FakeNvml::new(
        "1.energy_per_call 3000\n1.throttle 64\n1.temperature 90\n1.utilization 80\n1.memory_utilization -",
    );
    let watch = |library: PathBuf| {
        Some(Watch { library: Some(library), card: Card::Index(1), every: Duration::from_millis(1) })
    };
    let with = run(&dir.path().join("with"), watch(fake.library()));
    let without = run(&dir.path().join("without"), None);
    let absent = run(&dir.path().join("absent"), watch("/nowhere/libnvidia-ml.so.1".into()));
    let timing = |run: &Path| -> Vec<Value> {
        let text = std::fs::read_to_string(run.join("timing.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let rows = timing(&with);
    assert_eq!(rows.len(), 4);
    for row in &rows {
        // NVML gives both rates in one answer.
        assert_eq!((row.get("gpu_utilization_ratio"), &row["gpu_temperature_c"]), (None, &90.into()), "{row}");
        assert_eq!(
            (&row["gpu_throttle_reasons"][0], &row["gpu_energy_source"]),
            (&"hw_thermal_slowdown".into(), &"counter".into())
        );
        assert!(row["gpu_energy_j"].as_f64().unwrap() >= 3.0 && row["gpu_power_w"] == 200.0, "{row}");
    }
    // Begin and end of 4 steps, and what the thread read in between.
    assert!(fake.logged("reading 1") > 8, "{}", fake.logged("reading 1"));
    assert_eq!((fake.logged("init"), fake.logged("shutdown")), (1, 1));
    for other in [&without, &absent] {
        assert!(timing(other).iter().all(|row| row.as_object().unwrap().keys().all(|key| !key.starts_with("gpu_"))));
        for file in ["metrics.jsonl", "injection.jsonl", "samples.jsonl"] {
            let [a, b] = [&with, other].map(|run| std::fs::read(run.join(file)).unwrap());
            assert!(a == b, "{file}");
        }
    }
    let said = std::fs::read_to_string(with.join("console.log")).unwrap();
    assert_eq!(said.matches("warning: GPU 1 is throttled: hw_thermal_slowdown at 90 °C").count(), 1, "{said}");
    assert!(!std::fs::read_to_string(without.join("console.log")).unwrap().contains("GPU"));
}

#[test]
fn what_a_step_computed_is_in_timing_jsonl() {
    temper::device::set_threads(Some(1));
    let dir = tempfile::tempdir().unwrap();
    let run = run(dir.path(), None);
    let rows = |file: &str| -> Vec<Value> {
        let text = std::fs::read_to_string(run.join(file)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let metrics = rows("metrics.jsonl");
    for row in rows("timing.jsonl") {
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key}: {row}"));
        for phase in ["rollout", "logprobs", "update"] {
            let flops = number(&format!("{phase}_flops"));
            let rate = flops / number(&format!("{phase}_s"));
            let said = number(&format!("{phase}_flop_per_s"));
            assert!(flops > 0.0 && (said / rate - 1.0).abs() < 1e-9, "{phase}: {row}");
            assert!(row[format!("{phase}_mfu_ratio")].is_null(), "a CPU has no ceiling: {row}");
        }
        // Two policies' log-probs are two forward passes, the update is three.
        assert!((number("update_flops") / number("logprobs_flops") - 1.5).abs() < 1e-9, "{row}");
        let metric = metrics.iter().find(|m| m["step"] == row["step"] && m["kind"] == "train").unwrap();
        let sampled = number("rollout_tokens_per_s") * number("rollout_s");
        let sequences = sampled / metric["response_tokens/mean"].as_f64().unwrap();
        assert!((sequences - sequences.round()).abs() < 1e-6 && sequences > 0.5, "{sequences}: {row}");
        assert!(row["peak_device_bytes"].is_null() && number("peak_host_bytes") > 50e6, "{row}");
    }
}
