//! Containers, Slurm, nvidia-smi and the installation of torch, each by a stand-in that notes what it was asked.

use crate::sshd::Sshd;
use crate::support::{Client, program, wait_until};

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

const SBATCH: &str = r#"#!/bin/sh
printf '%s\n' "$@" >"$STATE/sbatch-$(ls "$STATE" | grep -c '^sbatch-')"
for one; do
  case $one in --output=*) log=${one#--output=} ;; --chdir=*) cd "${one#--chdir=}" ;; --refuse*) echo "sbatch: error: invalid partition" >&2; exit 1 ;; esac
  script=$one
done
setsid sh "$script" </dev/null >>"$log" 2>&1 &
echo $! >"$STATE/pid-$!"
echo "$!;cluster"
"#;
const SQUEUE: &str =
    "#!/bin/sh\n[ \"$1 $2 $4\" = '-h -j -o' ] || exit 9\nkill -0 \"$3\" 2>/dev/null && echo RUNNING\nexit 0\n";
const SCANCEL: &str = r#"#!/bin/sh
printf '%s\n' "$*" >>"$STATE/scancel"
case $1 in --full) kill -TERM "-$3" ;; *) kill -KILL "-$1" ;; esac
"#;

#[test]
fn slurm_gets_its_options_and_is_asked_for_states() {
    let Some(server) = Sshd::start() else { return };
    let state = tempfile::tempdir().unwrap();
    for (name, text) in [("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL)] {
        program(&server.bin().join(name), &text.replace("$STATE", state.path().to_str().unwrap()));
    }
    let options = "slurm: ['--partition=a 100', '--gres=gpu:1']";
    let client = Client::over(&server, &format!("executor: slurm, {options}"));
    let first = client.submit("batch", &[]);
    client.wait_for_start(&first);
    let job = client.wait_for(&first, "running");
    assert_eq!(job["slurm"][1], "RUNNING");
    let second = client.submit("next", &["--after", "batch"]);
    let words: Vec<String> =
        std::fs::read_to_string(state.path().join("sbatch-1")).unwrap().lines().map(String::from).collect();
    let number = job["slurm"][0].as_str().unwrap();
    assert!(
        words.contains(&"--partition=a 100".to_string()) && words.contains(&"--gres=gpu:1".to_string()),
        "{words:?}"
    );
    assert!(
        words.contains(&format!("--dependency=afterok:{number}")) && words.contains(&format!("--job-name={second}"))
    );
    client.end(&first, 0);
    client.wait_for(&first, "finished");

    client.wait_for_start(&second);
    client.succeed(&["cancel", &second]);
    let job = client.wait_for(&second, "cancelled");
    assert_eq!(job["exit_code"], 130);
    let asked = std::fs::read_to_string(state.path().join("scancel")).unwrap();
    assert!(asked.starts_with("--full --signal=TERM"), "{asked}");

    // What sbatch refuses is its own word, and no job.
    client.write_host(
        "box",
        &format!("executor: slurm, ssh: localhost, ssh_options: {}, slurm: [--refuse]", server.options()),
    );
    let line = client.fail(1, &client.submission("refused"));
    assert!(line.contains("invalid partition"), "{line}");
    assert!(
        !client
            .names("jobs")
            .iter()
            .any(|id| id.starts_with("refused") && !client.names(&format!("jobs/{id}")).is_empty())
    );
    wait_until("jobs are over", || client.succeed(&["status", "--json"]).matches("\"running\"").count() == 0);
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
