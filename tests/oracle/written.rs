//! Directories that temper writes load in transformers, which computes the same log-probs from them.

use std::path::PathBuf;
use std::process::Command;

use temper::model::checkpoint::{Checkpoint, TensorSink, TensorSpec, write_model_dir, write_weights};
use temper::model::config::Qwen2Config;

use crate::commands::{comma_separated, score};
use crate::expected::{LOGPROB_TOLERANCE, assert_logprobs, expected, python, scratch};

/// Loads every directory in transformers (each tensor present, none too many, the declared dtype) and scores ids.
fn transformers_logprobs(directories: &[(PathBuf, &[u32])]) -> Vec<Vec<f64>> {
    let args: Vec<String> =
        directories.iter().flat_map(|(dir, ids)| [dir.to_str().unwrap().to_string(), comma_separated(ids)]).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let output = python("check_loads.py", &args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let results: Vec<Loaded> = serde_json::from_slice(&output.stdout).unwrap();
    results.into_iter().map(|r| r.logprobs).collect()
}

#[derive(serde::Deserialize)]
struct Loaded {
    logprobs: Vec<f64>,
}

/// Read and written back, in one file and in shards: transformers computes the very same numbers.
#[test]
fn a_written_directory_loads_in_transformers() {
    let Some(expected) = expected() else { return };
    let mut written = Vec::new();
    for (model, max_shard_bytes) in expected.models.iter().zip([u64::MAX, 30_000, u64::MAX, 30_000]) {
        let source = expected.dir(model);
        let dir = scratch(&format!("oracle_written_{}", model.name));
        let checkpoint = Checkpoint::open(&source).unwrap();
        let config = Qwen2Config::from_dir(&source).unwrap();
        let views: Vec<_> = checkpoint.names().map(|n| (n, checkpoint.tensor(n).unwrap())).collect();
        let specs: Vec<_> = views.iter().map(|(n, v)| TensorSpec::new(*n, v.dtype, v.shape)).collect();
        let fill = |i: usize, sink: &mut TensorSink| sink.write(views[i].1.data);
        write_model_dir(&dir, &config, Some(&source), &specs, fill).unwrap();
        if max_shard_bytes != u64::MAX {
            std::fs::remove_file(dir.join("model.safetensors")).unwrap();
            write_weights(&dir, &specs, max_shard_bytes, fill).unwrap();
            assert!(dir.join("model.safetensors.index.json").exists());
        }
        written.push((dir, &model.scores[1].ids[..]));
    }
    for (model, got) in expected.models.iter().zip(transformers_logprobs(&written)) {
        assert_eq!(got, model.scores[1].logprobs, "{}", model.name);
    }
}

/// The quantized directory is a model like any other: transformers and temper agree on it.
#[test]
fn a_quantized_directory_loads_in_transformers() {
    let Some(expected) = expected() else { return };
    let mut written = Vec::new();
    for (model, format) in expected.models.iter().zip(["mxfp4", "nvfp4", "mxfp4:even", "nvfp4"]) {
        let dir = scratch(&format!("oracle_quantized_{}", model.name));
        std::fs::remove_dir(&dir).unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_temper"))
            .args(["quantize", expected.dir(model).to_str().unwrap(), dir.to_str().unwrap()])
            .args(["--format", format, "--device", "cpu", "--json", "--quiet"])
            .output()
            .unwrap();
        assert!(output.status.success(), "quantize: {}", String::from_utf8_lossy(&output.stderr));
        written.push((dir, &model.scores[2].ids[..]));
    }
    let in_transformers = transformers_logprobs(&written);
    for ((model, (dir, ids)), want) in expected.models.iter().zip(&written).zip(in_transformers) {
        assert_logprobs(&score(dir, ids), &want, LOGPROB_TOLERANCE, &model.name);
        let unquantized = &model.scores[2].logprobs;
        let moved = want.iter().zip(unquantized).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(moved > 0.01, "{}: quantization changed nothing", model.name);
    }
}
