//! Broken links: a client that dies, an sshd that dies, a job that is killed, a full disk.

use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::sshd::{Sshd, process_lives};
use crate::support::{Client, TEMPER, text, wait_until};

fn kill(signal: &str, pid: &str) {
    assert!(Command::new("kill").args([signal, "--", pid]).status().unwrap().success());
}

#[test]
fn a_client_that_dies_while_it_sends_leaves_nothing() {
    let Some(server) = Sshd::start() else { return };
    let client = Client::over(&server, "device: cpu");
    // The real binary: tens of megabytes, compressed on the way.
    let config = client.config("dies");
    let words = ["submit", config.to_str().unwrap()];
    let mut submitting = client.command(&words).spawn().unwrap();
    wait_until("a transfer begins", || client.names("blobs").iter().any(|name| name.starts_with(".incoming")));
    submitting.kill().unwrap();
    submitting.wait().unwrap();
    wait_until("the part is removed", || client.names("blobs").is_empty());
    assert!(client.names("jobs").is_empty() && client.names("snapshots").is_empty());
    assert!(client.succeed(&["status"]).contains("no jobs on box"));
}

#[test]
fn a_watcher_that_dies_leaves_the_job_alone_and_no_process_behind() {
    let Some(server) = Sshd::start() else { return };
    let client = Client::over(&server, "device: cpu");
    let id = client.submit("watched", &[]);
    client.wait_for_start(&id);
    let watched = || {
        let listed = Command::new("ps").args(["-eo", "args"]).output().unwrap();
        let path = client.root.join("jobs").join(&id);
        text(&listed.stdout).lines().any(|line| line.starts_with("tail ") && line.contains(path.to_str().unwrap()))
    };
    for signal in ["-KILL", "-INT"] {
        // As from a terminal: what a shell runs in the background ignores INT, and hands that down.
        let mut watching =
            client.command_of("env", &["--default-signal=INT", TEMPER, "logs", "-f", &id]).spawn().unwrap();
        wait_until("the log is watched", watched);
        kill(signal, &watching.id().to_string());
        watching.wait().unwrap();
        wait_until("nobody watches any more", || !watched());
        assert_eq!(client.state(&id), "running");
    }
    client.end(&id, 0);
    client.wait_for(&id, "finished");
    assert!(client.succeed(&["logs", "-f", &id]).contains(&format!("begins {id}")));
    // However long it is and however slowly it is read.
    let log = client.root.join("jobs").join(&id).join("1/log");
    std::fs::write(&log, "a line of the log\n".repeat(200_000)).unwrap();
    let mut slow = client.command(&["logs", "-f", "-n", "300000", &id]).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    let mut read = String::new();
    std::io::Read::read_to_string(&mut slow.stdout.take().unwrap(), &mut read).unwrap();
    assert_eq!(read.lines().count(), 200_000);
    assert!(slow.wait().unwrap().success());
}

