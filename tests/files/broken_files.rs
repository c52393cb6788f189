//! Models that are broken in every way we could think of: exit code 2, one line, nothing written.

use std::fs;
use std::path::Path;

use temper::model::checkpoint::Checkpoint;
use temper::model::checkpoint::quantize::Quantizer;

use crate::{listing, refusal_of, text, tiny_model, values};

/// Refused by the binary with a line that contains `expected`; OUT's directory stays empty.
fn refused(input: &Path, expected: &str) {
    let out = tempfile::tempdir().unwrap();
    let output = out.path().join("out.safetensors");
    let line = refusal_of(&["quantize", text(input), text(&output), "--format", "nvfp4"]);
    assert!(line.contains(expected), "{line:?}, expected {expected:?}");
    assert!(listing(out.path()).is_empty(), "{line}");
}

fn file_with(header: &str, data_bytes: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    bytes.resize(bytes.len() + data_bytes, 0);
    bytes
}

#[test]
fn safetensors_that_lie() {
    let one = r#"{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}"#;
    let tensor = |name: &str, start: usize, end: usize| {
        format!(r#""{name}":{{"dtype":"F32","shape":[2,2],"data_offsets":[{start},{end}]}}"#)
    };
    let two = |a, b| format!("{{{a},{b}}}");
    let overlap = two(tensor("a", 0, 16), tensor("b", 8, 24));
    let gap = two(tensor("a", 0, 16), tensor("b", 20, 36));
    let huge = r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4611686018427387904],"data_offsets":[0,16]}}"#;
    let mut long_header = file_with(one, 16);
    long_header[..8].copy_from_slice(&1_000_000u64.to_le_bytes());
    let mut endless_header = file_with(one, 16);
    endless_header[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut short_header = file_with(one, 16);
    short_header[..8].copy_from_slice(&20u64.to_le_bytes());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("in.safetensors");
    for (bytes, expected) in [
        (vec![], "found 0 bytes, expected a safetensors file (at least 8)"),
        (vec![1, 2, 3], "found 3 bytes, expected a safetensors file (at least 8)"),
        (file_with(one, 15), "truncated: found 15 bytes of data, expected 16"),
        (file_with(one, 0), "truncated: found 0 bytes of data, expected 16"),
        (file_with(one, 17), "trailing bytes: found 17 bytes of data, expected 16"),
        (long_header, "found a header length of 1000000 bytes with 73 left"),
        (endless_header, "found a header length of 18446744073709551615 bytes"),
        (short_header, "not a safetensors file: invalid JSON in header"),
        (file_with("{", 16), "not a safetensors file: invalid JSON in header"),
        (file_with("[]", 0), "not a safetensors file: invalid JSON in header"),
        (file_with("{\"a\":{\"dtype\":\"F33\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4), "not a safetensors file"),
        (file_with("{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}", 4), "not a safetensors file"),
        (file_with(&one.replace("[2,2]", "[2,3]"), 16), "data_offsets do not match its shape and dtype"),
        (file_with(&overlap, 24), "tensor b: found data_offsets that overlap or leave a gap"),
        (file_with(&gap, 36), "tensor b: found data_offsets that overlap or leave a gap"),
        (file_with(huge, 16), "not a safetensors file: overflow"),
        (
            file_with(&one.replace("F32", "F64").replace("[2,2]", "[2,1]"), 16),
            "tensor a: found dtype F64, expected F32, BF16 or F16",
        ),
        (b"PK\x03\x04 a pickle, in truth".to_vec(), "found a header length of"),
    ] {
        fs::write(&path, &bytes).unwrap();
        let line = quantizer_error(&path);
        assert!(line.contains(expected), "{line:?}, expected {expected:?}");
    }
    fs::write(&path, file_with(one, 15)).unwrap();
    refused(&path, "truncated: found 15 bytes of data, expected 16");
}

/// What the command would report, without starting it.
fn quantizer_error(path: &Path) -> String {
    let format = "nvfp4".parse().unwrap();
    let error = match Checkpoint::open(path) {
        Ok(checkpoint) => Quantizer::new(&checkpoint, format, &[]).err().unwrap(),
        Err(error) => error,
    };
    assert_eq!(error.exit_code(), 2, "{error}");
    let line = error.to_string();
    assert!(!line.contains('\n'), "{line}");
    line
}

#[test]
fn a_safetensors_cut_or_changed_anywhere_never_panics() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("in.safetensors");
    let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}"#;
    let sound = file_with(header, 16);
    for length in 0..sound.len() {
        fs::write(&path, &sound[..length]).unwrap();
        let error = Checkpoint::open(&path).err().unwrap();
        assert_eq!(error.exit_code(), 2, "{length}: {error}");
        assert!(!error.to_string().contains('\n'), "{length}: {error}");
    }
    for at in 0..8 + header.len() {
        for value in [0, b'"', b'9', b'{', 0xFF] {
            let mut bytes = sound.clone();
            bytes[at] = value;
            fs::write(&path, &bytes).unwrap();
            if let Err(error) = Checkpoint::open(&path) {
                assert_eq!(error.exit_code(), 2, "{at}: {error}");
                assert!(!error.to_string().contains('\n'), "{at}: {error}");
            }
        }
    }
}

