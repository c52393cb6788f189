//! Slurm, by stand-ins for its commands: a batch script is a process whose number is the job's.

use std::path::Path;

use crate::sshd::Sshd;
use crate::support::{Client, program, wait_until};

/// Notes its words, starts the script with Slurm's variable, notes its exit code. PENDING holds a job back.
const SBATCH: &str = r#"#!/bin/sh
printf '%s\n' "$@" >"$STATE/sbatch-$(ls "$STATE" | grep -c '^sbatch-')"
for one; do
  case $one in --output=*) log=${one#--output=} ;; --chdir=*) cd "${one#--chdir=}" ;; --refuse*) echo "sbatch: error: invalid partition" >&2; exit 1 ;; esac
  script=$one
done
setsid sh -c 'SLURM_JOB_ID=$$; export SLURM_JOB_ID; while [ -e "$STATE/PENDING" ]; do sleep 0.1; done; sh "$0"; echo $? >"$STATE/exit-$$"' "$script" </dev/null >>"$log" 2>&1 &
echo "$!;cluster"
"#;
const SQUEUE: &str = r#"#!/bin/sh
[ "$1 $2 $4 $5" = '-h -j -o %i %T' ] || exit 9
[ -e "$STATE/DOWN" ] && echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2 && exit 1
for one in $(echo "$3" | tr , ' '); do
  kill -0 "$one" 2>/dev/null && found=1 && if [ -e "$STATE/PENDING" ]; then echo "$one PENDING"; else echo "$one RUNNING"; fi
done
[ -n "${found:-}" ] || { echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1; }
"#;
/// `--batch --signal=TERM N` reaches the batch script alone, `N` ends everything.
const SCANCEL: &str = r#"#!/bin/sh
printf '%s\n' "$*" >>"$STATE/scancel"
case $1 in
--batch) for child in $(ps -o pid= --ppid "$3"); do kill -TERM "$child"; done ;;
*) kill -KILL "-$1" ;;
esac
"#;

fn stand_ins(server: &Sshd, state: &Path) {
    for (name, text) in [("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL)] {
        program(&server.bin().join(name), &text.replace("$STATE", state.to_str().unwrap()));
    }
    // The machine may have a real one, or none.
    program(&server.bin().join("sacct"), "#!/bin/sh\nexit 0\n");
}

fn client(server: &Sshd, options: &str) -> Client {
    Client::over(server, &format!("executor: slurm, slurm: [{options}]"))
}

#[test]
fn a_job_gets_its_options_and_its_dependencies() {
    let Some(server) = Sshd::start() else { return };
    let state = tempfile::tempdir().unwrap();
    stand_ins(&server, state.path());
    let client = client(&server, "'--partition=a 100', '--gres=gpu:1'");
    let first = client.submit("batch", &[]);
    client.wait_for_start(&first);
    let job = client.wait_for(&first, "running");
    assert_eq!(job["slurm"][1], "RUNNING");
    let number = job["slurm"][0].as_str().unwrap();
    let second = client.submit("next", &["--after", "batch"]);
    let words = std::fs::read_to_string(state.path().join("sbatch-1")).unwrap();
    let has = |word: &str| words.lines().any(|line| line == word);
    for word in
        ["--partition=a 100", "--gres=gpu:1", "--kill-on-invalid-dep=yes", "--no-requeue", "--signal=B:TERM@120"]
    {
        assert!(has(word), "{word}: {words}");
    }
    assert!(has(&format!("--dependency=afterok:{number}")) && has(&format!("--job-name={second}")), "{words}");
    // Slurm's dependencies go by the batch script's exit code.
    client.end(&first, 3);
    assert_eq!(client.wait_for(&first, "failed")["exit_code"], 3);
    let exit = state.path().join(format!("exit-{number}"));
    wait_until("the batch script ends", || exit.exists());
    assert_eq!(std::fs::read_to_string(exit).unwrap().trim(), "3");
    let line = client.fail(2, &[client.submission("late"), vec!["--after".into(), "batch".into()]].concat());
    assert!(line.contains("ended with 3"), "{line}");
    // What has ended is no longer Slurm's to wait for.
    client.submit("later", &["--after-any", "batch"]);
    let words = std::fs::read_to_string(state.path().join("sbatch-2")).unwrap();
    assert!(!words.contains("--dependency"), "{words}");
}

#[test]
fn cancelling_leaves_time_for_a_checkpoint_and_pending_jobs_none() {
    let Some(server) = Sshd::start() else { return };
    let state = tempfile::tempdir().unwrap();
    stand_ins(&server, state.path());
    let client = client(&server, "");
    let id = client.submit("cancelled", &[]);
    client.wait_for_start(&id);
    let answer = client.succeed(&["cancel", &id, "--json"]);
    assert!(answer.contains("\"term\""), "{answer}");
    assert_eq!(client.wait_for(&id, "cancelled")["exit_code"], 130);
    let log = client.succeed(&["logs", &id]);
    assert_eq!(log.matches("stopping").count(), 1, "{log}");
    let asked = std::fs::read_to_string(state.path().join("scancel")).unwrap();
    assert!(asked.starts_with("--batch --signal=TERM"), "{asked}");

    std::fs::write(state.path().join("PENDING"), "").unwrap();
    let id = client.submit("pending", &[]);
    assert_eq!(client.state(&id), "queued");
    let line = client.fail(2, &[client.submission("pending"), vec!["--resume".into()]].concat());
    assert!(line.contains("is still there"), "{line}");
    client.succeed(&["cancel", &id]);
    client.wait_for(&id, "cancelled");
    assert!(client.starts(&id).is_empty());
}

#[test]
fn a_controller_that_does_not_answer_says_nothing_of_its_jobs() {
    let Some(server) = Sshd::start() else { return };
    let state = tempfile::tempdir().unwrap();
    stand_ins(&server, state.path());
    let client = client(&server, "");
    let id = client.submit("down", &[]);
    client.wait_for_start(&id);
    std::fs::write(state.path().join("DOWN"), "").unwrap();
    assert_eq!(client.state(&id), "unknown");
    let line = client.fail(2, &[client.submission("down"), vec!["--resume".into()]].concat());
    assert!(line.contains("may still be there"), "{line}");
    let line = client.fail(1, &["cancel", &id]);
    assert!(line.contains("Slurm does not answer"), "{line}");
    client.succeed(&["clean", "--jobs", "--older-than", "0"]);
    assert_eq!((client.names("jobs").len(), client.names("snapshots").len()), (1, 1));
    std::fs::remove_file(state.path().join("DOWN")).unwrap();
    assert_eq!(client.state(&id), "running");
    client.end(&id, 0);
    client.wait_for(&id, "finished");
}

#[test]
fn what_sbatch_refuses_is_its_own_word_and_no_job() {
    let Some(server) = Sshd::start() else { return };
    let state = tempfile::tempdir().unwrap();
    stand_ins(&server, state.path());
    let client = client(&server, "--refuse");
    let line = client.fail(1, &client.submission("refused"));
    assert!(line.contains("invalid partition"), "{line}");
    assert!(client.names("jobs").is_empty());
}
