//! Fetching goes on where it stopped, and nothing half or wrong has a final name.

use serde_json::Value;

use crate::sshd::Sshd;
use crate::support::Client;

fn fetched(client: &Client, id: &str) -> Value {
    let answer: Value =
        serde_json::from_str(&client.succeed(&["fetch", id, "--checkpoints", "all", "--json"])).unwrap();
    answer["fetched"][0].clone()
}

#[test]
fn a_broken_fetch_goes_on_and_wrong_bytes_are_fetched_again() {
    let Some(server) = Sshd::start() else { return };
    let client = Client::over(&server, "device: cpu");
    let id = client.submit("files", &[]);
    client.wait_for_start(&id);
    let big: Vec<u8> = (0..6_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let checkpoint = client.run_file(&id, "checkpoints/step_000003");
    std::fs::create_dir_all(checkpoint.join("trainer")).unwrap();
    std::fs::write(checkpoint.join("model.safetensors"), &big).unwrap();
    std::fs::write(checkpoint.join("trainer/state file"), b"").unwrap();
    std::os::unix::fs::symlink("checkpoints/step_000003", client.run_file(&id, "latest")).unwrap();
    std::fs::write(client.run_file(&id, ".lock"), "").unwrap();

    // As a fetch leaves it that broke in the middle.
    let here = client.path("runs").join(&id);
    let target = here.join("checkpoints/step_000003/model.safetensors");
    let part = here.join("checkpoints/step_000003/.model.safetensors.part");
    std::fs::create_dir_all(part.parent().unwrap()).unwrap();
    std::fs::write(&part, &big[..4_000_000]).unwrap();
    let first = fetched(&client, &id);
    assert_eq!(std::fs::read(&target).unwrap(), big);
    let bytes = first["bytes"].as_u64().unwrap();
    assert!((2_000_000..2_100_000).contains(&bytes), "{first}");
    assert!(!part.exists() && here.join("checkpoints/step_000003/trainer/state file").exists());
    assert_eq!(std::fs::read_link(here.join("latest")).unwrap().to_str(), Some("checkpoints/step_000003"));
    assert!(here.join("remote/attempt-1.log").exists() && !here.join(".lock").exists());

    let second = fetched(&client, &id);
    assert_eq!((&second["bytes"], &second["unchanged"]), (&0.into(), &second["files"]), "{second}");

    // One bit here, the wrong beginning of a part, and a log that grew.
    let mut damaged = big.clone();
    damaged[5] ^= 1;
    std::fs::write(&target, &damaged).unwrap();
    std::fs::remove_file(here.join("timing.jsonl")).unwrap();
    std::fs::write(here.join(".timing.jsonl.part"), "{wrong").unwrap();
    let metrics = client.run_file(&id, "metrics.jsonl");
    let longer = std::fs::read_to_string(&metrics).unwrap() + "{\"step\":4,\"kind\":\"train\"}\n";
    std::fs::write(&metrics, &longer).unwrap();
    fetched(&client, &id);
    assert_eq!(std::fs::read(&target).unwrap(), big);
    assert_eq!(std::fs::read_to_string(here.join("metrics.jsonl")).unwrap(), longer);
    let same =
        |name: &str| std::fs::read(here.join(name)).unwrap() == std::fs::read(client.run_file(&id, name)).unwrap();
    assert!(same("timing.jsonl") && same("starts"));
}

#[test]
fn a_run_of_this_machine_is_not_written_over() {
    let client = Client::local("slots: 1");
    let id = client.submit("mine", &[]);
    client.wait_for_start(&id);
    let own = client.path("runs").join(&id);
    std::fs::create_dir_all(&own).unwrap();
    std::fs::write(own.join("run.json"), "{}").unwrap();
    let line = client.fail(2, &["fetch", &id]);
    assert!(line.contains("a run of this machine") && line.contains("--out"), "{line}");
    client.succeed(&["fetch", &id, "--out", "elsewhere"]);
    client.write_host("other", "executor: local, slots: 1");
    let line = client.fail(2, &["fetch", &id, "--out", "elsewhere"]);
    assert!(line.contains("was fetched from box"), "{line}");
}
