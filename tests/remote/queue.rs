//! GPUs are held by one job each; jobs wait for them and for each other.

use std::process::Command;

use crate::support::{Client, wait_until};

#[test]
fn a_gpu_serves_one_job_at_a_time_in_the_order_of_their_coming() {
    let client = Client::local("gpus: [2, 5]");
    let ids: Vec<String> = (0..4).map(|seed| client.submit("gpu", &["--set", &format!("seed={seed}")])).collect();
    let gpus: Vec<String> = ids[..2].iter().map(|id| client.wait_for_start(id)[1].clone()).collect();
    assert!(gpus == ["2", "5"] || gpus == ["5", "2"], "{gpus:?}");
    assert_eq!((client.state(&ids[2]).as_str(), client.state(&ids[3]).as_str()), ("queued", "queued"));
    assert_eq!(client.job(&ids[0])["token"], format!("gpu-{}", gpus[0]));
    client.end(&ids[1], 0);
    assert_eq!(client.wait_for_start(&ids[2])[1], gpus[1]);
    assert_eq!(client.state(&ids[3]), "queued");
    client.end(&ids[0], 0);
    assert_eq!(client.wait_for_start(&ids[3])[1], gpus[0]);
    assert!(client.starts(&ids[3])[0][2].starts_with("--device cuda train"));
}

/// What the original system lost cards to: a run that is over, and a process of it that is not.
#[test]
fn a_process_that_outlives_its_job_still_holds_the_gpu() {
    let client = Client::local("gpus: [0], env: {MODE: leaves}");
    let first = client.submit("leaves", &[]);
    client.wait_for_start(&first);
    client.end(&first, 0);
    client.wait_for(&first, "finished");
    let second = client.submit("leaves", &["--set", "seed=1"]);
    std::thread::sleep(std::time::Duration::from_millis(600));
    assert_eq!(client.state(&second), "queued");
    let child = std::fs::read_to_string(client.run_file(&first, "child")).unwrap();
    assert!(Command::new("kill").args(["-KILL", child.trim()]).status().unwrap().success());
    client.wait_for_start(&second);
}

#[test]
fn a_named_gpu_is_waited_for_while_others_are_free() {
    let client = Client::local("gpus: [0, 1]");
    let first = client.submit("named", &["--gpu", "1"]);
    assert_eq!(client.wait_for_start(&first)[1], "1");
    let second = client.submit("named", &["--gpu", "1", "--set", "seed=1"]);
    let third = client.submit("named", &["--set", "seed=2"]);
    assert_eq!(client.wait_for_start(&third)[1], "0");
    assert_eq!(client.state(&second), "queued");
    let line = client.fail(2, &[client.submission("named"), vec!["--gpu".into(), "7".into()]].concat());
    assert!(line.contains("--gpu 7") && line.contains("[0, 1]"), "{line}");
}

#[test]
fn a_job_runs_after_another_or_is_skipped() {
    let client = Client::local("slots: 8");
    let first = client.submit("e5c", &[]);
    client.wait_for_start(&first);
    let ok = client.submit("e9a", &["--after", "e5c"]);
    let any = client.submit("e9b", &["--after-any", &first]);
    let chained = client.submit("e9c", &["--after", "e9a"]);
    for id in [&ok, &any, &chained] {
        assert_eq!(client.state(id), "waiting");
    }
    client.end(&first, 1);
    client.wait_for_start(&any);
    let skipped = client.wait_for(&ok, "skipped");
    assert!(
        skipped["last_line"].as_str().unwrap().contains(&format!("{first}, which this job runs after, ended with 1"))
    );
    client.wait_for(&chained, "skipped");
    assert!(client.starts(&ok).is_empty() && client.starts(&chained).is_empty());
    client.end(&any, 0);
    client.wait_for(&any, "finished");
    // Of a job that has ended well one need not wait.
    let after = client.submit("e9d", &["--after", "e9b"]);
    client.wait_for_start(&after);
    let line = client.fail(2, &[client.submission("e9e"), vec!["--after".into(), "e7".into()]].concat());
    assert!(line.contains("--after e7: no such job"), "{line}");
}

