//! Sweeps as jobs: GPUs of this machine, several hosts, a controller that dies, decisions between arms.

use serde_json::Value;

use crate::support::{Client, text, wait_until};

const SMALL: &str = "data: {val_limit: 8}\ntrainer: {epochs: 1, val_every: 0, save_every: 0, threads: 1}\n";

/// A sweep `name` over configs/debug.yaml, shortened.
fn sweep(client: &Client, name: &str, arms: &str, more: &str) -> String {
    let base = client.config("base");
    std::fs::write(client.path("small.yaml"), format!("extends: {}\n{SMALL}", base.display())).unwrap();
    let path = client.path(&format!("{name}.yaml"));
    std::fs::write(&path, format!("name: {name}\nbase: small.yaml\narms: {arms}\n{more}\n")).unwrap();
    path.to_str().unwrap().to_string()
}

fn runs(answer: &Value) -> Vec<(String, u64, String)> {
    let run = |run: &Value| {
        let text = |key: &str| run[key].as_str().unwrap_or_default().to_string();
        (text("arm"), run["seed"].as_u64().unwrap(), text("state"))
    };
    answer["runs"].as_array().unwrap().iter().map(run).collect()
}

/// 4 arms x 3 seeds on 8 cards: the controller is killed when some have ended, and again; nothing is run twice.
#[test]
fn a_sweep_over_eight_cards_survives_its_controller() {
    let client = Client::local("slots: 1");
    let arms =
        "{a: {}, b: {optimizer.lr: 1e-5}, c: {noisy_ops.error_scale: 0.02}, d: {noise_injection.enabled: false}}";
    let file = sweep(&client, "cards", arms, "seeds: [0, 1, 2]");
    let args = ["sweep", &file, "--gpus", "0,1,2,3,4,5,6,7", "--device", "cpu", "--every", "0.3", "--json"];
    // Somebody else has the first card all the time.
    std::fs::create_dir_all(client.path("runs/.jobs/locks")).unwrap();
    let foreign = std::fs::File::create(client.path("runs/.jobs/locks/gpu-0")).unwrap();
    foreign.lock().unwrap();
    let ended = || {
        let jobs = std::fs::read_dir(client.path("runs/.jobs/jobs")).into_iter().flatten().flatten();
        let code = |path: std::path::PathBuf| std::fs::read_to_string(path.join("1/exit_code")).unwrap_or_default();
        jobs.filter(|job| code(job.path()).trim() == "0").count()
    };
    for least in [2, 6] {
        let mut controller = client.command(&args).spawn().unwrap();
        wait_until("some runs have ended", || ended() >= least);
        controller.kill().unwrap();
        controller.wait().unwrap();
    }
    let answer: Value = serde_json::from_str(&client.succeed(&args)).unwrap();
    let all = runs(&answer);
    assert_eq!(all.len(), 12);
    assert!(all.iter().all(|(_, _, state)| state == "finished"), "{all:?}");
    let mut cards = std::collections::BTreeSet::new();
    for run in answer["runs"].as_array().unwrap() {
        let directory = client.path(run["run_dir"].as_str().unwrap());
        let id = directory.file_name().unwrap();
        let jobs = client.path("runs/.jobs/jobs").join(id);
        // One attempt each, one start each: a repeated step would add a line to the clock's file.
        assert_eq!(std::fs::read_dir(&jobs).unwrap().count(), 1);
        assert_eq!(std::fs::read_to_string(directory.join("timing.jsonl")).unwrap().lines().count(), 6);
        let run: Value = serde_json::from_str(&std::fs::read_to_string(directory.join("run.json")).unwrap()).unwrap();
        assert!(run["resumes"].as_array().unwrap().is_empty());
        cards.insert(std::fs::read_to_string(jobs.join("1/token")).unwrap().trim().to_string());
    }
    assert!(cards.iter().all(|card| card.starts_with("gpu-") && card != "gpu-0"), "{cards:?}");
    let arms: Vec<&Value> = answer["arms"].as_array().unwrap().iter().collect();
    assert!(arms.len() == 8 && arms.iter().all(|arm| arm["accuracies"].as_array().unwrap().len() == 3), "{answer}");
    // The same files whichever way a sweep is run.
    let here = ["sweep", &file, "--device", "cpu", "--out", "serial", "-q", "--set", "optimizer.lr=1e-5"];
    let jobs =
        ["sweep", &file, "--device", "cpu", "--parallel", "2", "--every", "0.2", "-q", "--set", "optimizer.lr=1e-5"];
    client.succeed(&here);
    client.succeed(&jobs);
    let id = client.run(&["sweep", &file, "--dry-run", "--set", "optimizer.lr=1e-5"]);
    for line in text(&id.stdout).lines() {
        let id = line.strip_prefix("runs/").unwrap();
        let read = |out: &str| std::fs::read(client.path(out).join(id).join("metrics.jsonl")).unwrap();
        assert!(read("runs") == read("serial"), "{id}");
    }
}

