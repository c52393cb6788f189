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
