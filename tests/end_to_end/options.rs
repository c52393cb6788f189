//! Every option of the algorithm on the tiny model: it trains, and what it does shows in metrics.jsonl and samples.jsonl.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::{
    assert_same_run, config, rows, run as run_program, run_dir, stderr_of, succeed, temper, train_args, wait_until,
};

/// A clean run of one epoch: six steps, 4 prompts x 4 responses, two updates a step; all samples are kept.
const BASE: &str = "
data: {prompts_per_step: 4}
rollout: {group_size: 4}
trainer: {epochs: 1, minibatch_prompts: 2, val_every: 0, val_before_train: false, samples_per_step: 100}
noisy_ops: {enabled: false}
noise_injection: {enabled: false}
reward: {mode: numeric}";

struct Run {
    dir: PathBuf,
    train: Vec<Value>,
    samples: Vec<Value>,
    said: String,
}

/// Trains BASE with `sets`.
fn train(dir: &Path, name: &str, sets: &[&str]) -> Run {
    let path = config(dir, name, BASE);
    let out = dir.join(format!("{name}-out"));
    let mut args = train_args(&path, &out);
    sets.iter().for_each(|set| args.extend(["--set".to_string(), set.to_string()]));
    let output = run_program(&args);
    assert!(output.status.success(), "{name}: {}", stderr_of(&output));
    let dir = run_dir(&out);
    let train: Vec<Value> = rows(&dir.join("metrics.jsonl")).into_iter().filter(|row| row["kind"] == "train").collect();
    assert_eq!(train.len(), 6, "{name}");
    for row in &train {
        assert!(row["grad_norm"].is_number() && row["loss/policy"].is_number(), "{name}: {row}");
        assert_eq!(row["skipped_steps"], 0.0, "{name}");
    }
    Run { samples: rows(&dir.join("samples.jsonl")), dir, train, said: stderr_of(&output) }
}