/// The wrappers say nothing that temper does not.
#[test]
fn the_scripts_string_the_commands_together() {
    let client = Client::local("slots: 8");
    let script = |args: &[&str]| {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/a100.sh");
        let mut command = Command::new("bash");
        command.arg(path).args(args).env("TEMPER", env!("CARGO_BIN_EXE_temper"));
        let output = command.env("TEMPER_HOSTS", client.path("hosts.yaml")).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", crate::support::text(&output.stderr));
        crate::support::text(&output.stdout)
    };
    client.config("any");
    let binary = client.path("stand-in").display().to_string();
    let more = ["submit", "box", "--binary", &binary, "--set", "seed=3"];
    let planned = script(&[&more[..], &["--dry-run"]].concat());
    assert!(planned.contains("e9b") && client.names("jobs").is_empty());
    script(&more);
    let jobs = client.names("jobs");
    assert!(jobs.len() == 3 && jobs.iter().all(|id| id.ends_with("-s3")), "{jobs:?}");
    let id = |name: &str| jobs.iter().find(|id| id.starts_with(&format!("{name}-"))).unwrap();
    client.wait_for_start(id("e5c"));
    assert_eq!((client.state(id("e9a")).as_str(), client.state(id("e9b")).as_str()), ("waiting", "waiting"));
    client.end(id("e5c"), 1);
    for name in ["e9a", "e9b"] {
        client.wait_for_start(id(name));
        client.end(id(name), 0);
        client.wait_for(id(name), "finished");
    }
    let out = client.path("fetched").display().to_string();
    script(&["fetch", "box", "--out", &out]);
    assert!(jobs.iter().all(|id| client.path("fetched").join(id).join("metrics.jsonl").exists()));
    script(&["clean", "box"]);
    assert!(client.names("jobs").is_empty() && client.names("runs").len() == 3);
}

/// A card belongs to the machine: whoever's root, whoever's sweep.
#[test]
fn two_roots_share_a_card() {
    let (one, other) = (Client::local("gpus: [0]"), Client::local("gpus: [0]"));
    std::fs::create_dir_all(one.path("locks")).unwrap();
    std::os::unix::fs::symlink(one.path("locks"), other.path("locks")).unwrap();
    let first = one.submit("shares", &[]);
    one.wait_for_start(&first);
    let second = other.submit("shares", &[]);
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert_eq!(other.state(&second), "queued");
    one.end(&first, 0);
    other.wait_for_start(&second);
}

#[test]
fn many_slots_are_no_problem() {
    let client = Client::local("slots: 60");
    let id = client.submit("slots", &[]);
    client.wait_for_start(&id);
    assert!(client.job(&id)["token"].as_str().unwrap().starts_with("slot-"));
}

/// What a waiting job still has to read is not cleaned away, nor is what it will run.
#[test]
fn cleaning_leaves_waiting_jobs_what_they_need() {
    let client = Client::local("slots: 8");
    let done = client.submit("done", &[]);
    client.wait_for_start(&done);
    client.end(&done, 0);
    client.wait_for(&done, "finished");
    let blocks = client.submit("blocks", &[]);
    client.wait_for_start(&blocks);
    let waits = client.submit("waits", &["--after", "blocks", "--after", "done"]);
    let other = client.submit("other", &[]);
    client.wait_for_start(&other);
    client.end(&other, 0);
    client.wait_for(&other, "finished");
    client.succeed(&["clean", "--jobs", "--older-than", "0"]);
    assert_eq!(client.names("jobs"), [blocks.clone(), done, waits.clone()]);
    assert_eq!(client.names("snapshots").len(), 2);
    client.end(&blocks, 0);
    client.wait_for_start(&waits);
}

/// Eight devices, twelve jobs: never two on one, never one idle while a job waits.
#[test]
fn eight_devices_are_shared_out() {
    let client = Client::local("gpus: [0, 1, 2, 3, 4, 5, 6, 7]");
    let ids: Vec<String> =
        (0..12).map(|seed| client.submit("eight", &["--no-check", "--set", &format!("seed={seed}")])).collect();
    let running = || ids.iter().filter(|id| !client.starts(id).is_empty()).count();
    wait_until("eight run", || running() == 8);
    let mut gpus: Vec<String> = ids.iter().filter_map(|id| client.starts(id).first().map(|s| s[1].clone())).collect();
    gpus.sort();
    assert_eq!(gpus, ["0", "1", "2", "3", "4", "5", "6", "7"]);
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(running(), 8);
    ids.iter().filter(|id| !client.starts(id).is_empty()).for_each(|id| client.end(id, 0));
    wait_until("the rest run", || running() == 12);
}