/// Changes one thing in a sound model directory.
fn broken_model(change: impl FnOnce(&Path), expected: &str) {
    let model = tiny_model();
    change(model.path());
    refused(model.path(), expected);
}

fn edit_config(dir: &Path, from: &str, to: &str) {
    let path = dir.join("config.json");
    let config = fs::read_to_string(&path).unwrap();
    assert!(config.contains(from), "{config}");
    fs::write(path, config.replace(from, to)).unwrap();
}

#[test]
fn model_directories_that_are_incomplete() {
    broken_model(|dir| fs::remove_file(dir.join("config.json")).unwrap(), "config.json: no such file or directory");
    broken_model(|dir| fs::write(dir.join("config.json"), "{\"a\": ").unwrap(), "config.json: not valid JSON");
    broken_model(
        |dir| fs::write(dir.join("config.json"), "[]").unwrap(),
        "config.json: found a list, expected a JSON object",
    );
    broken_model(
        |dir| fs::write(dir.join("generation_config.json"), "{").unwrap(),
        "generation_config.json: not valid JSON",
    );
    broken_model(
        |dir| fs::remove_file(dir.join("model.safetensors")).unwrap(),
        "found no weights, expected model.safetensors",
    );
    broken_model(
        |dir| edit_config(dir, "Qwen2ForCausalLM", "LlamaForCausalLM"),
        "config.json: architectures: found [\"LlamaForCausalLM\"]",
    );
    broken_model(
        |dir| edit_config(dir, "\"intermediate_size\": 128", "\"intermediate_size\": 96"),
        "tensor model.layers.0.mlp.down_proj.weight: found [64, 128], expected [64, 96]",
    );
    broken_model(
        |dir| edit_config(dir, "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3"),
        "tensor model.layers.2.input_layernorm.weight: missing",
    );
    broken_model(
        |dir| edit_config(dir, "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1"),
        "tensor model.layers.1.input_layernorm.weight: unexpected",
    );
    broken_model(
        |dir| {
            let path = dir.join("model.safetensors");
            let bytes = fs::read(&path).unwrap();
            fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
        },
        "model.safetensors: truncated: found",
    );
}

/// A sound sharded model to be broken.
fn sharded(change: impl FnOnce(&Path), expected: &str) {
    use temper::model::checkpoint::{StoredDtype, TensorSpec, write_weights};
    broken_model(
        |dir| {
            let config = temper::model::config::Qwen2Config::from_dir(dir).unwrap();
            fs::remove_file(dir.join("model.safetensors")).unwrap();
            let specs: Vec<TensorSpec> = config
                .parameter_shapes()
                .iter()
                .map(|(name, shape)| TensorSpec::new(name, StoredDtype::F32, shape))
                .collect();
            write_weights(dir, &specs, 150_000, |index, sink| {
                let count = specs[index].shape.iter().product();
                let bytes: Vec<u8> = values(index, count).iter().flat_map(|v| v.to_le_bytes()).collect();
                sink.write(&bytes)
            })
            .unwrap();
            change(dir);
        },
        expected,
    );
}