fn column(rows: &[Value], key: &str) -> Vec<f64> {
    rows.iter().map(|row| row[key].as_f64().unwrap_or_else(|| panic!("{key} in {row}"))).collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Rewards and advantages of a step's groups, four each.
fn groups(run: &Run, step: u64) -> Vec<(Vec<f64>, Vec<f64>)> {
    let of_step: Vec<Value> = run.samples.iter().filter(|row| row["step"] == step).cloned().collect();
    of_step.chunks(4).map(|group| (column(group, "reward"), column(group, "advantage"))).collect()
}

#[test]
fn advantages_are_those_of_the_rule() {
    let dir = tempfile::tempdir().unwrap();
    for rule in ["dr_grpo", "rloo", "batch_std"] {
        let run = train(dir.path(), rule, &[&format!("algorithm.advantage={rule}")]);
        let mut seen = 0;
        for step in 1..=6 {
            let groups = groups(&run, step);
            let all: Vec<f64> = groups.iter().flat_map(|(rewards, _)| rewards.clone()).collect();
            let batch_std = (all.iter().map(|r| (r - mean(&all)).powi(2)).sum::<f64>() / 15.0).sqrt();
            for (rewards, advantages) in groups {
                seen += usize::from(advantages.iter().any(|a| *a != 0.0));
                for (r, a) in rewards.iter().zip(advantages) {
                    let d = r - mean(&rewards);
                    let expected = match rule {
                        "dr_grpo" => d,
                        "rloo" => d * 4.0 / 3.0,
                        _ => d / (batch_std + 1e-6),
                    };
                    assert!((a - expected).abs() < 1e-9, "{rule}: {a}, expected {expected}");
                }
            }
        }
        assert!(seen > 3, "{rule}: hardly a group with an advantage");
    }
}

/// GSPO with one update a step is on the policy: all ratios are 1. Over four updates a sequence's ratio stays nearer to 1
/// than the furthest of its tokens.
#[test]
fn sequence_ratios_stay_nearer_to_1() {
    let dir = tempfile::tempdir().unwrap();
    let sets = ["optimizer.lr=1e-3", "trainer.minibatch_prompts=1", "algorithm.clip_low=0.9", "algorithm.clip_high=9"];
    let token = train(dir.path(), "token", &sets);
    let sequence = train(dir.path(), "sequence", &[&sets[..], &["algorithm.ratio=sequence"]].concat());
    let largest = |run: &Run| column(&run.train, "ratio/max").into_iter().fold(0.0, f64::max);
    assert!(largest(&token) > 1.2, "{}", largest(&token));
    assert!(largest(&sequence) > 1.0 && largest(&sequence) < largest(&token), "{}", largest(&sequence));
    // One step's rollout is the same; the updates are not.
    assert_eq!(token.train[0]["reward/mean"], sequence.train[0]["reward/mean"]);
    assert_ne!(token.train[0]["loss/policy"], sequence.train[0]["loss/policy"]);
}

#[test]
fn the_entropy_bonus_keeps_the_policy_undecided() {
    let dir = tempfile::tempdir().unwrap();
    let last = |name: &str, coef: &str| {
        let set = format!("algorithm.entropy_coef={coef}");
        let run = train(dir.path(), name, &[&set, "optimizer.lr=5e-4"]);
        let (entropy, loss) = (column(&run.train, "entropy"), &run.train[0]["loss/entropy"]);
        (entropy[0], entropy[5], loss.as_f64())
    };
    let (first, without, none) = last("without", "0");
    let (first_up, up, bonus) = last("up", "1");
    let (_, down, _) = last("down", "-1");
    assert!(none.is_none());
    // Up to the weights of updates with more and with fewer tokens.
    assert!((bonus.unwrap() / -first_up - 1.0).abs() < 0.1, "loss/entropy is -coef times the entropy");
    println!("entropy {first:.3}: {without:.3} without, {up:.3} and {down:.3} with a bonus of 1 and -1");
    assert!(up > without + 0.05 && down < without - 0.05, "{down} {without} {up}");
}

/// Under independent noise the update's policy is not the rollout's, and the weights say so; without noise they are 1.
#[test]
fn importance_weights_tell_noise_apart() {
    let dir = tempfile::tempdir().unwrap();
    let clean = train(dir.path(), "clean", &["algorithm.truncated_importance=2"]);
    assert!(column(&clean.train, "importance/mean").iter().all(|w| (w - 1.0).abs() < 1e-3));
    assert!(column(&clean.train, "importance/truncated").iter().all(|w| *w == 0.0));
    let noise = ["noisy_ops.enabled=true", "algorithm.truncated_importance=1.05"];
    let noisy = train(dir.path(), "noisy", &noise);
    let weights = column(&noisy.train, "importance/mean");
    assert!(weights.iter().all(|w| *w < 0.999 && *w > 0.5), "{weights:?}");
    assert!(column(&noisy.train, "importance/truncated").iter().all(|w| *w > 0.0));
}

/// 12 updates, 3 of warm-up, then down a line to a tenth: update t > 3 has .1 + .9 (1 - (t - 4)/9). A row shows its step's
/// last update.
#[test]
fn the_learning_rate_follows_its_schedule_and_a_resume_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let sets = [
        "optimizer.schedule=linear",
        "optimizer.min_lr_ratio=0.1",
        "optimizer.warmup_steps=3",
        "optimizer.lr=1e-4",
        "trainer.save_every=1",
    ];
    let whole = train(dir.path(), "linear", &sets);
    let factor = |t: f64| if t <= 3.0 { t / 3.0 } else { 0.1 + 0.9 * (1.0 - (t - 4.0) / 9.0) };
    for (step, lr) in (1..).zip(column(&whole.train, "lr")) {
        assert!((lr - 1e-4 * factor(2.0 * f64::from(step))).abs() < 1e-12, "step {step}: {lr}");
    }
    killed_and_resumed(dir.path(), "linear", &sets, &whole);
    let cosine = train(dir.path(), "cosine", &["optimizer.schedule=cosine", "optimizer.lr=1e-4"]);
    let last = *column(&cosine.train, "lr").last().unwrap();
    let expected = 0.5e-4 * (1.0 + (std::f64::consts::PI * 11.0 / 12.0).cos());
    assert!((last - expected).abs() < 1e-12, "{last}");
}

