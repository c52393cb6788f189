//! Kill -9 at random moments, then `--resume` until the end: the run is the one that nobody killed, byte for byte.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::support::{assert_same_run, config, files, names, rows, run_dir, stderr_of, succeed, temper, train_args};

/// Three configurations that together touch everything a resume must bring back: f32 and bf16 weights, moments, the KL
/// reference, AQN on norms and on linears, stochastically quantized weights, activations with calibrated scales, both draw modes,
/// warm-up, skipping epochs' orders, rows that are refilled, micro-batches by tokens, adapters beside weights that are quantized
/// once.
const F32: &str = "
trainer: {save_every: 1, val_every: 3, keep_last: 2, keep_best: 1, microbatch_tokens: 60, offload_reference: true}
rollout: {max_sequences: 4}
algorithm: {kl_coef: 0.05}
optimizer: {warmup_steps: 5}
reward: {mode: numeric}";
const BF16: &str = "
model: {dtype: bf16}
trainer: {save_every: 2, val_every: 5, keep_last: 1, keep_best: 2, microbatch_sequences: 3}
algorithm: {kl_coef: 0.05, kl_estimator: k1}
reward: {mode: numeric}
noisy_ops: {draw: shared, dw_draw: per_microbatch}
noise_injection: {layer_types: [rmsnorm, linear], apply_to: rollout_and_update}
fake_quant: {enabled: true, weights: 'mxfp4:sr', activations: nvfp4, activation_scale: static, calibration_prompts: 5}";
const LORA: &str = "
model: {dtype: bf16, lora: {rank: 4}}
trainer: {save_every: 1, val_every: 4, microbatch_tokens: 60}
algorithm: {kl_coef: 0.05}
optimizer: {lr: 1e-3}
reward: {mode: numeric}
noisy_ops: {adapters: true}
fake_quant: {enabled: true, weights: 'nvfp4:sr', phases: all}";
const KILLS: usize = 27;

#[test]
fn a_run_killed_at_random_moments_ends_as_if_it_had_not_been() {
    let dir = tempfile::tempdir().unwrap();
    let mut moments = BTreeMap::new();
    let mut random = Random(0x5eed);
    let (mut kills, mut runs) = (0, 0);
    let started = Instant::now();
    let references = [("f32", F32), ("bf16", BF16), ("lora", LORA)].map(|(name, yaml)| {
        let config = config(dir.path(), name, yaml);
        let out = dir.path().join(format!("{name}-whole"));
        let started = Instant::now();
        succeed(&train_args(&config, &out));
        (config, run_dir(&out), started.elapsed())
    });
    while kills < KILLS {
        let (config, whole, whole_time) = &references[runs % references.len()];
        let out = dir.path().join(format!("killed-{runs}"));
        let mut args = train_args(config, &out);
        args.push("--resume".to_string());
        loop {
            let mut child = temper(&args).spawn().unwrap();
            // Every third kill waits for a checkpoint that is being written, which is a small part of the time.
            let delay = whole_time.mul_f64(0.7 * random.unit());
            let armed = Instant::now();
            let at_checkpoint = kills % 3 == 2;
            let killed = loop {
                if child.try_wait().unwrap().is_some() {
                    break false;
                }
                if (at_checkpoint && is_writing(&out)) || armed.elapsed() > delay {
                    child.kill().unwrap();
                    break true;
                }
                std::thread::sleep(Duration::from_micros(100));
            };
            let output = child.wait_with_output().unwrap();
            // A process that ended before the signal reached it was not killed.
            if !killed || output.status.success() {
                assert!(output.status.success(), "{:?}\n{}", output.status, stderr_of(&output));
                break;
            }
            kills += 1;
            *moments.entry(moment(&out)).or_insert(0) += 1;
        }
        runs += 1;
        assert_same_run(whole, &run_dir(&out));
        for file in files(&run_dir(&out)) {
            let name = file.rsplit('/').next().unwrap();
            assert!(!name.starts_with('.') || name == ".lock", "left behind: {file}");
        }
        std::fs::remove_dir_all(&out).unwrap();
    }
    println!("{kills} kills over {runs} runs in {:.0} s: {moments:?}", started.elapsed().as_secs_f64());
    assert!(moments.len() >= 4, "the moments are not spread: {moments:?}");
}

/// Some checkpoint in `out` is being written now.
fn is_writing(out: &Path) -> bool {
    let runs = names(out);
    runs.first().is_some_and(|run| names(&out.join(run).join("checkpoints")).iter().any(|n| n.starts_with(".writing_")))
}

/// What the process was about when it died, as far as its files tell.
fn moment(out: &Path) -> &'static str {
    let runs = names(out);
    let Some(dir) = runs.first().map(|run| out.join(run)).filter(|dir| dir.join("metrics.jsonl").exists()) else {
        return "start";
    };
    if is_writing(out) {
        return "checkpoint";
    }
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let Some(last) = text.lines().last().filter(|_| text.ends_with('\n')) else {
        return "first validation";
    };
    let row: serde_json::Value = serde_json::from_str(last).unwrap();
    let saved = std::fs::read_link(dir.join("latest")).map(|l| l.to_string_lossy().into_owned()).unwrap_or_default();
    match row["kind"] == "train" && !saved.ends_with(&format!("{:06}", row["step"].as_u64().unwrap())) {
        true => "after a step",
        false => "in a step",
    }
}

/// A seeded xorshift.
struct Random(u64);

impl Random {
    /// In [0, 1).
    fn unit(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// What the comparison above rests on: the runs do something.
#[test]
fn the_run_that_is_compared_learns_and_validates() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    succeed(&train_args(&config(dir.path(), "f32", F32), &out));
    let rows = rows(&run_dir(&out).join("metrics.jsonl"));
    let train: Vec<_> = rows.iter().filter(|r| r["kind"] == "train").collect();
    assert_eq!(train.len(), 12);
    assert!(train.iter().all(|r| r["grad_norm"].as_f64().unwrap() > 0.0));
    assert!(train.iter().any(|r| r["reward/zero_std_groups"].as_f64().unwrap() < 1.0), "no advantage in any step");
    let validated: Vec<_> = rows.iter().filter(|r| r["kind"] == "val").map(|r| r["step"].as_u64().unwrap()).collect();
    assert_eq!(validated, [0, 3, 6, 9, 12]);
}
