//! A job from `submit` to `fetch`, the refusals, and names that a shell would read as something else.

use serde_json::Value;

use crate::sshd::Sshd;
use crate::support::{Client, program, text};

/// The real temper, over a real sshd: what comes back is what a run here gives, byte for byte.
#[test]
fn a_run_over_ssh_is_the_run_here() {
    let Some(server) = Sshd::start() else { return };
    let client = Client::over(&server, "device: cpu");
    let config = client.config("real");
    let set = ["--set", "trainer.threads=1", "--set", "trainer.epochs=1"];
    let submit = [&["submit", config.to_str().unwrap(), "--json"][..], &set].concat();
    let id = serde_json::from_str::<Value>(&client.succeed(&submit)).unwrap()["job"].as_str().unwrap().to_string();
    let log = client.succeed(&["logs", "-f", "real"]);
    assert!(log.contains("step:6 - ") && log.contains("after step 6"), "{log}");
    let job = client.wait_for(&id, "finished");
    assert_eq!(
        (&job["exit_code"], &job["train"]["step"], &job["validation"]["step"]),
        (&0.into(), &6.into(), &6.into())
    );
    assert!(job["timing"]["step_s"].as_f64().unwrap() > 0.0);
    let table = client.succeed(&["status"]);
    assert!(table.contains(&id) && table.contains("finished"), "{table}");

    let fetched: Value =
        serde_json::from_str(&client.succeed(&["fetch", &id, "--checkpoints", "latest", "--json"])).unwrap();
    assert!(fetched["fetched"][0]["files"].as_u64().unwrap() >= 9, "{fetched}");
    let here = [&["train", config.to_str().unwrap(), "--out", "here", "--device", "cpu", "-q"][..], &set].concat();
    client.succeed(&here);
    for file in ["metrics.jsonl", "injection.jsonl", "samples.jsonl", "config.yaml", "latest/model.safetensors"] {
        let read = |root: &str| std::fs::read(client.path(root).join(&id).join(file)).unwrap();
        assert!(read("runs") == read("here"), "{file}");
    }
    // The binary went over once; what a finished job does not need can be removed.
    assert_eq!((client.names("blobs").len(), client.names("snapshots").len()), (1, 1));
    client.succeed(&["clean", "--jobs"]);
    assert_eq!((client.names("blobs").len(), client.names("snapshots").len(), client.names("jobs").len()), (0, 0, 0));
    assert_eq!(client.names("runs"), [id]);
}

#[test]
fn a_second_submit_is_refused_or_resumed_and_never_overwrites() {
    let client = Client::local("slots: 4");
    let id = client.submit("twice", &[]);
    client.wait_for_start(&id);
    let again = client.fail(2, &client.submission("twice"));
    assert!(again.contains("running") && again.contains(&format!("temper logs -f {id}")), "{again}");
    let resumed = client.fail(2, &[client.submission("twice"), vec!["--resume".into()]].concat());
    assert!(resumed.contains("is still there"), "{resumed}");

    client.end(&id, 3);
    assert_eq!(client.wait_for(&id, "failed")["exit_code"], 3);
    let again = client.fail(2, &client.submission("twice"));
    assert!(again.contains("failed") && again.contains("--resume"), "{again}");
    std::fs::remove_file(client.run_file(&id, "stop")).unwrap();
    client.submit("twice", &["--resume"]);
    let job = client.wait_for(&id, "running");
    assert_eq!(job["attempt"], 2);
    crate::support::wait_until("the second start", || client.starts(&id).len() == 2);
    assert!(client.starts(&id)[1][2].ends_with("--resume"), "{:?}", client.starts(&id));
    assert_eq!(client.names(&format!("jobs/{id}")), ["1", "2"]);
    client.end(&id, 0);
    client.wait_for(&id, "finished");
    let again = client.fail(2, &client.submission("twice"));
    assert!(again.contains("finished") && again.contains("another seed"), "{again}");
    // Another seed is another job.
    let other = client.submit("twice", &["--set", "seed=7"]);
    assert!(other.ends_with("-s7") && other != id);
}

#[test]
fn of_two_submits_at_once_one_starts() {
    let client = Client::local("slots: 4");
    client.submit("warm", &[]);
    let words = [client.submission("race"), vec!["--no-check".into()]].concat();
    let both: Vec<_> = (0..4).map(|_| client.command(&words).spawn().unwrap()).collect();
    let outputs: Vec<_> = both.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
    let winners = outputs.iter().filter(|output| output.status.success()).count();
    let losers = outputs.iter().filter(|output| output.status.code() == Some(2)).count();
    assert_eq!((winners, losers), (1, 3), "{:?}", outputs.iter().map(|o| text(&o.stderr)).collect::<Vec<_>>());
    let id = client.names("jobs").into_iter().find(|id| id.starts_with("race")).unwrap();
    client.wait_for_start(&id);
    assert_eq!((client.starts(&id).len(), client.names(&format!("jobs/{id}")).len()), (1, 1));
}