#[test]
fn a_dead_sshd_is_unknown_and_the_job_goes_on() {
    let Some(mut server) = Sshd::start() else { return };
    let client = Client::over(&server, "device: cpu");
    let id = client.submit("link", &[]);
    let pid: u64 = client.wait_for_start(&id)[0].parse().unwrap();
    let mut watching = client.command(&["logs", "-f", &id]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    server.kill();
    // The watcher is told that the line broke, not that the job ended.
    let status = watching.wait().unwrap();
    assert_eq!(status.code(), Some(1));
    let answer: Value = serde_json::from_str(&client.succeed(&["status", &id, "--json"])).unwrap();
    assert_eq!(answer["hosts"][0]["state"], "unknown", "{answer}");
    let table = client.succeed(&["status"]);
    assert!(table.contains("unknown") && !table.contains("failed"), "{table}");
    for words in [vec!["fetch", &id], vec!["cancel", &id], vec!["logs", &id]] {
        let line = client.fail(1, &words);
        assert!(line.contains("box: not reached"), "{line}");
    }
    let line = client.fail(1, &client.submission("other"));
    assert!(line.contains("box: not reached"), "{line}");
    assert!(process_lives(pid));
    server.run();
    assert_eq!(client.state(&id), "running");
    client.end(&id, 0);
    client.wait_for(&id, "finished");
}

#[test]
fn a_job_that_is_killed_from_outside_has_failed_or_is_lost() {
    let client = Client::local("slots: 4");
    let id = client.submit("killed", &[]);
    client.wait_for_start(&id);
    let pid = client.job(&id)["pid"].as_u64().unwrap();
    kill("-KILL", &pid.to_string());
    assert_eq!(client.wait_for(&id, "failed")["exit_code"], 137);

    let id = client.submit("gone", &[]);
    client.wait_for_start(&id);
    let pid = client.job(&id)["pid"].as_u64().unwrap();
    let file = client.root.join("jobs").join(&id).join("1/supervisor.pid");
    let supervisor = std::fs::read_to_string(file).unwrap().trim().to_string();
    kill("-KILL", &supervisor);
    // The job itself is still there, and still holds its slot.
    let job = client.job(&id);
    assert_eq!(job["state"], "running", "{job}");
    assert!(client.succeed(&["status", &id]).contains("supervisor is gone"));
    kill("-KILL", &pid.to_string());
    let job = client.wait_for(&id, "lost");
    assert!(job["exit_code"].is_null());
    // What is lost can be resumed.
    client.submit("gone", &["--resume"]);
    client.wait_for(&id, "running");
}

/// The same files seen from another container: process numbers mean nothing there, and a beating heart says so.
#[test]
fn a_job_of_another_container_is_unknown_and_left_alone() {
    let Some(server) = Sshd::start() else { return };
    let client = Client::over(&server, "device: cpu");
    let id = client.submit("contained", &[]);
    client.wait_for_start(&id);
    let inside = "#!/bin/sh\nshift 3\nexec unshare -p -f --mount-proc \"$@\"\n";
    crate::support::program(&server.bin().join("docker"), inside);
    if !Command::new("unshare").args(["-p", "-f", "--mount-proc", "true"]).status().is_ok_and(|s| s.success()) {
        println!("skipped: no right to make a namespace of processes");
        return;
    }
    let fields = format!("ssh: localhost, ssh_options: {}, container: other, device: cpu", server.options());
    client.write_host("box", &fields);
    assert_eq!(client.state(&id), "unknown");
    assert!(client.succeed(&["status", &id]).contains("another container"));
    let line = client.fail(2, &[client.submission("contained"), vec!["--resume".into()]].concat());
    assert!(line.contains("may still be there"), "{line}");
    let line = client.fail(1, &["cancel", &id]);
    assert!(line.contains("another container"), "{line}");
    client.succeed(&["clean", "--jobs", "--older-than", "0"]);
    assert_eq!((client.names("jobs").len(), client.names("snapshots").len()), (1, 1));
    client.write_host("box", &format!("ssh: localhost, ssh_options: {}, device: cpu", server.options()));
    assert_eq!(client.state(&id), "running");
}

/// A small file system of its own as root; needs the right to mount.
#[test]
fn a_full_disk_refuses_new_jobs_and_hides_no_end() {
    let client = Client::local("slots: 4, env: {MODE: fills}");
    std::fs::create_dir_all(&client.root).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=24m", "tmpfs"])
        .arg(&client.root)
        .stderr(Stdio::null())
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        println!("skipped: no right to mount a small file system");
        return;
    }
    struct Mounted<'a>(&'a std::path::Path);
    impl Drop for Mounted<'_> {
        fn drop(&mut self) {
            let _ = Command::new("umount").args(["-l"]).arg(self.0).status();
        }
    }
    let _mounted = Mounted(&client.root);
    // The real binary does not fit.
    let line = client.fail(1, &["submit", client.config("big").to_str().unwrap()]);
    assert!(line.contains("no space") && line.contains("MiB free"), "{line}");
    assert!(client.names("blobs").is_empty() && client.names("jobs").is_empty());
    // A job fills the disk: its exit code is still written, and the log is cut at worst.
    let id = client.submit("fills", &[]);
    assert_eq!(client.wait_for(&id, "failed")["exit_code"], 1);
    let line = client.fail(1, &client.submission("next"));
    assert!(line.contains("no space"), "{line}");
    assert_eq!(client.names("jobs"), std::slice::from_ref(&id));
    std::fs::remove_file(client.run_file(&id, "zeros")).unwrap();
    client.submit("next", &[]);
}
