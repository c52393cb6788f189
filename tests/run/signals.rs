use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use temper::run::Interrupt;

const CHILD: &str = "TEMPER_TEST_SIGNAL_CHILD";

/// The child's part: does nothing unless the test below started it.
#[test]
fn child_waits_for_signals() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let interrupt = Interrupt::install().unwrap();
    eprintln!("ready");
    let deadline = Instant::now() + Duration::from_secs(20);
    while !interrupt.requested() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    eprintln!("requested {}", interrupt.requested());
    std::thread::sleep(Duration::from_secs(20)); // "finishing the step"
}

#[test]
fn the_first_signal_asks_and_the_second_leaves_with_130() {
    for signal in ["-INT", "-TERM"] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "signals::child_waits_for_signals", "--nocapture"])
            .env(CHILD, "1")
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut send = |wait_for: &str| {
            assert!(lines.any(|line| line.unwrap().contains(wait_for)), "{wait_for}");
            assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        };
        send("ready");
        send("requested true");
        assert_eq!(child.wait().unwrap().code(), Some(130), "{signal}");
    }
}
