//! Packed directories that others made: ModelOpt's names, and everything that can be wrong with a packed directory.

use std::borrow::Cow;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use temper::model::checkpoint::{Checkpoint, StoredDtype, TensorBytes, TensorSpec, write_safetensors};
use temper::numerics::{e2m1, e4m3};

use crate::packed::pack;
use crate::{refusal_of, stdout_of, text, tiny_model};

const Q: &str = "model.layers.0.self_attn.q_proj";

/// A stored tensor: name, dtype, shape, bytes.
type Stored = (String, StoredDtype, Vec<usize>, Vec<u8>);

/// A packed tiny model, and its tensors to be changed.
fn packed_model(format: &str) -> (tempfile::TempDir, Vec<Stored>) {
    let (model, out) = (tiny_model(), tempfile::tempdir().unwrap());
    pack(model.path(), &out.path().join("m"), format);
    let checkpoint = Checkpoint::open(&out.path().join("m").join("model.safetensors")).unwrap();
    let tensors = checkpoint.names().map(|name| {
        let tensor = checkpoint.tensor(name).unwrap();
        (name.to_string(), tensor.dtype, tensor.shape.to_vec(), tensor.data.to_vec())
    });
    let tensors = tensors.collect();
    (out, tensors)
}

fn write(dir: &Path, tensors: &[Stored]) {
    let file = dir.join("model.safetensors");
    let tensors: Vec<TensorBytes> = tensors
        .iter()
        .map(|(name, dtype, shape, data)| TensorBytes {
            spec: TensorSpec::new(name, *dtype, shape),
            data: Cow::Borrowed(data),
        })
        .collect();
    write_safetensors(&file, &tensors).unwrap();
}

fn edit_config(dir: &Path, edit: impl FnOnce(&mut Value)) {
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut config);
    fs::write(path, serde_json::to_vec(&config).unwrap()).unwrap();
}

/// Refused by `score`, and the same way by `quantize`, with a line that contains `expected`.
fn refused(dir: &Path, expected: &str) {
    for line in [
        refusal_of(&["score", text(dir), "--ids", "1,2"]),
        refusal_of(&["quantize", text(dir), text(&dir.with_extension("out")), "--format", "nvfp4"]),
    ] {
        assert!(line.contains(expected), "{line:?}, expected {expected:?}");
    }
}

#[test]
fn model_opts_names_give_the_same_weights() {
    let (out, mut tensors) = packed_model("nvfp4");
    let dir = out.path().join("m");
    let stored: std::collections::BTreeMap<_, _> = tensors.iter().map(|t| (t.0.clone(), t.3.clone())).collect();
    for (name, _, shape, data) in &mut tensors {
        if let Some(weight) = name.strip_suffix("_packed") {
            *name = weight.to_string();
        } else if let Some(weight) = name.strip_suffix("_global_scale") {
            let encode_scale = f32::from_le_bytes(data[..].try_into().unwrap());
            (*name, *shape, *data) = (format!("{weight}_scale_2"), vec![], (1.0 / encode_scale).to_le_bytes().to_vec());
        }
    }
    tensors.push((format!("{Q}.input_scale"), StoredDtype::F32, vec![], 0.01f32.to_le_bytes().to_vec()));
    tensors.push((format!("{Q}.k_scale"), StoredDtype::F32, vec![1], 1f32.to_le_bytes().to_vec()));
    write(&dir, &tensors);
    let in_config = json!({
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": false}}},
        "kv_cache_scheme": {"num_bits": 8, "type": "float"},
    });
    let beside = json!({"quantization": {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}});
    let score = |dir: &Path| stdout_of(&["--json", "score", text(dir), "--ids", "3,7,11"]);
    edit_config(&dir, |config| config["quantization_config"] = in_config);
    let first = score(&dir);
    edit_config(&dir, |config| config["quantization_config"] = Value::Null);
    fs::write(dir.join("hf_quant_config.json"), serde_json::to_vec(&beside).unwrap()).unwrap();
    assert_eq!(first, score(&dir));
    // value * (S * D), by hand.
    let name = format!("{Q}.weight");
    let loaded = Checkpoint::open(&dir).unwrap().parameter(&name).unwrap().view().to_f32().unwrap();
    let (codes, scales) = (&stored[&format!("{name}_packed")], &stored[&format!("{name}_scale")]);
    let encode_scale = f32::from_le_bytes(stored[&format!("{name}_global_scale")][..].try_into().unwrap());
    let decode_scale = 1.0 / encode_scale;
    for (i, &found) in loaded.iter().enumerate() {
        let code = codes[i / 2] >> (4 * (i % 2)) & 15;
        let expected = e2m1::decode(code) * (e4m3::decode(scales[i / 16]) * decode_scale);
        assert_eq!(found.to_bits(), expected.to_bits(), "{i}");
    }
}

