//! Stop rules: a run ends at the step that its metrics say, as a result; killed or not, and no earlier.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Value, json};
use temper::rl::stop_rules::metrics;
use temper::run::stopped::{self, Comparison, Stopped};

use crate::support::{
    assert_same_run, config, names, rows, run, run_dir, stderr_of, succeed, temper, train_args, wait_until,
};

const BASE: &str = "
algorithm: {kl_coef: 0.05}
reward: {mode: numeric}
trainer: {save_every: 4, val_every: 3, keep_last: 2, keep_best: 0";

/// 12 steps with validations after 0, 3, 6, 9, 12, and these rules.
fn yaml(rules: &str) -> String {
    format!("{BASE}, stop_rules: [{rules}]}}")
}

/// The learning rate is above 0 in every step.
const SEVENTH: &str = "{metric: lr, above: 0.0, after_step: 6, name: seventh}";

fn of_kind<'a>(rows: &'a [Value], kind: &str) -> Vec<&'a Value> {
    rows.iter().filter(|row| row["kind"] == kind).collect()
}

fn steps(rows: &[&Value]) -> Vec<u64> {
    rows.iter().map(|row| row["step"].as_u64().unwrap()).collect()
}

#[test]
fn a_rule_ends_the_run_as_a_result_and_without_it_the_run_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    succeed(&train_args(&config(dir.path(), "stops", &yaml("")), &whole));
    let whole = rows(&run_dir(&whole).join("metrics.jsonl"));

    let config = config(dir.path(), "stops", &yaml(SEVENTH));
    let out = dir.path().join("out");
    let mut args = train_args(&config, &out);
    let output = run(&args);
    assert_eq!(output.status.code(), Some(0), "{}", stderr_of(&output));
    let run_dir = run_dir(&out);
    let metrics = rows(&run_dir.join("metrics.jsonl"));
    let (train, val) = (of_kind(&metrics, "train"), of_kind(&metrics, "val"));
    assert_eq!((steps(&train), steps(&val)), ((1..=7).collect(), vec![0, 3, 6, 7]));
    assert_eq!(train, of_kind(&whole, "train")[..7]);
    assert_eq!(val[..3], of_kind(&whole, "val")[..3]);
    assert_eq!(names(&run_dir.join("checkpoints")), ["step_000004", "step_000007"]);
    assert_eq!(std::fs::read_link(run_dir.join("latest")).unwrap(), Path::new("checkpoints/step_000007"));
    let lr = train[6]["lr"].as_f64();
    let expected = Stopped {
        rule: "seventh".into(),
        metric: "lr".into(),
        value: lr,
        comparison: Comparison::Above,
        bound: 0.0,
        step: 7,
    };
    assert_eq!(stopped::read(&run_dir).unwrap(), Some(expected));
    let json: Value = serde_json::from_slice(&std::fs::read(run_dir.join("stopped.json")).unwrap()).unwrap();
    let fields =
        json!({"rule": "seventh", "metric": "lr", "value": lr, "comparison": "above", "bound": 0.0, "step": 7});
    assert_eq!(json, fields);
    let line = format!("stop rule seventh after step 7: lr is {}, above 0", lr.unwrap());
    assert!(stderr_of(&output).contains(&line), "{}", stderr_of(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains(&format!("ended by {line}")));

    // A resume has nothing to do, and says so.
    let before = std::fs::read(run_dir.join("metrics.jsonl")).unwrap();
    args.push("--resume".to_string());
    let output = run(&args);
    assert_eq!(output.status.code(), Some(0));
    assert!(stderr_of(&output).contains(&line), "{}", stderr_of(&output));
    assert_eq!(std::fs::read(run_dir.join("metrics.jsonl")).unwrap(), before);
    let result: Value = serde_json::from_str(&succeed(&[&args[..], &["--json".to_string()]].concat())).unwrap();
    assert_eq!((&result["stopped"]["rule"], &result["steps"]), (&json!("seventh"), &json!(7)));

    // Without the rule it is the same run, which goes on as if there had been none.
    args.extend(["--set", "trainer.stop_rules=[]"].map(String::from));
    succeed(&args);
    assert_eq!(names(&out).len(), 1);
    let metrics = rows(&run_dir.join("metrics.jsonl"));
    assert_eq!(of_kind(&metrics, "train"), of_kind(&whole, "train"));
    assert_eq!(metrics.last(), whole.last());
    assert_eq!(stopped::read(&run_dir).unwrap(), None);
    assert!(!run_dir.join("stopped.json").exists());
}