/// What the rollout may choose from; log-probs stay those of the whole distribution, so the first ratios are 1.
#[test]
fn a_rollout_may_be_filtered() {
    let dir = tempfile::tempdir().unwrap();
    let sets = ["rollout.top_p=0.5", "rollout.top_k=3"];
    let (plain, filtered) = (train(dir.path(), "plain", &[]), train(dir.path(), "filtered", &sets));
    let gap = |run: &Run| column(&run.train, "logprob_gap/mean_abs");
    assert!(gap(&filtered).iter().all(|gap| *gap < 1e-4), "{:?}", gap(&filtered));
    let distinct = |run: &Run| {
        let responses = run.samples.iter().map(|row| row["response"].to_string());
        responses.collect::<std::collections::HashSet<String>>().len()
    };
    assert!(distinct(&filtered) < distinct(&plain), "{} of {}", distinct(&filtered), distinct(&plain));
    killed_and_resumed(dir.path(), "filtered", &sets, &filtered);
}

/// The same run killed after step 3 and continued is the same, byte for byte.
fn killed_and_resumed(dir: &Path, name: &str, sets: &[&str], whole: &Run) {
    let out = dir.join(format!("{name}-killed"));
    let mut args = train_args(&dir.join(format!("{name}.yaml")), &out);
    sets.iter().for_each(|set| args.extend(["--set".to_string(), set.to_string()]));
    args.push("--resume".to_string());
    let mut child = temper(&args).spawn().unwrap();
    wait_until("a third step", || {
        let run = crate::support::names(&out).first().map(|run| out.join(run).join("metrics.jsonl"));
        let text = run.and_then(|path| std::fs::read_to_string(path).ok()).unwrap_or_default();
        text.contains("{\"step\":3,")
    });
    child.kill().unwrap();
    assert!(!child.wait().unwrap().success(), "it was done before it was killed");
    succeed(&args);
    assert_same_run(&whole.dir, &run_dir(&out));
}

/// Groups without a spread are replaced: all that the step trains on have one. Its own questions come first, the others once.
#[test]
fn dynamic_sampling_replaces_groups_that_teach_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let sets = ["algorithm.dynamic_sampling={max_rounds: 6}", "trainer.save_every=1"];
    let plain = train(dir.path(), "plain", &[]);
    let dynamic = train(dir.path(), "dynamic", &sets);
    assert!(column(&plain.train, "reward/zero_std_groups").iter().any(|z| *z > 0.0), "there was nothing to replace");
    for (step, row) in (1..).zip(&dynamic.train) {
        let [rounds, sampled, kept] = ["rounds", "groups_sampled", "groups_kept"]
            .map(|key| row[format!("dynamic_sampling/{key}")].as_f64().unwrap());
        assert!((1.0..=6.0).contains(&rounds) && kept <= 4.0 && sampled >= 4.0, "{row}");
        assert_eq!(row["reward/zero_std_groups"], 0.0, "{row}");
        let groups = groups(&dynamic, step);
        assert_eq!(groups.len() as f64, kept);
        for (rewards, _) in groups {
            assert!(rewards.iter().any(|r| *r != rewards[0]), "{rewards:?}");
        }
        let of_step = dynamic.samples.iter().filter(|row| row["step"] == step);
        let mut questions: Vec<u64> = of_step.map(|row| row["dataset_index"].as_u64().unwrap()).collect();
        questions.dedup();
        let own: Vec<u64> = questions.clone();
        questions.sort_unstable();
        questions.dedup();
        assert_eq!(questions.len(), own.len(), "a question came twice");
        assert_eq!(dynamic.said.contains(&format!("step {step}: dynamic sampling: ")), kept < 4.0, "{}", dynamic.said);
    }
    let more = column(&dynamic.train, "dynamic_sampling/groups_sampled").iter().sum::<f64>();
    assert!(more > 24.0, "nothing was replaced");
    // The first step's own groups are those of the run without; what it sampled says the policy's accuracy.
    let spread = |run: &Run| -> Vec<Vec<f64>> {
        let rewards = groups(run, 1).into_iter().map(|(rewards, _)| rewards);
        rewards.filter(|rewards| rewards.iter().any(|r| *r != rewards[0])).collect()
    };
    let (first, all) = (spread(&plain), spread(&dynamic));
    assert_eq!(all[..first.len()], first[..]);
    killed_and_resumed(dir.path(), "dynamic", &sets, &dynamic);
}

