//! e5c_mini, e9a_mini and e9b_mini on the real GSM8K file and the real tokenizer: all 24 steps with short responses.
//! What injection.jsonl says was injected is what the experiment plans, for every norm and step.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::{rows, run_dir, succeed, train_args};

/// Test data outside the repository; `None` (printed) where it is absent.
fn shared() -> Option<PathBuf> {
    let root = std::env::var_os("TEMPER_SHARED")
        .map(PathBuf::from)
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join("shared"));
    if !root.join("data").join("gsm8k_train.jsonl").exists() {
        println!("skipped: {} has no GSM8K", root.display());
        return None;
    }
    Some(root)
}

struct Mini {
    /// Norms that get AQN in a noisy stage.
    touched: u64,
    injection: Vec<Value>,
    metrics: Vec<Value>,
}

/// Runs `configs/NAME.yaml`, shortened: two responses of two tokens, one validation.
fn train(name: &str, touched: u64) -> Option<Mini> {
    let shared = shared()?;
    let dir = tempfile::tempdir().unwrap();
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs").join(format!("{name}.yaml"));
    let mut args = train_args(&config, dir.path());
    args.push("--json".to_string());
    for set in [
        format!("model.tokenizer={}", shared.join("fixtures/qwen2.5_tokenizer").display()),
        format!("data.train={}", shared.join("data/gsm8k_train.jsonl").display()),
        format!("data.val={}", shared.join("data/gsm8k_test.jsonl").display()),
        "data.max_response_tokens=2".to_string(),
        "data.val_limit=2".to_string(),
        "trainer.val_before_train=false".to_string(),
        "trainer.save_every=24".to_string(),
        "trainer.val_every=24".to_string(),
        "rollout.group_size=2".to_string(),
    ] {
        args.extend(["--set".to_string(), set]);
    }
    let result: Value = serde_json::from_str(&succeed(&args)).unwrap();
    assert_eq!(result["disagreeing_steps"], 0, "{result}");
    let run = run_dir(dir.path());
    Some(Mini { touched, injection: rows(&run.join("injection.jsonl")), metrics: rows(&run.join("metrics.jsonl")) })
}

impl Mini {
    /// Every norm of every step against `multiplier(layer)` (None: the final norm) times the step's sigma; matmul
    /// noise against 5 %.
    fn check(&self, multiplier: impl Fn(Option<usize>) -> f64) {
        let train: Vec<&Value> = self.metrics.iter().filter(|r| r["kind"] == "train").collect();
        assert_eq!(train.len(), 24);
        let mut widest = 0.0f64;
        let mut norms = 0;
        for row in self.injection.iter().filter(|r| r.get("aqn").is_some()) {
            let sigma = train[row["step"].as_u64().unwrap() as usize - 1]["aqn/sigma"].as_f64().unwrap();
            let name = row["module"].as_str().unwrap();
            let layer = name.strip_prefix("model.layers.").map(|rest| rest.split('.').next().unwrap().parse().unwrap());
            let number = |key: &str| row["aqn"][key].as_f64().unwrap();
            let planned = multiplier(layer) * sigma;
            assert!((number("planned") - planned).abs() <= 1e-12, "{row}");
            if planned == 0.0 {
                assert_eq!((number("measured"), number("effective")), (0.0, 0.0), "{row}");
            } else {
                let deviation = (number("measured") - planned).abs() / number("standard_error");
                assert!(deviation <= 4.0, "{row}");
                widest = widest.max(deviation);
            }
            norms += 1;
        }
        assert_eq!(norms, 24 * 57);
        for row in train {
            for direction in ["forward", "backward"] {
                assert!(row[format!("noisy_ops/{direction}_calls")].as_u64().unwrap() > 0, "{row}");
                let measured = row[format!("noisy_ops/measured_std_{direction}")].as_f64().unwrap();
                assert!((measured - 0.05).abs() < 0.001, "{direction}: {row}");
            }
        }
        println!("{norms} norms and steps, the widest {widest:.2} standard errors from its plan");
    }

    /// Every stage of both epochs, two steps each: clean, then 1e-2 -> 1e-5 in ten geometric values, five an epoch.
    fn check_stages(&self) {
        let exponents = |epoch: usize| (0..5).map(move |k| -2.0 - 1.5 * (epoch as f64 + f64::from(k) / 4.0));
        let epoch = |e: usize| std::iter::once(0.0).chain(exponents(e).map(|x| 10f64.powf(x)));
        let expected: Vec<f64> = (0..2).flat_map(epoch).flat_map(|sigma| [sigma, sigma]).collect();
        let train = self.metrics.iter().filter(|r| r["kind"] == "train");
        for (row, expected) in train.zip(expected) {
            let sigma = row["aqn/sigma"].as_f64().unwrap();
            assert!((sigma - expected).abs() <= 1e-9 * expected, "expected {expected}: {row}");
            let modules = if sigma == 0.0 { 0 } else { self.touched };
            assert_eq!(row["aqn/modules"], modules, "{row}");
        }
    }

    fn touched_layers(&self) -> BTreeSet<usize> {
        let touched = self.injection.iter().filter(|r| r["aqn"]["measured"].as_f64().is_some_and(|m| m > 0.0));
        touched
            .filter_map(|r| r["module"].as_str()?.strip_prefix("model.layers.")?.split('.').next()?.parse().ok())
            .collect()
    }
}

#[test]
fn e5c_touches_every_norm_alike() {
    let Some(mini) = train("e5c_mini", 57) else { return };
    mini.check(|_| 1.0);
    mini.check_stages();
    assert_eq!(mini.touched_layers(), (0..28).collect());
}

#[test]
fn e9a_touches_layers_14_to_17_alone() {
    let Some(mini) = train("e9a_mini", 8) else { return };
    mini.check(|layer| if layer.is_some_and(|l| (14..=17).contains(&l)) { 1.0 } else { 0.0 });
    mini.check_stages();
    assert_eq!(mini.touched_layers(), (14..=17).collect());
}

#[test]
fn e9b_scales_layers_by_their_multipliers() {
    let Some(mini) = train("e9b_mini", 57) else { return };
    mini.check(|layer| match layer {
        Some(14..=17) => 1.5,
        Some(10..=13 | 18..=21) => 1.2,
        _ => 1.0,
    });
    mini.check_stages();
    // The step of the largest sigma, where the multipliers stand out from the spread of the measurements.
    let mean = |layers: &[usize]| {
        let prefixes: Vec<String> = layers.iter().map(|l| format!("model.layers.{l}.")).collect();
        let of_layers = mini.injection.iter().filter(|r| {
            r["step"] == 3 && prefixes.iter().any(|p| r["module"].as_str().is_some_and(|m| m.starts_with(p)))
        });
        let measured: Vec<f64> = of_layers.filter_map(|r| r["aqn"]["measured"].as_f64()).collect();
        assert_eq!(measured.len(), 2 * layers.len());
        (measured.iter().map(|m| m * m).sum::<f64>() / measured.len() as f64).sqrt() / 0.01
    };
    let (worst, near, others) = (mean(&[14, 15, 16, 17]), mean(&[10, 11, 12, 13, 18, 19, 20, 21]), mean(&[0, 1, 2, 3]));
    println!("measured multipliers {worst:.3} {near:.3} {others:.3}");
    assert!((worst - 1.5).abs() < 0.15 && (near - 1.2).abs() < 0.09 && (others - 1.0).abs() < 0.1);
}
