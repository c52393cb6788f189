//! `temper sweep`: every arm under its own configuration, nothing run twice, mistakes named before anything runs.

use serde_json::Value;

use crate::support::{config, model, run, stderr_of, succeed};

#[test]
fn arms_and_seeds_are_run_once_and_summed_up() {
    let dir = tempfile::tempdir().unwrap();
    config(dir.path(), "small", "data: {val_limit: 8}\ntrainer: {epochs: 1, val_every: 0, save_every: 0}");
    let file = dir.path().join("sweep.yaml");
    let text = "name: pair\nbase: small.yaml\nset: {noisy_ops.error_scale: 0.02}\n\
                arms: {off: {noise_injection.enabled: false}, on: {}}\nseeds: [3, 1]\n";
    std::fs::write(&file, text).unwrap();
    let out = dir.path().join("runs");
    let args = ["sweep", file.to_str().unwrap(), "--out", out.to_str().unwrap(), "--json", "-q", "--device", "cpu"];
    let first: Value = serde_json::from_str(&succeed(&args)).unwrap();
    let arms = first["arms"].as_array().unwrap();
    let names: Vec<&str> = arms.iter().map(|arm| arm["arm"].as_str().unwrap()).collect();
    assert_eq!(names, ["off", "off", "on", "on"], "{first}");
    for arm in arms {
        let each: Vec<f64> = arm["accuracies"].as_array().unwrap().iter().map(|a| a.as_f64().unwrap()).collect();
        assert_eq!(each.len(), 2);
        assert!((arm["mean"].as_f64().unwrap() - (each[0] + each[1]) / 2.0).abs() < 1e-12);
    }
    let runs = || -> Vec<(String, Vec<u8>)> {
        let entries = std::fs::read_dir(&out).unwrap().flatten().map(|entry| entry.path()).filter(|path| path.is_dir());
        let mut all: Vec<_> = entries
            .map(|path| {
                let name = path.file_name().unwrap().to_string_lossy().into_owned();
                (name, std::fs::read(path.join("timing.jsonl")).unwrap())
            })
            .collect();
        all.sort();
        all
    };
    let before = runs();
    assert_eq!(before.len(), 4);
    assert!(before.iter().filter(|(name, _)| name.starts_with("pair-off-") && name.ends_with("-s1")).count() == 1);
    let resolved = |name: &str| std::fs::read_to_string(out.join(name).join("config.yaml")).unwrap();
    assert!(before.iter().all(|(name, _)| resolved(name).contains("error_scale: 0.02")));
    // The clock's file would grow if a step were run again.
    let second: Value = serde_json::from_str(&succeed(&args)).unwrap();
    assert_eq!(second, first);
    assert_eq!(runs(), before);
}

#[test]
fn mistakes_name_the_file_and_the_arm() {
    let dir = tempfile::tempdir().unwrap();
    let _ = model();
    config(dir.path(), "small", "");
    let file = dir.path().join("sweep.yaml");
    for (text, parts) in [
        ("name: x\nbase: small.yaml\narms: {a: {optimizer.lrr: 1}}\nseeds: [0]\n", ["arm a", "lrr"]),
        ("name: x\nbase: small.yaml\narms: {a: 3}\nseeds: [0]\n", ["arms.a", "map"]),
        ("name: x\nbase: small.yaml\narms: {}\nseeds: [0]\n", ["0 arms", "expected"]),
        ("name: x\nbase: small.yaml\narms: {a: {}}\nseeds: [0, 0]\n", ["seeds", "twice"]),
        ("name: x\nbase: none.yaml\narms: {a: {}}\nseeds: [0]\n", ["none.yaml", "arm a"]),
        (
            "name: x\nbase: small.yaml\narms: {a: {trainer.threads: 1}, b: {trainer.threads: 2}}\nseeds: [0]\n",
            ["arm b: trainer.threads: found 2, expected 1 as in arm a", "--parallel 1"],
        ),
        ("name: x\nbases: none.yaml\narms: {a: {}}\nseeds: [0]\n", ["sweep.yaml", "bases"]),
    ] {
        std::fs::write(&file, text).unwrap();
        let output = run(&["sweep", file.to_str().unwrap(), "-q"]);
        let line = stderr_of(&output);
        assert_eq!((output.status.code(), line.lines().count()), (Some(2), 1), "{line}");
        assert!(parts.iter().all(|part| line.contains(part)), "{text}: {line}");
    }
}

#[test]
fn a_dry_run_lists_directories() {
    let dir = tempfile::tempdir().unwrap();
    config(dir.path(), "small", "");
    let file = dir.path().join("sweep.yaml");
    std::fs::write(&file, "name: x\nbase: small.yaml\narms: {a: {}, b: {optimizer.lr: 1e-5}}\nseeds: [0]\n").unwrap();
    let args = ["sweep", file.to_str().unwrap(), "--dry-run"];
    let listed: Value = serde_json::from_str(&succeed(&[&args[..], &["--json"]].concat())).unwrap();
    let listed: Vec<&str> = listed["runs"].as_array().unwrap().iter().map(|run| run.as_str().unwrap()).collect();
    assert!(listed.len() == 2 && listed[1].starts_with("runs/x-b-"), "{listed:?}");
    assert_eq!(succeed(&args).trim(), listed.join("\n"));
}

/// The shipped definition resolves, and its layer files are a scan's.
#[test]
fn srdd_compare_resolves() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let sets = ["model.path=somewhere".to_string()];
    let jobs = temper::config::sweep::jobs(&root.join("configs/sweeps/srdd_compare.yaml"), &sets).unwrap();
    assert_eq!(jobs.len(), 12);
    let of = |arm: &str| &jobs.iter().find(|job| job.arm == arm).unwrap().config;
    assert!(!of("none").noise_injection.enabled && of("global").noise_injection.enabled);
    let layers = |arm: &str| {
        let config = of(arm).noise_injection.layer_sigma_config.clone().unwrap();
        (0..28).map(|layer| config.layer_multipliers[&layer]).collect::<Vec<f64>>()
    };
    let (guided, healthy) = (layers("guided"), layers("healthy"));
    assert_eq!(guided.iter().filter(|m| **m == 1.5).count(), 5);
    assert_eq!(healthy.iter().filter(|m| **m == 0.0).count(), 9);
    // Healthy are those that the scan finds least sensitive.
    assert!((0..28).all(|l| guided[l] < 1.5 || healthy[l] == 0.0));
}
