//! The memory estimate against a process: a training step of a model of 24 million parameters in f32 on a CPU, in a child
//! whose high-water mark (VmHWM) is its own.

use std::process::Command;

use tch::{Device, Kind};
use temper::inject::injector::Injector;
use temper::model::config::Qwen2Config;
use temper::model::generate::Completion;
use temper::model::load::random_model;
use temper::model::lora::{self, Lora};
use temper::model::pass::{PromptUid, Sequence};
use temper::model::section::{Dtype, LoraSection, ModelSection};
use temper::rl::memory::{Demand, MemoryEstimate};
use temper::rl::optimizer::AdamW;
use temper::rl::recipe::Recipe;
use temper::rl::rollout::Rollout;
use temper::rl::section::{AlgorithmSection, RolloutSection, TrainerSection};
use temper::rl::update::Updater;

const PROMPT: usize = 64;
const RESPONSE: usize = 64;
/// What the child gets: the case.
const QUESTION: &str = "TEMPER_TEST_MEMORY";

fn shapes() -> Qwen2Config {
    Qwen2Config {
        hidden_size: 512,
        intermediate_size: 2048,
        num_hidden_layers: 6,
        num_attention_heads: 8,
        num_key_value_heads: 2,
        head_dim: 64,
        vocab_size: 4096,
        ..Qwen2Config::preset("tiny-4x64").unwrap()
    }
}

/// Sequences of the micro-batch, whether blocks are computed again, and whether adapters are trained beside frozen weights.
#[derive(Clone, Copy)]
struct Case(usize, bool, bool);

fn recipe(Case(sequences, gradient_checkpointing, lora): Case) -> Recipe {
    Recipe {
        name: "memory".into(),
        seed: 0,
        hash: String::new(),
        yaml: String::new(),
        model: ModelSection { dtype: Dtype::F32, lora: lora.then(LoraSection::default), ..Default::default() },
        data: temper::data::section::DataSection {
            prompts_per_step: sequences / 2,
            max_prompt_tokens: PROMPT,
            max_response_tokens: RESPONSE,
            ..Default::default()
        },
        rollout: RolloutSection { group_size: 2, ..Default::default() },
        algorithm: AlgorithmSection { kl_coef: 0.0, ..Default::default() },
        optimizer: Default::default(),
        trainer: TrainerSection {
            minibatch_prompts: sequences / 2,
            microbatch_sequences: sequences,
            gradient_checkpointing: Some(gradient_checkpointing),
            ..Default::default()
        },
        reward: Default::default(),
        noisy_ops: Default::default(),
        noise_injection: Default::default(),
        fake_quant: Default::default(),
    }
}

fn experience(sequences: usize) -> Rollout {
    let completion = |s: usize| {
        let uid = PromptUid { step: 1, dataset_index: s as u32 / 2 };
        let ids = (0..PROMPT + RESPONSE).map(|p| ((s * 131 + p * 17) % 4096) as u32).collect();
        let sequence = Sequence { uid, member: s as u32 % 2, ids, prompt_len: PROMPT };
        Completion { sequence, logprobs: vec![-8.0; RESPONSE], finished: false }
    };
    Rollout {
        completions: (0..sequences).map(completion).collect(),
        advantages: (0..sequences).map(|s| if s % 2 == 0 { 1.0 } else { -1.0 }).collect(),
        ..Rollout::default()
    }
}

/// kB after `key` in /proc/self/status, in bytes.
fn status(key: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// In the child: a small step, so that moments and workspaces are there; then the one that is measured. Prints by how much
/// the process grew in it.
#[test]
fn child_that_trains_a_step() {
    let Ok(question) = std::env::var(QUESTION) else { return };
    let words: Vec<&str> = question.split(' ').collect();
    let case = Case(words[0].parse().unwrap(), words[1] == "true", words[2] == "true");
    tch::set_num_threads(2);
    let mut model = random_model(shapes(), 0, 0.02, Device::Cpu, Kind::Float).unwrap();
    if let Some(section) = recipe(case).model.lora {
        lora::attach_new(&mut model, Lora { section, base: String::new() }, 0).unwrap();
    }
    model.make_trainable().unwrap();
    let plan = recipe(case).injection_plan(&model.module_specs()).unwrap();
    let injector = Injector::applying(plan.clone(), plan, 2);
    let mut optimizer = AdamW::new(Default::default()).unwrap();
    let mut update_number = 0;
    let mut before = 0;
    for sequences in [2, case.0] {
        // Writing 5 sets the mark back to what is resident.
        std::fs::write("/proc/self/clear_refs", "5").unwrap();
        before = status("VmRSS:");
        let updater = Updater {
            model: &mut model,
            reference: None,
            injector: &injector,
            optimizer: &mut optimizer,
            recipe: &recipe(Case(sequences, case.1, case.2)),
            update_number: &mut update_number,
            halvings: &mut 0,
            step: 1,
            sigma: 0.0,
            progress: &mut |_| {},
            warn: &|line| panic!("{line}"),
        };
        let mut updater = updater;
        assert_eq!(updater.run(&experience(sequences)).unwrap().skipped, 0);
    }
    println!("grew {}", status("VmHWM:") - before);
}

fn measured(Case(sequences, recompute, lora): Case) -> u64 {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["memory::child_that_trains_a_step", "--exact", "--nocapture"])
        .env(QUESTION, format!("{sequences} {recompute} {lora}"))
        // Every tensor is a mapping of its own, given back when it is freed.
        .env("MALLOC_MMAP_THRESHOLD_", "65536")
        .env("OMP_WAIT_POLICY", "PASSIVE")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let grew = text.lines().find_map(|line| line.split("grew ").nth(1));
    grew.unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&output.stderr))).trim().parse().unwrap()
}