#[test]
fn shards_that_disagree_with_their_index() {
    const INDEX: &str = "model.safetensors.index.json";
    let second = |dir: &Path| {
        let name = listing(dir).into_iter().find(|n| n.starts_with("model-00002")).unwrap();
        dir.join(name)
    };
    let edit_index = |dir: &Path, from: &str, to: &str| {
        let index = fs::read_to_string(dir.join(INDEX)).unwrap();
        assert!(index.contains(from), "{index}");
        fs::write(dir.join(INDEX), index.replacen(from, to, 1)).unwrap();
    };
    sharded(
        |dir| fs::remove_file(second(dir)).unwrap(),
        "no such file, expected a shard that model.safetensors.index.json names",
    );
    sharded(|dir| fs::write(dir.join(INDEX), "{}").unwrap(), "index.json: weight_map: missing");
    sharded(|dir| fs::write(dir.join(INDEX), "{\"weight_map\": {}}").unwrap(), "weight_map: found no tensors");
    sharded(|dir| fs::write(dir.join(INDEX), "not json").unwrap(), "index.json: not valid JSON");
    sharded(|dir| edit_index(dir, "model-00002", "../model-00002"), "expected a file name in this directory");
    sharded(
        |dir| edit_index(dir, "model-00002", "model-00001"),
        "missing, model.safetensors.index.json says it is in this shard",
    );
    sharded(
        |dir| edit_index(dir, "model.norm.weight", "model.morn.weight"),
        "tensor model.morn.weight: missing, model.safetensors.index.json says it is in this shard",
    );
    sharded(
        |dir| {
            let first = listing(dir).into_iter().find(|n| n.starts_with("model-00001")).unwrap();
            fs::copy(dir.join(first), second(dir)).unwrap();
        },
        "found twice, first in",
    );
}

#[test]
fn places_that_cannot_be_written_to() {
    let model = tiny_model();
    let before = listing(model.path());
    let out = tempfile::tempdir().unwrap();
    let run = |input: &Path, output: &Path, format: &str| {
        refusal_of(&["quantize", text(input), text(output), "--format", format])
    };
    let occupied = out.path().join("occupied");
    fs::create_dir(&occupied).unwrap();
    fs::write(occupied.join("mine"), "mine").unwrap();
    assert!(run(model.path(), &occupied, "mxfp4").contains("already exists, expected a new or empty directory"));
    assert_eq!(listing(&occupied), ["mine"]);
    assert!(run(model.path(), &model.path().join("q"), "mxfp4").contains("expected OUT outside IN"));
    assert!(run(model.path(), model.path(), "mxfp4").contains("expected OUT outside IN"));
    assert!(run(model.path(), &out.path().join("no").join("such"), "mxfp4").contains("no such file or directory"));
    let weights = model.path().join("model.safetensors");
    assert!(run(&weights, &weights, "mxfp4").contains("already exists"));
    assert!(run(&weights, &occupied, "mxfp4").contains("already exists, expected the name of a new .safetensors file"));
    assert!(run(model.path(), &out.path().join("q"), "mxfp5").contains("mxfp5"));
    assert!(run(model.path(), &out.path().join("q"), "mxfp8:2d").contains("mxfp8 has no option `2d`"));
    assert!(
        run(Path::new("no/such/model"), &out.path().join("q"), "mxfp4")
            .contains("no/such/model: no such file or directory")
    );
    assert_eq!(listing(out.path()), ["occupied"]);
    assert_eq!(listing(model.path()), before);
}
