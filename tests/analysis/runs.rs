//! Hand-made run directories: what metrics.jsonl, run.json and config.yaml of a run hold, as far as a comparison reads it.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// A run of the generated task, 2 epochs of 3 steps, that can be changed before it is written.
pub struct Made {
    pub name: &'static str,
    pub hash: &'static str,
    pub seed: u64,
    pub config: Value,
    pub run: Value,
    /// (step, [(condition, marks)])
    pub validations: Vec<(u64, Vec<(&'static str, String)>)>,
    pub steps: u64,
    pub disagreeing: u64,
    /// Whether the marks of questions are written.
    pub marked: bool,
}

impl Made {
    pub fn new(name: &'static str, hash: &'static str, seed: u64, marks: &str) -> Made {
        Made {
            name,
            hash,
            seed,
            config: json!({
                "name": name, "seed": seed,
                "data": {
                    "kind": "generated", "prompts_per_step": 4, "train_limit": null, "max_response_tokens": 24,
                    "prompt_suffix": "", "generated": {"train_problems": 12, "val_problems": 8, "seed": 0}
                },
                "trainer": {"epochs": 2}, "optimizer": {"lr": 1e-4}, "reward": {"mode": "strict"},
                "noisy_ops": {
                    "enabled": true, "error_scale": 0.05, "exclude_modules": ["lm_head"], "dw_draw": "per_update"
                },
                "noise_injection": {"enabled": true, "compat": null, "layer_sigma_config": null},
                "fake_quant": {"enabled": false, "weights": "mxfp4", "activations": null},
            }),
            run: json!({
                "name": name, "config_hash": hash, "seed": seed, "inputs": {"tokenizer": "t0", "model": "m0"},
                "git_commit": "c0", "temper_version": "0.1.0", "libtorch_version": "2.11", "noise_version": 1,
                "device": "cpu", "threads": 2, "cpu": {"model": "A", "simd": "avx2"}, "resumes": [],
            }),
            validations: vec![(0, vec![("clean", "0".repeat(marks.len()))]), (6, vec![("clean", marks.to_string())])],
            steps: 6,
            disagreeing: 0,
            marked: true,
        }
    }

    pub fn write(&self, root: &Path) -> PathBuf {
        let dir = root.join(format!("{}-{}-s{}", self.name, self.hash, self.seed));
        std::fs::create_dir_all(&dir).unwrap();
        let mut rows: Vec<Value> = self.validations.iter().map(|(step, of)| self.validation(*step, of)).collect();
        rows.extend((1..=self.steps).map(|step| {
            let disagreements = u64::from(step <= self.disagreeing);
            json!({"step": step, "kind": "train", "epoch": (step - 1) / 3, "injection/disagreements": disagreements})
        }));
        rows.sort_by_key(|row| (row["step"].as_u64(), row["kind"] == "val"));
        let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
        std::fs::write(dir.join("metrics.jsonl"), lines).unwrap();
        std::fs::write(dir.join("run.json"), self.run.to_string()).unwrap();
        std::fs::write(dir.join("config.yaml"), self.config.to_string()).unwrap(); // JSON is YAML
        dir
    }

    fn validation(&self, step: u64, conditions: &[(&str, String)]) -> Value {
        let mut row = json!({"step": step, "kind": "val", "epoch": 0});
        for (condition, marks) in conditions {
            let correct = marks.matches('1').count();
            row["val/n"] = json!(marks.len());
            row[format!("val/correct_{condition}")] = json!(correct);
            row[format!("val/acc_{condition}")] = json!(correct as f64 / marks.len() as f64);
            if self.marked {
                row[format!("val/questions_{condition}")] = json!(marks);
            }
        }
        row
    }
}

/// `share` of 40 questions right, which ones depends on `shift`.
pub fn forty(share: usize, shift: usize) -> String {
    (0..40).map(|q| if (q * 7 + shift * 11) % 40 < share { '1' } else { '0' }).collect()
}