/// What the estimate says that a step needs beside what stands.
fn estimated(case: Case) -> u64 {
    let (shapes, recipe) = (shapes(), recipe(case));
    let plan = recipe.injection_plan(&lora::all_modules(&shapes, recipe.model.lora.as_ref())).unwrap();
    let estimate: MemoryEstimate = Demand::of(&recipe, &shapes, &plan, false).estimate();
    let standing = ["weights", "master_weights", "gradients", "moments", "reference"];
    let of_step = |phase: &temper::rl::memory::PhaseMemory| {
        phase.parts.iter().filter(|part| !standing.contains(&part.name)).map(|part| part.bytes).sum::<u64>()
    };
    estimate.phases.iter().filter(|phase| !["rollout", "validation"].contains(&phase.phase)).map(of_step).max().unwrap()
}

/// Within a sixth, each and in their differences: by the size of the micro-batch, and by recomputation.
#[test]
fn a_training_step_takes_the_memory_that_was_estimated() {
    if std::fs::write("/proc/self/clear_refs", "5").is_err() {
        println!("skipped: /proc/self/clear_refs cannot be written here");
        return;
    }
    let cases = [
        Case(4, false, false),
        Case(12, false, false),
        Case(4, true, false),
        Case(12, true, false),
        Case(4, false, true),
        Case(12, false, true),
    ];
    let found: Vec<(f64, f64)> =
        cases.iter().map(|&case| (measured(case) as f64 / 1e6, estimated(case) as f64 / 1e6)).collect();
    for (Case(sequences, recompute, lora), (measured, estimated)) in cases.iter().zip(&found) {
        println!(
            "{sequences} sequences of 128 tokens, recompute {recompute}, LoRA {lora}: measured {measured:.1} MB, estimated {estimated:.1} MB"
        );
    }
    let difference = |a: usize, b: usize| (found[a].0 - found[b].0, found[a].1 - found[b].1);
    let compared = [
        ("tokens, everything kept", difference(1, 0)),
        ("tokens, recomputed", difference(3, 2)),
        ("kept instead of recomputed", difference(1, 3)),
        ("tokens, adapters", difference(5, 4)),
    ];
    for (what, (measured, estimated)) in compared {
        println!("{what}: measured {measured:.1} MB, estimated {estimated:.1} MB");
        let ratio = estimated / measured;
        assert!((0.85..1.18).contains(&ratio), "{what}: measured {measured:.1} MB, estimated {estimated:.1} MB");
    }
}

/// A rollout of 60 sequences takes more than one of 20: KV cache and what sampling from 151936 logits needs. Prompts and
/// responses have 32 and 64 tokens, as the estimate assumes of all.
#[test]
fn a_rollout_takes_the_memory_that_was_estimated() {
    let dir = tempfile::tempdir().unwrap();
    let lengths = dir.path().join("lengths.txt");
    std::fs::write(&lengths, "32 64\n").unwrap();
    let mini = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/e5c_mini.yaml").display().to_string();
    let shapes = Qwen2Config::preset("qwen2.5-mini").unwrap();
    let found = [4, 12].map(|prompts| {
        let step = format!("data.prompts_per_step={prompts}");
        let keys = [&step, "noisy_ops.enabled=false", "data.max_prompt_tokens=32", "data.max_response_tokens=64"];
        let mut args =
            vec!["bench", "rollout", &mini, "--json", "-q", "--device", "cpu", "--steps", "1", "--warmup", "0"];
        args.extend(["--lengths", lengths.to_str().unwrap()]);
        args.extend(keys.iter().flat_map(|key| ["--set", key]));
        let output = crate::support::temper(&args).env("MALLOC_MMAP_THRESHOLD_", "65536").output().unwrap();
        assert!(output.status.success(), "{}", crate::support::stderr_of(&output));
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();

        let mut recipe = recipe(Case(prompts * 2, false, false));
        (recipe.data.max_prompt_tokens, recipe.data.max_response_tokens) = (32, 64);
        (recipe.data.prompts_per_step, recipe.rollout.group_size) = (prompts, 5);
        let plan = recipe.injection_plan(&shapes.modules()).unwrap();
        let estimate = Demand::of(&recipe, &shapes, &plan, false).estimate();
        assert_eq!(estimate.phases[0].phase, "rollout");
        [report["peak_host_bytes"].as_f64().unwrap(), estimate.phases[0].bytes as f64]
    });
    let (measured, estimated) = (found[1][0] - found[0][0], found[1][1] - found[0][1]);
    println!("40 sequences more: measured {:.1} MB, estimated {:.1} MB", measured / 1e6, estimated / 1e6);
    let ratio = estimated / measured;
    assert!((0.85..1.18).contains(&ratio), "measured {:.1} MB, estimated {:.1} MB", measured / 1e6, estimated / 1e6);
}