/// All at once under 5 % error and AQN: what is injected in further rounds is what was planned, with blocks computed again
/// in backward as without.
#[test]
fn options_go_with_noise_and_recomputation() {
    let dir = tempfile::tempdir().unwrap();
    let sets = [
        "noisy_ops.enabled=true",
        "noise_injection.enabled=true",
        "algorithm={advantage: rloo, ratio: sequence, truncated_importance: 1.5, entropy_coef: 0.01, dynamic_sampling: {}}",
    ];
    let kept = train(dir.path(), "kept", &sets);
    assert!(column(&kept.train, "dynamic_sampling/rounds").iter().any(|rounds| *rounds > 1.0));
    assert!(column(&kept.train, "injection/disagreements").iter().all(|n| *n == 0.0), "{}", kept.said);
    let again = train(dir.path(), "again", &[&sets[..], &["trainer.gradient_checkpointing=true"]].concat());
    assert_eq!(kept.train, again.train);
}

/// Where every answer is wrong no group teaches anything: bounded rounds, a warning, a step all the same.
#[test]
fn dynamic_sampling_ends_where_nothing_teaches() {
    let dir = tempfile::tempdir().unwrap();
    let sets = ["algorithm.dynamic_sampling={max_rounds: 2}", "data.max_response_tokens=1", "reward.mode=strict"];
    let run = train(dir.path(), "hopeless", &sets);
    for row in &run.train {
        assert_eq!((&row["dynamic_sampling/rounds"], &row["dynamic_sampling/groups_kept"]), (&2.0.into(), &0.0.into()));
        assert_eq!(
            (&row["dynamic_sampling/groups_sampled"], &row["dynamic_sampling/reward_sampled"]),
            (&8.0.into(), &0.0.into())
        );
    }
    let line = "step 1: dynamic sampling: 8 groups in 2 rounds; training on the first round's, which teach nothing";
    assert!(run.said.contains(line), "{}", run.said);
}

/// reward = right or wrong + .5 clip((24 - 24 - tokens)/24, -1, 0).
#[test]
fn long_responses_are_penalized() {
    let dir = tempfile::tempdir().unwrap();
    let sets = [
        "reward.overlong={buffer_tokens: 24, factor: 0.5}",
        // Nothing that stops it: a penalty is a number below 0, not a share.
        "trainer.stop_rules=[{metric: reward/overlong, below: -0.6}, {metric: reward/mean, below: -1.5}]",
    ];
    let run = train(dir.path(), "overlong", &sets);
    let (mut lost, mut seen) = (0.0, 0);
    for row in run.samples.iter().filter(|row| row["step"] == 1) {
        let penalty = row["reward"].as_f64().unwrap() - row["reward_numeric"].as_f64().unwrap();
        assert!((-0.5..=0.0).contains(&penalty), "{row}");
        let tokens = -penalty / 0.5 * 24.0;
        assert!(tokens > 0.9 && (tokens - tokens.round()).abs() < 1e-9, "{row}");
        seen += 1;
        lost += penalty / 16.0;
    }
    assert_eq!(seen, 16);
    assert!((run.train[0]["reward/overlong"].as_f64().unwrap() - lost).abs() < 1e-9);
}