#[test]
fn packed_tensors_that_are_incomplete_or_of_another_kind() {
    let (out, sound) = packed_model("nvfp4");
    let dir = out.path().join("m");
    let at = |name: &str| sound.iter().position(|t| t.0 == format!("{Q}.{name}")).unwrap();
    let broken = |change: &dyn Fn(&mut Vec<Stored>), expected: &str| {
        let mut tensors = sound.clone();
        change(&mut tensors);
        write(&dir, &tensors);
        refused(&dir, expected);
    };
    let (codes, scales, scale) = (at("weight_packed"), at("weight_scale"), at("weight_global_scale"));
    for part in ["weight_scale", "weight_global_scale"] {
        broken(&|t| drop(t.remove(at(part))), &format!("tensor {Q}.{part}: missing"));
    }
    broken(&|t| drop(t.remove(codes)), &format!("tensor {Q}.weight: missing"));
    broken(&|t| t[codes].2 = vec![32, 64], &format!("tensor {Q}.weight_scale: found [64, 4], expected [32, 8]"));
    broken(&|t| t[codes].2 = vec![2048], "tensor model.layers.0.self_attn.q_proj.weight_packed: found [2048]");
    broken(&|t| t[codes].2 = vec![512, 4], "found [512, 4], expected [N, K/2], K a multiple of 16");
    broken(&|t| t[codes].1 = StoredDtype::I8, "weight_packed: found dtype I8, expected U8");
    broken(&|t| t[scales].1 = StoredDtype::U8, "weight_scale: found dtype U8, expected F8_E4M3");
    broken(&|t| t[scales].2 = vec![4, 64], "weight_scale: found [4, 64], expected [64, 4]");
    broken(&|t| (t[scale].2, t[scale].3) = (vec![2], vec![0; 8]), "weight_global_scale: found [2], expected [1]");
    for value in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let expected = format!("weight_global_scale: found {value}, expected a positive finite number");
        broken(&|t| t[scale].3 = value.to_le_bytes().to_vec(), &expected);
    }
    let extra = |name: &str| (format!("{Q}.{name}"), StoredDtype::U8, vec![1], vec![0]);
    broken(&|t| t.push(extra("weight_zero_point")), &format!("tensor {Q}.weight_zero_point: unexpected"));
    let other_layer = |t: &mut Vec<Stored>| {
        let parts: Vec<Stored> = [codes, scales, scale].map(|i| sound[i].clone()).to_vec();
        t.extend(parts.into_iter().map(|part| (part.0.replace("layers.0", "layers.7"), part.1, part.2, part.3)));
    };
    broken(&other_layer, "tensor model.layers.7.self_attn.q_proj.weight: unexpected");
    // Half of the rows: sound in itself, not what config.json says.
    let halve = |t: &mut Vec<Stored>| {
        for i in [codes, scales] {
            let half = t[i].3.len() / 2;
            t[i].3.truncate(half);
            t[i].2[0] /= 2;
        }
    };
    broken(&halve, &format!("tensor {Q}.weight: found [32, 64], expected [64, 64]"));
    write(&dir, &sound);
    let file = dir.join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 100]).unwrap();
    refused(&dir, "model.safetensors: truncated: found");
}

