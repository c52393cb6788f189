//! `temper compare`: what it computes from run directories, its forms, and what it refuses.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::hand_values::close;
use crate::runs::{Made, forty};

pub fn compare(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_temper")).arg("compare").args(args).output().unwrap()
}

pub fn stdout(args: &[&str]) -> String {
    let output = compare(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

pub fn json(args: &[&str]) -> Value {
    serde_json::from_str(&stdout(&[args, &["--json"]].concat())).unwrap()
}

/// Arms `plain` (seeds 0, 1, 2) and `noise` (seeds 0, 1, 2), the latter better, with a condition that only it has.
fn two_arms(root: &Path) {
    for seed in 0..3 {
        let shift = seed as usize;
        Made::new("plain", "aaaaaaaa", seed, &forty(20 + shift, shift)).write(root);
        let mut noise = Made::new("noise", "bbbbbbbb", seed, &forty(32 + shift, shift));
        noise.config["optimizer"]["lr"] = serde_json::json!(2e-4);
        noise.config["noise_injection"]["layer_sigma_config"] = serde_json::json!({"layer_multipliers": {"0": 1.5}});
        noise.validations[1].1.push(("noisy", forty(25, shift)));
        noise.validations.insert(1, (3, vec![("clean", forty(36, 0))]));
        noise.write(root);
    }
}

#[test]
fn arms_seeds_and_pairs() {
    let dir = tempfile::tempdir().unwrap();
    two_arms(dir.path());
    let root = dir.path().to_str().unwrap();
    let found = json(&[root, "--baseline", "plain"]);
    assert_eq!(found["baseline"], "plain");
    let names: Vec<&str> = found["arms"].as_array().unwrap().iter().map(|a| a["arm"].as_str().unwrap()).collect();
    assert_eq!(names, ["plain", "noise"]);
    let plain = &found["arms"][0];
    assert_eq!(plain["runs"].as_array().unwrap().len(), 3);
    let run = &plain["runs"][1]["conditions"][0];
    assert_eq!((&run["correct"], &run["n"], &run["step"]), (&21.into(), &40.into(), &6.into()));
    close(run["accuracy"].as_f64().unwrap(), 21.0 / 40.0, 1e-15);
    // Wilson for 21 of 40: centre (.525 + 3.841459/80)/(1 + 3.841459/40).
    let (low, high) = (run["ci95"][0].as_f64().unwrap(), run["ci95"][1].as_f64().unwrap());
    close(0.5 * (low + high), (0.525 + 3.841_459 / 80.0) / (1.0 + 3.841_459 / 40.0), 1e-6);
    // Over seeds: .5, .525, .55.
    let over = &plain["conditions"][0];
    assert_eq!(over["seeds"], 3);
    close(over["mean"].as_f64().unwrap(), 0.525, 1e-15);
    close(over["standard_error"].as_f64().unwrap(), 0.025 / 3f64.sqrt(), 1e-12);
    close(over["ci95"][1].as_f64().unwrap(), 0.525 + 4.302_652_73 * 0.025 / 3f64.sqrt(), 1e-8);
    // The best of noise is a validation before the last, 36 of 40.
    let best = &found["arms"][1]["runs"][0]["conditions"][0];
    assert_eq!((&best["best_step"], &best["best_accuracy"], &best["correct"]), (&3.into(), &0.9.into(), &32.into()));

    let [pair] = &found["pairs"].as_array().unwrap()[..] else { panic!("{}", found["pairs"]) };
    assert_eq!(
        (&pair["arm"], &pair["condition"], &pair["method"]),
        (&"noise".into(), &"clean".into(), &"two_way".into())
    );
    close(pair["difference"].as_f64().unwrap(), 12.0 / 40.0, 1e-12);
    // The same questions and 12 more, in every seed: nothing that plain alone answered.
    for test in pair["by_seed"].as_array().unwrap() {
        assert_eq!((&test["first_only"], &test["second_only"]), (&12.into(), &0.into()));
        close(test["p_exact"].as_f64().unwrap(), 2.0 / 4096.0, 1e-15);
        close(test["p_mid"].as_f64().unwrap(), 1.0 / 4096.0, 1e-15);
    }
    assert_eq!(pair["by_seed"].as_array().unwrap().len(), 3);
    close(pair["discordance"].as_f64().unwrap(), 0.3, 1e-12);
    assert_eq!(pair["p"], pair["p_holm"]);
    let p = pair["p"].as_f64().unwrap();
    assert!(p > 0.0 && p < 0.01, "{pair}");
    for interval in ["ci95", "bootstrap_ci95"] {
        let (low, high) = (pair[interval][0].as_f64().unwrap(), pair[interval][1].as_f64().unwrap());
        assert!(0.0 < low && low < 0.3 && 0.3 < high && high < 0.6, "{interval}: {pair}");
    }
    assert!(pair["minimum_detectable_difference"].as_f64().unwrap() > 2.8 * pair["standard_error"].as_f64().unwrap());

    let keys: Vec<&str> =
        found["config_differences"].as_array().unwrap().iter().map(|d| d["key"].as_str().unwrap()).collect();
    let layers = "noise_injection.layer_sigma_config.layer_multipliers";
    assert_eq!(keys, [layers, "optimizer.lr"]);
    assert_eq!(found["config_differences"][1]["values"], serde_json::json!({"plain": 1e-4, "noise": 2e-4}));

    // Without --baseline the first arm is one, here by the directories' names; a run given twice counts once.
    let run = dir.path().join("noise-bbbbbbbb-s0");
    let again = json(&[root, run.to_str().unwrap()]);
    assert_eq!((&again["baseline"], &again["arms"][0]["runs"].as_array().unwrap().len()), (&"noise".into(), &3));
    close(again["pairs"][0]["difference"].as_f64().unwrap(), -0.3, 1e-12);
}

#[test]
fn one_seed_is_mcnemar_and_other_seeds_are_unpaired() {
    let dir = tempfile::tempdir().unwrap();
    for (name, hash, seed, right) in [
        ("base", "00000000", 0, 20),
        ("one", "11111111", 0, 30),
        ("base", "00000000", 1, 22),
        ("apart", "22222222", 5, 31),
        ("apart", "22222222", 6, 33),
        ("alone", "33333333", 7, 33),
    ] {
        Made::new(name, hash, seed, &forty(right, 0)).write(dir.path());
    }
    let found = json(&[dir.path().to_str().unwrap(), "--baseline", "base"]);
    let pair = |arm: &str| found["pairs"].as_array().unwrap().iter().find(|pair| pair["arm"] == arm);
    let one = pair("one").unwrap();
    assert_eq!(
        (&one["method"], &one["seeds"], &one["bootstrap_ci95"]),
        (&"mc_nemar".into(), &serde_json::json!([1, 1]), &Value::Null)
    );
    close(one["p"].as_f64().unwrap(), 1.0 / 1024.0, 1e-15);
    close(one["minimum_detectable_difference"].as_f64().unwrap(), 2.801_585_2 * 10f64.sqrt() / 40.0, 1e-7);
    let apart = pair("apart").unwrap();
    assert_eq!((&apart["method"], &apart["seeds"]), (&"two_way_unpaired".into(), &serde_json::json!([2, 2])));
    close(apart["difference"].as_f64().unwrap(), 11.0 / 40.0, 1e-12);
    assert!(apart["by_seed"].as_array().unwrap().is_empty());
    assert!(pair("alone").is_none(), "one run of another seed is no pair");
    // Holm over the two tests: the smaller twice.
    let p: Vec<f64> = [one, apart].iter().map(|pair| pair["p"].as_f64().unwrap()).collect();
    let adjusted: Vec<f64> = [one, apart].iter().map(|pair| pair["p_holm"].as_f64().unwrap()).collect();
    let (small, large) = if p[0] < p[1] { (0, 1) } else { (1, 0) };
    close(adjusted[small], 2.0 * p[small], 1e-15);
    close(adjusted[large], p[large].max(2.0 * p[small]), 1e-15);
}

#[test]
fn every_form_has_the_figures() {
    let dir = tempfile::tempdir().unwrap();
    two_arms(dir.path());
    let root = dir.path().to_str().unwrap();
    let text = stdout(&[root, "--baseline", "plain"]);
    for part in
        ["difference from plain", "+30.00", "21 / 40", "90.00 (step 3)", "optimistic", "optimizer.lr", "WARNING: "]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    let markdown = stdout(&[root, "--baseline", "plain", "--format", "markdown"]);
    assert!(markdown.contains("| noise | clean | 3 x 40 | +30.00 |") && markdown.contains("|---|"), "{markdown}");
    let rows = markdown.lines().filter(|line| line.starts_with("| "));
    let columns = |line: &str| line.matches(" |").count();
    assert!(rows.map(columns).filter(|n| *n == 9).count() >= 2, "{markdown}");

    let file = dir.path().join("out.csv");
    let output = compare(&[root, "--baseline", "plain", "--format", "csv", "-o", file.to_str().unwrap()]);
    assert!(output.status.success() && output.stdout.is_empty());
    assert!(
        String::from_utf8(output.stderr).unwrap().contains("what the last validation has differs"),
        "warnings go to stderr"
    );
    let csv = std::fs::read_to_string(&file).unwrap();
    let lines: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
    assert!(lines.iter().all(|line| line.len() == 22), "{csv}");
    let of = |line: &[&str], column: &str| line[lines[0].iter().position(|c| *c == column).unwrap()].to_string();
    let arm = lines.iter().find(|line| (line[0], line[1], line[3]) == ("arm", "noise", "clean")).unwrap();
    close(of(arm, "difference").parse().unwrap(), 0.3, 1e-12);
    close(of(arm, "accuracy").parse().unwrap(), 33.0 / 40.0, 1e-12);
    let p = json(&[root, "--baseline", "plain"])["pairs"][0]["p"].as_f64().unwrap();
    close(of(arm, "p").parse().unwrap(), p, 1e-18);
    let run = lines.iter().find(|line| (line[0], line[1], line[2]) == ("run", "plain", "1")).unwrap();
    assert_eq!((of(run, "correct"), of(run, "best_step")), ("21".to_string(), "6".to_string()));
}

#[test]
fn bad_input_is_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let good = Made::new("good", "aaaaaaaa", 0, "1100").write(dir.path());
    let twice = tempfile::tempdir().unwrap();
    let copy = Made::new("good", "aaaaaaaa", 0, "1100").write(twice.path());
    let mut lying = Made::new("lying", "cccccccc", 0, "1100");
    lying.marked = false;
    let lying = lying.write(twice.path());
    let text = std::fs::read_to_string(lying.join("metrics.jsonl")).unwrap();
    std::fs::write(
        lying.join("metrics.jsonl"),
        text.replace("\"val/n\":4", "\"val/questions_clean\":\"111\",\"val/n\":4"),
    )
    .unwrap();
    let mut young = Made::new("young", "dddddddd", 0, "1100");
    young.validations.clear();
    let young = young.write(twice.path());
    let broken = Made::new("broken", "eeeeeeee", 0, "1100").write(twice.path());
    std::fs::write(broken.join("metrics.jsonl"), "{\"step\":0}\nnot json\n").unwrap();
    let empty = tempfile::tempdir().unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_string();
    let (good, copy) = (text(&good), text(&copy));
    for (args, expected) in [
        (vec![text(&dir.path().join("none"))], "no such file or directory"),
        (vec![text(empty.path())], "expected a run directory or a directory of runs"),
        (vec![text(&dir.path().join("good-aaaaaaaa-s0/run.json"))], "directory is expected"),
        (vec![good.clone(), copy], "both are seed 0 of good"),
        (
            vec![good.clone(), "--baseline".into(), "bad".into()],
            "--baseline bad: no arm of this name; the arms are good",
        ),
        (vec![text(&lying)], "val/questions_clean has 3 right answers of 3, expected 0 of 4"),
        (vec![text(&young)], "found no run with a validation among 1"),
        (vec![text(&broken)], "metrics.jsonl line 2"),
        (vec![good.clone(), "--format".into(), "html".into()], "html"),
        (vec![good.clone(), "-o".into(), text(&empty.path().join("no/such/place"))], "no such file or directory"),
        (vec![], "<RUN>"),
    ] {
        let output = compare(&args.iter().map(String::as_str).collect::<Vec<_>>());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), stderr.lines().count()), (Some(2), 1), "{args:?}: {stderr}");
        assert!(stderr.contains(expected) && output.stdout.is_empty(), "{args:?}: {stderr}");
    }
}