/// A command rewards short responses, dies once and cannot score some: these have no reward and an advantage of 0, the other
/// members of their group one among themselves; the run goes on with a warning.
#[test]
fn a_command_rewards_and_may_fail() {
    let dir = tempfile::tempdir().unwrap();
    let (script, died) = (dir.path().join("score.py"), dir.path().join("died"));
    let program = "import json, os, sys
died = sys.argv[1]
for line in sys.stdin:
    r = json.loads(line)
    if r['id'] == 20 and not os.path.exists(died):
        open(died, 'w').close()
        sys.exit(7)
    reward = None if r['member'] == 1 else -len(r['response'])
    print(json.dumps({'id': r['id'], 'reward': reward}), flush=True)";
    std::fs::write(&script, program).unwrap();
    let command = format!("reward={{kind: command, command: [python3, {}, {}]}}", script.display(), died.display());
    let run = train(dir.path(), "command", &[&command]);
    assert!(run.said.contains("it ended (exit status: 7)") && run.said.contains("restart 1 of 3"), "{}", run.said);
    // Step 2 asks ids 16 .. 31: what follows 19 got no answer.
    assert_eq!(column(&run.train, "reward/unscorable"), [0.25, 0.8125, 0.25, 0.25, 0.25, 0.25]);
    let mut unequal = 0;
    for row in &run.samples {
        let length = row["response"].as_str().unwrap().len() as f64;
        let step_2_unanswered = row["step"] == 2 && !row["reward"].is_number();
        match row["reward"].as_f64() {
            Some(reward) => assert!(reward == -length && row["member"] != 1, "{row}"),
            None => assert!((row["member"] == 1 || step_2_unanswered) && row["advantage"] == 0.0, "{row}"),
        }
        unequal += usize::from(row["advantage"] != 0.0);
    }
    assert!(unequal > 12, "hardly an advantage");
    let none = temper::config::load(
        &config(dir.path(), "x", BASE),
        &["reward={kind: command, command: [no-such-scorer]}".into()],
    );
    assert!(none.is_ok(), "what is installed is not the configuration's to know");
    // A dry run says so, and so does a run, before it has a directory.
    let out = dir.path().join("x-out");
    for last in ["--dry-run", "--quiet"] {
        let mut args = train_args(&dir.path().join("x.yaml"), &out);
        args.extend(["--set", "reward={kind: command, command: [no-such-scorer]}", last].map(String::from));
        let (output, expected) = (run_program(&args), "error: reward.command: found [\"no-such-scorer\"]");
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr_of(&output).starts_with(expected), "{}", stderr_of(&output));
        assert!(!out.exists());
    }
}

/// configs/dapo.yaml, dr_grpo.yaml and gspo.yaml: their algorithm and reward on the tiny model.
#[test]
fn the_recipes_of_papers_train() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["dapo", "dr_grpo", "gspo"] {
        let registry = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs").join(format!("{name}.yaml"));
        let recipe = temper::config::load(&registry, &[]).unwrap();
        let algorithm = serde_json::to_string(&recipe.algorithm).unwrap();
        let mut sets = vec![format!("algorithm={algorithm}")];
        if recipe.reward.overlong.is_some() {
            sets.push("reward.overlong={buffer_tokens: 8}".to_string());
        }
        let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
        let run = train(dir.path(), name, &sets);
        assert!(column(&run.train, "grad_norm").iter().any(|g| *g > 0.0), "{name}");
        assert!(column(&run.train, "loss/kl").iter().all(|kl| *kl == 0.0), "{name} has no KL term");
    }
}