#[test]
fn quantization_that_is_not_read_here() {
    let (out, _) = packed_model("mxfp4");
    let dir = out.path().join("m");
    let sound: Value = serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
    let broken = |change: &dyn Fn(&mut Value), expected: &str| {
        edit_config(&dir, |config| {
            *config = sound.clone();
            change(&mut config["quantization_config"]);
        });
        refused(&dir, &format!("config.json: quantization_config: {expected}"));
    };
    let weights = |q: &mut Value, key: &str, value: Value| q["config_groups"]["group_0"]["weights"][key] = value;
    for method in ["gptq", "awq", "fp8"] {
        let expected = format!("quant_method: found \"{method}\", expected \"compressed-tensors\" or \"modelopt\"");
        broken(&|q| *q = json!({"quant_method": method, "bits": 4}), &expected);
    }
    broken(&|q| *q = json!([]), "found a list, expected a JSON object");
    broken(&|q| *q = json!({}), "quant_method: missing");
    broken(
        &|q| q["format"] = json!("pack-quantized"),
        "format: found \"pack-quantized\", expected \"nvfp4-pack-quantized\" or",
    );
    broken(&|q| q["format"] = json!("nvfp4-pack-quantized"), "config_groups.group_0: format: found");
    broken(
        &|q| q["quantization_status"] = json!("frozen"),
        "quantization_status: found \"frozen\", expected \"compressed\"",
    );
    broken(&|q| q["transform_config"] = json!({"R1": {}}), "transform_config: found {\"R1\":{}}, expected none");
    broken(&|q| q["config_groups"] = json!({}), "config_groups: found none");
    broken(&|q| weights(q, "num_bits", json!(8)), "config_groups.group_0.weights: num_bits: found 8, expected 4");
    broken(
        &|q| weights(q, "type", json!("int")),
        "config_groups.group_0.weights: type: found \"int\", expected \"float\"",
    );
    broken(
        &|q| weights(q, "group_size", json!(16)),
        "config_groups.group_0.weights: group_size: found 16, expected 32",
    );
    broken(
        &|q| weights(q, "symmetric", json!(false)),
        "config_groups.group_0.weights: symmetric: found false, expected true",
    );
    broken(&|q| q["config_groups"]["group_0"]["weights"] = Value::Null, "config_groups.group_0.weights: missing");
    let model_opt = |algo: &str| json!({"quant_method": "modelopt", "quant_algo": algo});
    broken(&|q| *q = model_opt("FP8"), "quant_algo: found \"FP8\", expected \"NVFP4\"");
    // Unpacked weights under a configuration that says they are packed, and packed ones under none.
    let found_none = |q: &mut Value| *q = model_opt("NVFP4");
    edit_config(&dir, |config| found_none(&mut config["quantization_config"]));
    refused(&dir, "found no weight of dtype U8, config.json says the weights are packed (modelopt nvfp4)");
    edit_config(&dir, |config| config["quantization_config"] = Value::Null);
    refused(&dir, "tensor model.layers.0.mlp.down_proj.weight: missing");
}

#[test]
fn a_packed_model_is_not_quantized_again() {
    let (out, _) = packed_model("nvfp4");
    refused_by_quantize(
        &out.path().join("m"),
        "found packed weights (compressed-tensors nvfp4), expected weights that",
    );
}

fn refused_by_quantize(dir: &Path, expected: &str) {
    for more in [&[][..], &["--pack"]] {
        let output = dir.with_extension("out");
        let line = refusal_of(&[&["quantize", text(dir), text(&output), "--format", "nvfp4"], more].concat());
        assert!(line.contains(expected), "{line}");
        assert!(!output.exists());
    }
}
