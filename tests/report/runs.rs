//! Run directories made by hand: every value is known, and any may be hostile.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

pub struct Made {
    pub name: &'static str,
    pub hash: &'static str,
    pub seed: u64,
    pub steps: u64,
    pub layers: usize,
    pub completion: &'static str,
    pub console: &'static str,
    /// Steps with a disagreement.
    pub disagreeing: &'static [u64],
}

pub const PLAIN: Made = Made {
    name: "pair-off",
    hash: "00000001",
    seed: 0,
    steps: 8,
    layers: 2,
    completion: "6 * 7 = 42",
    console: "step:1 - reward/mean:0.1\n",
    disagreeing: &[],
};

/// Questions of a validation.
pub const N: u64 = 40;

/// Right answers after `step`, different in every condition.
pub fn right(made: &Made, step: u64, condition: usize) -> u64 {
    let on = u64::from(made.name.ends_with("-on"));
    10 + step + 3 * on + made.seed - condition as u64
}

pub fn reward(made: &Made, step: u64) -> f64 {
    0.123_456_789 + 0.01 * step as f64 + 0.1 * made.seed as f64
}

impl Made {
    /// Its directory, as temper would have written it; with fewer steps than the configuration's 8 an unfinished run.
    pub fn write(&self, root: &Path) -> PathBuf {
        let dir = root.join(format!("{}-{}-s{}", self.name, self.hash, self.seed).replace(['<', '>', '/'], "_"));
        fs::create_dir_all(&dir).unwrap();
        let put = |file: &str, text: String| fs::write(dir.join(file), text).unwrap();
        let run = json!({
            "name": self.name, "config_hash": self.hash, "seed": self.seed, "device": "cpu", "threads": 2,
            "time_utc": format!("2026-01-02T00:0{}:0{}Z", self.hash.chars().last().unwrap(), self.seed),
            "git_commit": "0123456789abcdef", "cpu": {"model": "abacus", "simd": "avx2"}, "resumes": [],
        });
        put("run.json", run.to_string());
        put(
            "config.yaml",
            format!(
                "name: {:?}\nmodel: {{preset: tiny-4x64}}\ndata: {{kind: generated, prompts_per_step: 4, generated: {{train_problems: 16}}}}\n\
                 trainer: {{epochs: 2}}\nnoisy_ops: {{enabled: true, error_scale: 5e-2}}\nnoise_injection: {{enabled: {}}}\n",
                self.name,
                self.name.ends_with("-on")
            ),
        );
        put("console.log", self.console.to_string());
        let mut metrics = vec![self.validation(0)];
        let (mut timing, mut injection, mut samples) = (Vec::new(), Vec::new(), Vec::new());
        for step in 1..=self.steps {
            let sigma = 0.01 / step as f64;
            metrics.push(json!({
                "step": step, "kind": "train", "epoch": (step - 1) / 4, "reward/mean": reward(self, step), "entropy": 0.5,
                "kl/ref": 0.001, "ratio/clipped_low": 0.01, "ratio/clipped_high": 0.02, "response_tokens/mean": 12.5,
                "grad_norm": 1.5, "skipped_steps": 0.0, "aqn/sigma": sigma, "aqn/measured_std": 1.01 * sigma,
                "noisy_ops/measured_std_forward": 0.0501, "noisy_ops/measured_std_backward": 0.0499,
                "injection/disagreements": u64::from(self.disagreeing.contains(&step)),
            }));
            timing.push(json!({"step": step, "step_s": 2.0, "tokens_per_s": 100.0, "gpu_power_w": 300.0}));
            injection.extend((0..self.layers).map(|layer| self.injection(step, layer, sigma)));
            samples.push(json!({
                "step": step, "dataset_index": 5, "response": self.completion, "reward": 1.0, "advantage": 0.5, "finished": true,
            }));
        }
        if self.steps == 8 {
            metrics.push(self.validation(8));
        }
        let lines = |rows: Vec<Value>| rows.iter().map(|row| format!("{row}\n")).collect::<String>();
        put("metrics.jsonl", lines(metrics));
        put("timing.jsonl", lines(timing));
        put("injection.jsonl", lines(injection));
        put("samples.jsonl", lines(samples));
        dir
    }

    fn validation(&self, step: u64) -> Value {
        let mut row = json!({"step": step, "kind": "val", "epoch": 0, "val/n": N});
        for (place, condition) in ["clean", "noisy"].into_iter().enumerate() {
            let right = right(self, step, place);
            row[format!("val/correct_{condition}")] = json!(right);
            let marks: String = (0..N).map(|question| if question < right { '1' } else { '0' }).collect();
            row[format!("val/questions_{condition}")] = json!(marks);
        }
        row
    }

    fn injection(&self, step: u64, layer: usize, sigma: f64) -> Value {
        let noise = |measured: f64| json!({"planned": 0.05, "measured": measured, "standard_error": 0.001, "n": 1000});
        json!({
            "step": step, "module": format!("model.layers.{layer}.input_layernorm"), "index": layer,
            "aqn": {"planned": sigma, "measured": sigma * (1.0 + 0.1 * layer as f64), "n": 64},
            "matmul": {"planned": 0.05, "forward": noise(0.05), "rollout": noise(0.051), "dx": noise(0.049), "dw": noise(0.05)},
        })
    }
}

/// Two arms of two seeds.
pub fn pair(root: &Path) {
    for (name, hash) in [("pair-off", "00000001"), ("pair-on", "00000002")] {
        for seed in [0, 3] {
            Made { name, hash, seed, ..PLAIN }.write(root);
        }
    }
}
