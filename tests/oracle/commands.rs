//! `temper score` and `temper generate` against transformers.
//!
//! On a CPU the commands compute in f32, whatever the checkpoint's dtype, so bf16 checkpoints are held to the same bound.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::expected::{LOGPROB_TOLERANCE, assert_logprobs, expected, stories};

const STORY_TOKENS: usize = 150;

/// The JSON that a command prints on stdout, alone.
pub fn temper(command: &str, dir: &Path, args: &[&str]) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_temper"))
        .args([command, dir.to_str().unwrap(), "--device", "cpu", "--json", "--quiet"])
        .args(args)
        .env("OMP_NUM_THREADS", "1") // the models are tiny and the tests run side by side
        .output()
        .unwrap();
    let what = format!("temper {command} {}", dir.display());
    assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{what}: {e} in {}", String::from_utf8_lossy(&output.stdout)))
}

pub fn comma_separated(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

pub fn score(dir: &Path, ids: &[u32]) -> Vec<f64> {
    let result = temper("score", dir, &["--ids", &comma_separated(ids)]);
    assert_eq!(id_list(&result), ids, "score repeats the ids");
    result["logprobs"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

fn generate(dir: &Path, ids: &[u32], max_new_tokens: usize, more: &[&str]) -> Vec<u32> {
    let (ids, limit) = (comma_separated(ids), max_new_tokens.to_string());
    let args = [&["--ids", &ids, "--greedy", "--max-new-tokens", &limit], more].concat();
    id_list(&temper("generate", dir, &args))
}

fn id_list(result: &Value) -> Vec<u32> {
    result["ids"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

#[test]
fn score_agrees_with_transformers() {
    let Some(expected) = expected() else { return };
    let mut worst = 0f64;
    for model in &expected.models {
        for case in &model.scores {
            let what = format!("{} on {} ids", model.name, case.ids.len());
            let got = score(&expected.dir(model), &case.ids);
            worst = worst.max(assert_logprobs(&got, &case.logprobs, LOGPROB_TOLERANCE, &what));
        }
    }
    println!("temper score: largest difference from transformers in f32 {worst:.1e}");
}

#[test]
fn generate_agrees_with_transformers() {
    let Some(expected) = expected() else { return };
    for model in &expected.models {
        for case in &model.generations {
            for more in [&[][..], &["--no-kv-cache"]] {
                let new_ids = generate(&expected.dir(model), &case.ids, case.max_new_tokens, more);
                assert_eq!(new_ids, case.new_ids, "{} after {} ids {more:?}", model.name, case.ids.len());
            }
        }
    }
}

#[test]
fn generate_tells_the_known_story() {
    let Some((dir, ids)) = stories() else { return };
    for more in [&[][..], &["--no-kv-cache"]] {
        let new_ids = generate(&dir, &[1], STORY_TOKENS, more);
        assert_eq!(new_ids, ids[..STORY_TOKENS], "{more:?}");
    }
}