#[test]
fn what_the_host_lacks_is_said_before_a_job_exists() {
    let client = Client::local("gpus: [0], env: {CUDA_USABLE: 'false'}");
    let line = client.fail(2, &client.submission("lacks"));
    assert!(line.contains("box") && line.contains("no usable GPU: no card"), "{line}");
    client.write_host("box", "executor: local, env: {MISSING: /data/train.jsonl}");
    let line = client.fail(2, &client.submission("lacks"));
    assert!(line.contains("data.train: /data/train.jsonl: no such file"), "{line}");
    // The real binary where libtorch is not.
    client.write_host("box", "executor: local, device: cpu, libtorch: /nowhere, setup: 'LD_BIND_NOW=1'");
    assert!(client.names("jobs").is_empty());
    let line = client.fail(2, &["submit", client.config("lacks").to_str().unwrap(), "--binary", "/nowhere/temper"]);
    assert!(line.contains("/nowhere/temper"), "{line}");
}

/// Blanks, quotes and what shells act on, in every field that takes a text.
#[test]
fn no_field_is_read_as_shell() {
    let Some(server) = Sshd::start() else { return };
    let nasty = "a b'\"$(touch pwned)`touch pwned`;touch pwned&|<>*?~#!\\";
    let json = |text: &str| serde_json::to_string(text).unwrap();
    let fields = format!(
        "ssh: localhost, ssh_options: {}, container: {}, libtorch: {}, env: {{NOTE: {}}}, setup: {}",
        server.options(),
        json(nasty),
        json(&format!("/{nasty}")),
        json(nasty),
        json("export FROM_SETUP='x y'"),
    );
    let client = Client::new(&format!("r {nasty}"), &fields);
    client.write_host(nasty, &fields);
    let seen = client.path("docker-saw");
    let stub = format!("#!/bin/sh\nprintf '%s|' \"$1\" \"$2\" \"$3\" >'{}'\nshift 3\nexec \"$@\"\n", seen.display());
    program(&server.bin().join("docker"), &stub);
    let directory = client.path(&format!("c {}", nasty.replace('/', "_")));
    std::fs::create_dir(&directory).unwrap();
    let config = directory.join("conf ig$(touch pwned).yaml");
    std::fs::copy(client.config("plain"), &config).unwrap();
    let binary = directory.join("stand in");
    std::fs::copy(client.path("stand-in"), &binary).unwrap();
    let words = ["submit", config.to_str().unwrap(), "--host", nasty, "--json", "--binary", binary.to_str().unwrap()];
    let id = serde_json::from_str::<Value>(&client.succeed(&words)).unwrap()["job"].as_str().unwrap().to_string();
    let start = client.wait_for_start(&id);
    // The stand-in separates its fields with '|', which the text has too.
    assert_eq!(start[3..].join("|"), nasty);
    assert_eq!(std::fs::read_to_string(&seen).unwrap(), format!("exec|-i|{nasty}|"));
    client.end(&id, 0);
    client.wait_for(&id, "finished");
    let out = format!("out {}", nasty.replace('/', "_"));
    client.succeed(&["fetch", &id, "--out", &out]);
    assert!(client.path(&out).join(&id).join("metrics.jsonl").exists());
    // Names of jobs come from configurations, which allow no such thing; what a user types is still data.
    for name in ["a b", "$(touch pwned)", "../x", "-rf"] {
        let named =
            ["submit".to_string(), config.display().to_string(), "--set".into(), format!("name={}", json(name))];
        let output = client.run(&named);
        assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
        assert_eq!(client.run(&["status", "--", name]).status.code(), Some(2));
    }
    let home = std::env::var_os("HOME").map(std::path::PathBuf::from).unwrap();
    let places = [client.path("pwned"), client.root.join("pwned"), home.join("pwned"), directory.join("pwned")];
    assert!(places.iter().all(|place| !place.exists()), "{places:?}");
}

#[test]
fn a_dry_run_prints_every_command_and_reaches_nobody() {
    let client = Client::new("ro ot", "ssh: user@nowhere.invalid, container: box 1, gpus: [0], slurm: []");
    let words = [
        client.submission("dry"),
        vec!["--dry-run".into(), "--after".into(), "e5c".into(), "--install-runtime".into()],
    ];
    let printed = client.succeed(&words.concat());
    let operations = ["probe", "install_runtime", "receive_blob", "receive_snapshot", "try", "try", "submit"];
    // A command may hold line breaks inside its quotes.
    let commands: Vec<&str> = printed.split("\nssh ").collect();
    assert_eq!(commands.len(), operations.len(), "{printed}");
    for (command, operation) in commands.iter().zip(operations) {
        assert!(command.contains(&format!(" temper {operation} ")), "{operation}: {command}");
        assert!(command.contains("user@nowhere.invalid") && command.contains("docker exec -i"), "{command}");
    }
    assert!(printed.contains("ok e5c") && printed.contains("--device cuda"), "{printed}");
    assert!(!client.root.exists());
}
