//! Containers, nvidia-smi and the installation of torch, each by a stand-in that notes what it was asked.

use crate::sshd::Sshd;
use crate::support::{Client, program};

/// A container keeps the host's files and has programs of its own.
#[test]
fn a_container_is_entered_for_every_call() {
    let Some(server) = Sshd::start() else { return };
    let client = Client::over(&server, "container: temper-dev, gpus: [0]");
    let seen = client.path("docker-saw");
    let line = |tail: &str| format!("#!/bin/sh\nprintf '%s\\n' \"$*\" | head -n 1 >>'{}'\n{tail}", seen.display());
    program(
        &server.bin().join("docker"),
        &line("[ \"$1 $2 $3\" = 'exec -i temper-dev' ] || exit 9\nshift 3\nINSIDE=1 exec \"$@\"\n"),
    );
    let id = client.submit("inside", &[]);
    let start = client.wait_for_start(&id);
    assert_eq!(start[1], "0");
    client.end(&id, 0);
    client.wait_for(&id, "finished");
    let calls = std::fs::read_to_string(&seen).unwrap();
    assert!(
        calls.lines().count() >= 7 && calls.lines().all(|line| line.starts_with("exec -i temper-dev sh -c ")),
        "{calls}"
    );
    // A wrapper may speak before the agent does.
    program(&server.bin().join("docker"), &line("echo 'Welcome to the machine'\nshift 3\nexec \"$@\"\n"));
    assert_eq!(client.state(&id), "finished");
    // A container that is not there is no failure of the job.
    program(
        &server.bin().join("docker"),
        &line("echo 'Error response from daemon: No such container: temper-dev' >&2\nexit 1\n"),
    );
    let table = client.succeed(&["status"]);
    assert!(table.contains("unknown") && table.contains("No such container"), "{table}");
    let error = client.fail(1, &["logs", &id]);
    assert!(error.contains("No such container"), "{error}");
}

#[test]
fn status_shows_the_cards_and_who_holds_them() {
    let Some(server) = Sshd::start() else { return };
    let client = Client::over(&server, "gpus: [0, 1]");
    program(
        &server.bin().join("nvidia-smi"),
        "#!/bin/sh\nprintf '0, NVIDIA A100-SXM4-80GB, 97, 41000, 81920, 390.12, 61\\n1, NVIDIA A100-SXM4-80GB, 0, 4, 81920, 60.00, 30\\n'\n",
    );
    let id = client.submit("cards", &[]);
    let gpu = client.wait_for_start(&id)[1].clone();
    client.wait_for(&id, "running");
    let table = client.succeed(&["status"]);
    let row = table.lines().find(|line| line.contains("A100") && line.split_whitespace().nth(1) == Some(&gpu)).unwrap();
    assert!(row.ends_with(&id), "{table}");
    assert!(table.contains("0.500") && table.contains("25.00 % clean") && table.contains("1.5"), "{table}");
}

/// pip is not asked here: a stand-in makes the environment whose torch the job then finds.
#[test]
fn torch_is_installed_where_asked_and_used() {
    let client = Client::local("slots: 1, python: ./python-stand-in");
    let log = client.path("pip-saw");
    let python = format!(
        "#!/bin/sh\nprintf '%s\\n' \"$*\" >>'{0}'\ncase \"$*\" in\n\
         '-m venv '*) mkdir -p \"$3/bin\" \"$3/site/torch/lib\" && cp \"$0\" \"$3/bin/python\" ;;\n\
         '-m pip '*) exit 0 ;;\n*) echo \"$(dirname \"$(dirname \"$0\")\")/site/torch\" ;;\nesac\n",
        log.display()
    );
    program(&client.path("python-stand-in"), &python);
    let launches = || std::fs::read_to_string(&log).unwrap_or_default();
    let id = client.submit("runtime", &["--install-runtime"]);
    assert!(launches().contains("pip install") && launches().contains("torch==2.11.0"), "{}", launches());
    client.wait_for_start(&id);
    let torch = client.root.join("runtime/torch");
    assert_eq!(
        std::fs::canonicalize(torch).unwrap(),
        std::fs::canonicalize(client.root.join("runtime/venv/site/torch")).unwrap()
    );
    // Once is enough.
    let before = launches();
    client.submit("runtime", &["--install-runtime", "--set", "seed=1"]);
    assert_eq!(launches(), before);
    client.end(&id, 0);
}
