//! Whole training runs by the way that a GPU takes, every kernel under the shim: what they compute, and what they say of their
//! noise, is what the CPU's own operations do. The code between model and kernels runs here, that no test of a kernel sees.

use std::path::Path;

use serde_json::Value;
use tch::{Device, Kind};
use temper::cli::{Global, train};
use temper::config::load;
use temper::data::generated;
use temper::model::config::Qwen2Config;
use temper::model::load::{random_model, save_model};
use temper::model::section::Dtype;
use temper::ops::cuda::place::with_host;
use temper::run::signals::Interrupt;

use crate::host::Shim;

/// Heads that every kernel is for, and a few steps of a few tokens. The entropy has a gradient whatever the rewards are.
const SETS: [&str; 10] = [
    "model.preset=null",
    "data.prompts_per_step=2",
    "data.generated.train_problems=4",
    "data.generated.val_problems=2",
    "data.max_response_tokens=6",
    "algorithm.entropy_coef=0.05",
    "trainer.epochs=1",
    "trainer.minibatch_prompts=2",
    "trainer.threads=1",
    "trainer.val_before_train=false",
];

fn model_dir(dir: &Path) -> String {
    let model = dir.join("model");
    std::fs::create_dir(&model).unwrap();
    generated::write_tokenizer(&model).unwrap();
    let config = Qwen2Config { num_hidden_layers: 2, head_dim: 64, ..Qwen2Config::preset("tiny-4x64").unwrap() };
    let weights = random_model(config, 5, 0.1, Device::Cpu, Kind::Float).unwrap();
    save_model(&weights, Dtype::F32, None, &model).unwrap();
    model.display().to_string()
}

struct Run {
    metrics: Vec<Value>,
    injection: Vec<Value>,
}

fn run(dir: &Path, model: &str, name: &str, sets: &[&str]) -> Run {
    let debug = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/debug.yaml");
    let mut all: Vec<String> = SETS.iter().chain(sets).map(|set| set.to_string()).collect();
    all.extend([format!("model.path={model}"), format!("name={name}")]);
    let config = load(&debug, &all).unwrap_or_else(|e| panic!("{e}"));
    let global = Global { device: Some("cpu".into()), json: false, quiet: true, verbose: 0 };
    let outcome = train::train(&config, &dir.join(name), false, &global, &Interrupt::never());
    let outcome = outcome.unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(outcome.disagreeing_steps, 0, "{name}");
    let rows = |file: &str| {
        let text = std::fs::read_to_string(outcome.run_dir.join(file)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<Value>>()
    };
    Run { metrics: rows("metrics.jsonl"), injection: rows("injection.jsonl") }
}

/// How near numbers must be, and of which keys of metrics.jsonl.
#[derive(Clone, Copy)]
enum Same {
    /// To rounding in f32, all of them.
    Values,
    /// In bf16 a token may be another one, and all values after it. What was injected is what was planned all the same.
    Injection,
}

impl Same {
    fn assert(self, found: &Value, expected: &Value, what: &str) {
        match (found, expected) {
            (Value::Object(found), Value::Object(expected)) => {
                let (keys, of_expected): (Vec<_>, Vec<_>) = (found.keys().collect(), expected.keys().collect());
                assert_eq!(keys, of_expected, "{what}");
                for (key, value) in found.iter().filter(|(key, _)| self.compares(key)) {
                    self.assert(value, &expected[key], &format!("{what}: {key}"));
                }
            }
            (Value::Number(found), Value::Number(expected)) if found.is_f64() => {
                let (found, expected) = (found.as_f64().unwrap(), expected.as_f64().unwrap());
                let (relative, absolute) = match self {
                    Same::Values => (1e-3, 1e-5),
                    Same::Injection => (0.5, 1e-5),
                };
                let near = (found - expected).abs() <= relative * expected.abs() + absolute;
                assert!(near, "{what}: {found}, expected {expected}");
            }
            _ => assert_eq!(found, expected, "{what}"),
        }
    }

    fn compares(self, key: &str) -> bool {
        // A key, or what it begins with.
        const OF_VALUES: [&str; 14] = [
            "reward/",
            "response_tokens/",
            "loss/",
            "kl/",
            "ratio/",
            "logprob_gap/",
            "val/",
            "grad_norm",
            "entropy",
            "output_changed_ratio",
            "standard_error",
            "n",
            "calls",
            "noisy_ops/forward_calls",
        ];
        matches!(self, Same::Values)
            || !OF_VALUES.iter().any(|of| key == *of || of.ends_with('/') && key.starts_with(of))
    }
}

fn assert_same(sets: &[&str], same: Same) {
    let dir = tempfile::tempdir().unwrap();
    let model = model_dir(dir.path());
    let expected = run(dir.path(), &model, "here", sets);
    let found = with_host(&Shim(0), || run(dir.path(), &model, "there", sets));
    assert!(!expected.injection.is_empty() && expected.metrics.len() >= 3);
    for (found, expected) in [(&found.metrics, &expected.metrics), (&found.injection, &expected.injection)] {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            same.assert(found, expected, &format!("{sets:?}: {expected}"));
        }
    }
}

#[test]
fn a_run_in_f32_is_the_cpus() {
    assert_same(&[], Same::Values);
}

/// The head and AQN on linears and in the update too, blocks computed again, sequences one by one, rows refilled.
#[test]
fn a_run_with_everything_in_f32_is_the_cpus() {
    let sets = [
        "noisy_ops={exclude_modules: [], draw: shared}",
        "noise_injection={layer_types: [rmsnorm, linear], apply_to: rollout_and_update}",
        "trainer={gradient_checkpointing: true, microbatch_sequences: 1}",
        "rollout.max_sequences=2",
    ];
    assert_same(&sets, Same::Values);
}

#[test]
fn a_run_in_bf16_with_quantized_weights_and_activations_is_the_cpus() {
    assert_same(
        &["model.dtype=bf16", "fake_quant={enabled: true, weights: nvfp4, activations: mxfp4}"],
        Same::Injection,
    );
}

#[test]
fn adapters_beside_packed_weights_are_the_cpus() {
    let sets = ["model.dtype=bf16", "model.lora={rank: 4}", "fake_quant={enabled: true, weights: mxfp4}"];
    assert_same(&sets, Same::Injection);
}
