//! Cancelling ends everything a job started, in time for a checkpoint where it can.

use crate::sshd::process_lives;
use crate::support::Client;

#[test]
fn a_job_may_stop_by_itself() {
    let client = Client::local("slots: 1");
    let id = client.submit("stops", &[]);
    client.wait_for_start(&id);
    let queued = client.submit("queued", &[]);
    assert_eq!(client.state(&queued), "queued");
    client.succeed(&["cancel", &queued]);
    assert_eq!(client.state(&queued), "cancelled");
    let answer = client.succeed(&["cancel", "stops", "--json"]);
    assert!(answer.contains("\"term\""), "{answer}");
    let job = client.wait_for(&id, "cancelled");
    assert_eq!(job["exit_code"], 130);
    assert!(client.succeed(&["logs", &id]).contains("stopping"));
    assert!(client.starts(&queued).is_empty());
    assert!(client.succeed(&["cancel", &id, "--json"]).contains("\"ended\""));
    assert!(client.fail(2, &["cancel", "nobody"]).contains("nobody: no such job"));
    // The slot is free again.
    client.submit("queued", &["--resume"]);
    client.wait_for_start(&queued);
}

#[test]
fn a_job_that_will_not_stop_is_killed_with_its_children() {
    let client = Client::local("slots: 1, env: {MODE: stubborn}");
    let id = client.submit("stubborn", &[]);
    let pid: u64 = client.wait_for_start(&id)[0].parse().unwrap();
    crate::support::wait_until("its child", || client.run_file(&id, "child").exists());
    let child: u64 = std::fs::read_to_string(client.run_file(&id, "child")).unwrap().trim().parse().unwrap();
    assert!(process_lives(pid) && process_lives(child));
    let answer = client.succeed(&["cancel", &id, "--grace", "1", "--json"]);
    assert!(answer.contains("\"kill\""), "{answer}");
    client.wait_for(&id, "cancelled");
    crate::support::wait_until("both are gone", || !process_lives(pid) && !process_lives(child));
}