#[test]
fn two_hosts_share_a_sweep_and_its_runs_come_here() {
    let client = Client::local("slots: 1");
    let host = |name: &str| {
        let root = client.path(name).display().to_string();
        format!("  {name}: {{executor: local, root: {root}, slots: 1, device: cpu, poll_s: 0.1, heartbeat_s: 0.5}}\n")
    };
    std::fs::write(client.path("hosts.yaml"), format!("hosts:\n{}{}", host("one"), host("two"))).unwrap();
    let file = sweep(&client, "shared", "{a: {}, b: {optimizer.lr: 1e-5}}", "seeds: [0, 1]");
    let args = ["sweep", &file, "--host", "one", "--host", "two", "--every", "0.3", "--json"];
    let answer: Value = serde_json::from_str(&client.succeed(&args)).unwrap();
    for name in ["one", "two"] {
        let of_host: Vec<&Value> =
            answer["runs"].as_array().unwrap().iter().filter(|run| run["host"] == name).collect();
        assert_eq!(of_host.len(), 2, "{answer}");
        for run in of_host {
            let here = client.path(run["run_dir"].as_str().unwrap());
            let there = client.path(name).join("runs").join(here.file_name().unwrap());
            assert_eq!(
                std::fs::read(here.join("metrics.jsonl")).unwrap(),
                std::fs::read(there.join("metrics.jsonl")).unwrap()
            );
            assert!(there.join("latest").exists() && !here.join("latest").exists());
        }
    }
    // Again: nothing is sent.
    let again: Value = serde_json::from_str(&client.succeed(&args)).unwrap();
    assert_eq!(again["arms"], answer["arms"]);
    // A host that is not reached at the start is no reason to run its jobs elsewhere.
    let broken =
        format!("hosts:\n{}  two: {{ssh: 127.0.0.1, ssh_options: [-p, '1'], root: /r, slots: 1}}\n", host("one"));
    std::fs::write(client.path("hosts.yaml"), broken).unwrap();
    let output = client.run(&args);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("two: not reached"), "{}", text(&output.stderr));
}

#[test]
fn a_run_that_fails_is_named_and_taken_up_again() {
    let client = Client::local("slots: 1");
    let file = sweep(&client, "fails", "{good: {}, bad: {optimizer.lr: 1e-5}}", "seeds: [0]");
    let args = ["sweep", &file, "--parallel", "1", "--device", "cpu", "--every", "0.2"];
    // In the way of the second arm's run directory.
    let listed = client.succeed(&["sweep", &file, "--dry-run"]);
    let blocked = client.path(listed.lines().find(|line| line.contains("-bad-")).unwrap());
    std::fs::create_dir_all(blocked.parent().unwrap()).unwrap();
    std::fs::write(&blocked, "").unwrap();
    let output = client.run(&args);
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    assert!(said.contains("1 of 2 runs did not finish, first fails-bad"), "{said}");
    assert!(text(&output.stdout).contains("bad, seed 0: failed: error: "), "{}", text(&output.stdout));
    std::fs::remove_file(&blocked).unwrap();
    let table = client.succeed(&args);
    assert!(table.contains("good") && table.contains("bad") && !table.contains("failed"), "{table}");
}

/// 1d, then 1e where 1d collapses or ends below a floor.
#[test]
fn decisions_are_made_from_what_a_run_gave() {
    let client = Client::local("slots: 1");
    let arms = "{collapses: {trainer.stop_rules: [{metric: entropy, above: 0.5, after_step: 2, name: collapse}]}, \
                after: {optimizer.lr: 2e-5}, not: {optimizer.lr: 3e-5}, floor: {optimizer.lr: 4e-5}}";
    let decisions = "seeds: [0]\ndecisions:\n  - {run: after, if_any: [{arm: collapses, stopped: collapse}]}\n  \
                     - {run: not, if_any: [{arm: collapses, stopped: other}, {arm: after, metric: entropy, below: 0}]}\n  \
                     - {run: floor, after: [after], if_any: [{arm: after, metric: val/acc_noisy, below: 1.1}]}";
    let file = sweep(&client, "decides", arms, decisions);
    for way in [&["--parallel", "2", "--every", "0.2", "--out", "jobs"][..], &["--out", "serial"]] {
        let args = [&["sweep", &file, "--device", "cpu", "--json"][..], way].concat();
        let answer: Value = serde_json::from_str(&client.succeed(&args)).unwrap();
        let states: Vec<String> = runs(&answer).into_iter().map(|(arm, _, state)| format!("{arm} {state}")).collect();
        assert_eq!(states, ["collapses finished", "after finished", "not skipped", "floor finished"]);
        let note = answer["runs"][2]["note"].as_str().unwrap();
        assert!(
            note.contains("collapses: stop rule collapse after step 3") && note.contains("after: entropy is"),
            "{note}"
        );
    }
    for (decisions, part) in [
        ("[{run: none, after: [after]}]", "none"),
        ("[{run: after, after: [floor]}]", "stands before"),
        ("[{run: after, after: [after]}]", "stands before"),
        ("[{run: after, if_any: [{arm: collapses}]}]", "stopped: RULE"),
        ("[{run: after}, {run: after}]", "twice"),
        ("[{runs: after}]", "runs"),
    ] {
        let file = sweep(&client, "wrong", arms, &format!("seeds: [0]\ndecisions: {decisions}"));
        let line = client.fail(2, &["sweep", &file, "-q"]);
        assert!(line.contains("wrong.yaml") && line.contains(part), "{decisions}: {line}");
    }
}