#[test]
fn validations_and_patience_count_rows_and_a_rule_that_must_not_fire_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut whole = None;
    for (rules, expected) in [
        ("", None),
        // The validation of step 3 is not after step 3; the next is that of step 6.
        ("{metric: val/acc_noisy, below: 1.0, after_step: 3}", Some((6, "val/acc_noisy below 1"))),
        ("{metric: val/correct_clean, below: 9, patience: 3, name: third}", Some((9, "third"))),
        ("{metric: lr, above: 0.0, patience: 5, name: five}", Some((5, "five"))),
        // The first that fires, not the first in the list; of one step, the first in the list.
        (
            "{metric: lr, above: 0.0, after_step: 8}, {metric: lr, above: 0.0, after_step: 1, name: b}, {metric: lr, above: 0, after_step: 1, name: c}",
            Some((2, "b")),
        ),
        (
            "{metric: entropy, above: 1e9}, {metric: val/acc_noisy, below: 0.0}, {metric: lr, above: 0.0, after_step: 12}, \
          {metric: lr, above: 0.0, patience: 13}",
            None,
        ),
        // At the last step a rule still is what ended it.
        ("{metric: lr, above: 0.0, patience: 12, name: last}", Some((12, "last"))),
    ] {
        let config = config(dir.path(), "rows", &yaml(rules));
        let out = tempfile::tempdir().unwrap();
        succeed(&train_args(&config, out.path()));
        let run_dir = run_dir(out.path());
        let found = stopped::read(&run_dir).unwrap();
        assert_eq!(found.as_ref().map(|s| (s.step, s.rule.as_str())), expected, "{rules}");
        let metrics = rows(&run_dir.join("metrics.jsonl"));
        let last = expected.map_or(12, |(step, _)| step);
        assert_eq!(steps(&of_kind(&metrics, "train")).last(), Some(&last), "{rules}");
        let validated = steps(&of_kind(&metrics, "val"));
        assert_eq!(validated.iter().filter(|step| **step == last).count(), 1, "{rules}: {validated:?}");
        if last == 12 {
            let bytes = std::fs::read(run_dir.join("metrics.jsonl")).unwrap();
            assert!(*whole.get_or_insert(bytes.clone()) == bytes, "{rules}");
        }
    }
}

#[test]
fn a_killed_run_stops_where_the_whole_one_does() {
    let dir = tempfile::tempdir().unwrap();
    // The violations of its patience lie on both sides of the checkpoint of step 4.
    let config =
        config(dir.path(), "killed", &yaml("{metric: lr, above: 0.0, after_step: 2, patience: 5, name: five}"));
    let whole = dir.path().join("whole");
    succeed(&train_args(&config, &whole));
    let whole = run_dir(&whole);
    assert_eq!(stopped::read(&whole).unwrap().map(|s| s.step), Some(7));
    // Killed as soon as step `after` is there: between checkpoints, after the last step, before stopped.json.
    for after in [3u64, 5, 6, 7, 7] {
        let out = tempfile::tempdir().unwrap();
        let mut args = train_args(&config, out.path());
        let mut child = temper(&args).spawn().unwrap();
        let there = || {
            let metrics = names(out.path()).first().map(|run| out.path().join(run).join("metrics.jsonl"));
            let text = metrics.and_then(|path| std::fs::read_to_string(path).ok()).unwrap_or_default();
            text.contains(&format!("{{\"step\":{after},"))
        };
        wait_until("the step", there);
        child.kill().unwrap();
        child.wait().unwrap();
        let killed = run_dir(out.path());
        // As a process that died between its last checkpoint and the file.
        let _ = std::fs::remove_file(killed.join("stopped.json"));
        args.push("--resume".to_string());
        succeed(&args);
        assert_same_run(&whole, &killed);
        let read = |dir: &Path| std::fs::read_to_string(dir.join("stopped.json")).unwrap();
        assert_eq!(read(&whole), read(&killed));
    }
}

/// Everything that adds a metric.
const OPTIONS: &str = "
trainer: {epochs: 1}
algorithm: {truncated_importance: 2, entropy_coef: 0.001, dynamic_sampling: {max_rounds: 2}}
reward:
  sum:
    - {kind: numeric}
    - {kind: command, weight: 0.1, command: [python3, -c, \"import json, sys\\nfor line in sys.stdin: print(json.dumps({'id': json.loads(line)['id'], 'reward': 0.5}), flush=True)\"]}
  overlong: {buffer_tokens: 4}";

/// The names that a rule may use are the numbers that a run's rows have.
#[test]
fn every_metric_can_be_in_a_rule() {
    let dir = tempfile::tempdir().unwrap();
    for (name, yaml) in [
        ("noisy", "trainer: {epochs: 1}\nnoisy_ops: {enabled: true}".to_string()),
        ("clean", "trainer: {epochs: 1}\nnoisy_ops: {enabled: false}\nnoise_injection: {enabled: false}".to_string()),
        ("all", "trainer: {epochs: 1}\nfake_quant: {enabled: true, weights: mxfp4, activations: mxfp4}".to_string()),
        ("options", OPTIONS.to_string()),
    ] {
        let path = config(dir.path(), name, &yaml);
        let out = dir.path().join(format!("{name}-out"));
        succeed(&train_args(&path, &out));
        let mut found = BTreeSet::new();
        for row in rows(&run_dir(&out).join("metrics.jsonl")) {
            let numbers = row.as_object().unwrap().iter().filter(|(_, value)| !value.is_string());
            found.extend(numbers.map(|(key, _)| key.clone()));
        }
        ["step", "epoch", "val/n"].iter().for_each(|key| assert!(found.remove(*key)));
        let config = temper::config::load(&path, &[]).unwrap();
        let (algorithm, reward) = (&config.algorithm, &config.reward);
        let known = metrics(algorithm, reward, &config.noise_injection, &config.noisy_ops, &config.fake_quant);
        assert_eq!(known.into_iter().collect::<BTreeSet<_>>(), found, "{name}");
    }
}
