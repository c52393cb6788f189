//! `temper validate` on references that temper packed, whole and damaged; the library's own are in tests/oracle.

use std::borrow::Cow;
use std::path::Path;

use serde_json::Value;
use temper::model::checkpoint::validate::rules::Rule;
use temper::model::checkpoint::{Checkpoint, StoredDtype, TensorBytes, TensorSpec, write_safetensors};
use temper::numerics::packed::PackedKind;

use crate::packed::pack;
use crate::{golden, refusal_of, shared, stdout_of, temper, text, tiny_model};

/// The report of a comparison, and the exit code.
fn validate(model: &Path, reference: &Path) -> (Value, i32) {
    let output = temper(&["--json", "validate", text(model), text(reference)]);
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| {
        panic!("{e}: {}", String::from_utf8_lossy(&output.stderr));
    });
    (report, output.status.code().unwrap())
}

/// A tiny model whose blocks have amaxes of every mantissa, so that no two rules agree on all of them.
fn varied_model() -> tempfile::TempDir {
    let model = tiny_model();
    let file = model.path().join("model.safetensors");
    let checkpoint = Checkpoint::open(&file).unwrap();
    let tensors: Vec<TensorBytes> = checkpoint
        .names()
        .map(|name| {
            let tensor = checkpoint.tensor(name).unwrap();
            let scaled = tensor.to_f32().unwrap().into_iter().enumerate().map(|(i, v)| v * (1 + i / 32 % 23) as f32);
            let data = scaled.flat_map(|v| v.to_le_bytes()).collect();
            TensorBytes { spec: TensorSpec::new(name, tensor.dtype, tensor.shape), data: Cow::Owned(data) }
        })
        .collect();
    write_safetensors(&file, &tensors).unwrap();
    model
}

/// A model and, in a directory beside it, the same packed.
fn packed(format: &str) -> (tempfile::TempDir, tempfile::TempDir) {
    let (model, out) = (varied_model(), tempfile::tempdir().unwrap());
    pack(model.path(), &out.path().join("m"), format);
    (model, out)
}

/// Changes a byte of a stored tensor in its file.
fn damage(dir: &Path, tensor: &str, at: usize, change: impl Fn(u8) -> u8) {
    let file = dir.join("model.safetensors");
    let checkpoint = Checkpoint::open(&file).unwrap();
    let data = checkpoint.tensor(tensor).unwrap().data;
    let mut bytes = std::fs::read(&file).unwrap();
    // The first place with these bytes: unique among weights.
    let start = bytes.windows(data.len()).position(|window| window == data).unwrap();
    bytes[start + at] = change(bytes[start + at]);
    std::fs::write(&file, bytes).unwrap();
}

#[test]
fn each_rule_finds_what_it_made() {
    for (format, rule) in [("nvfp4", "te"), ("mxfp4", "floor"), ("mxfp4:even", "even"), ("mxfp4:rceil", "rceil")] {
        let (model, out) = packed(format);
        let (report, code) = validate(model.path(), &out.path().join("m"));
        assert_eq!((code, &report["best_rule"], &report["reproduced"]), (0, &rule.into(), &true.into()), "{format}");
        assert_eq!(report["tensors"].as_array().unwrap().len(), 14);
        let summary = &report["rules"][0];
        assert_eq!((&summary["tensors_reproduced"], &summary["codes_differing_ratio"]), (&14.into(), &0.0.into()));
        for tensor in report["tensors"].as_array().unwrap() {
            let best = tensor["rules"].as_array().unwrap().iter().find(|r| r["rule"] == tensor["best_rule"]).unwrap();
            assert_eq!(best["sqnr_db"], tensor["reference_sqnr_db"], "{format}");
        }
    }
}

#[test]
fn one_changed_code_scale_or_tensor_scale_is_seen() {
    const O: &str = "model.layers.1.self_attn.o_proj.weight";
    for (part, at, change, key) in
        [("packed", 17, (|b| b ^ 0x30) as fn(u8) -> u8, "codes_differing"), ("scale", 5, |b| b ^ 1, "scales_differing")]
    {
        let (model, out) = packed("nvfp4");
        let reference = out.path().join("m");
        damage(&reference, &format!("{O}_{part}"), at, change);
        let output = temper(&["--json", "validate", text(model.path()), text(&reference)]);
        assert_eq!(output.status.code(), Some(1));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(
            stderr.starts_with("error: validate: no rule reproduces all 14 tensors; nearest: te (13 tensors;"),
            "{stderr}"
        );
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let tensor = report["tensors"].as_array().unwrap().iter().find(|t| t["name"] == O).unwrap();
        let te = tensor["rules"].as_array().unwrap().iter().find(|r| r["rule"] == "te").unwrap();
        assert_eq!(te[key], 1, "{te}");
        assert_ne!(te["sqnr_db"], tensor["reference_sqnr_db"]);
    }
    let (model, out) = packed("nvfp4");
    let reference = out.path().join("m");
    damage(&reference, &format!("{O}_global_scale"), 0, |b| b ^ 1);
    let (report, code) = validate(model.path(), &reference);
    let tensor = report["tensors"].as_array().unwrap().iter().find(|t| t["name"] == O).unwrap();
    assert_eq!((code, &tensor["rules"][0]["tensor_scale"]), (1, &"differs".into()));
}

/// Siblings packed one by one have tensor scales of their own, which vLLM would have to reconcile.
#[test]
fn a_tensor_scale_that_siblings_do_not_share_is_said() {
    let (model, out) = packed("nvfp4");
    let names = ["q", "k", "v"].map(|p| format!("model.layers.0.self_attn.{p}_proj.weight"));
    let reference = out.path().join("m");
    let whole = Checkpoint::open(model.path()).unwrap();
    let mut tensors = Vec::new();
    for (i, name) in names.iter().enumerate() {
        let (input, output) =
            (out.path().join(format!("{i}.safetensors")), out.path().join(format!("{i}p.safetensors")));
        let x = whole.tensor(name).unwrap();
        let spec = TensorSpec::new(name, x.dtype, x.shape);
        write_safetensors(&input, &[TensorBytes { spec, data: Cow::Borrowed(x.data) }]).unwrap();
        pack(&input, &output, "nvfp4");
        let made = Checkpoint::open(&output).unwrap();
        for part in made.names() {
            let t = made.tensor(part).unwrap();
            let data = Cow::Owned(t.data.to_vec());
            tensors.push(TensorBytes { spec: TensorSpec::new(part, t.dtype, t.shape), data });
        }
    }
    write_safetensors(&reference.join("model.safetensors"), &tensors).unwrap();
    let (report, code) = validate(model.path(), &reference);
    assert_eq!((code, &report["best_rule"]), (0, &"te".into()));
    let scales: Vec<&Value> =
        report["tensors"].as_array().unwrap().iter().map(|t| &t["rules"][0]["tensor_scale"]).collect();
    assert!(scales.iter().any(|s| *s == "equal_unshared") && scales.iter().any(|s| *s == "equal"), "{scales:?}");
    assert_eq!(report["unpacked"].as_array().unwrap().len(), 11);
}

#[test]
fn weights_that_are_not_packed_are_no_agreement() {
    let (model, copy) = (tiny_model(), tiny_model());
    let (report, code) = validate(model.path(), copy.path());
    assert_eq!((code, &report["reference"], &report["reproduced"]), (1, &"unmodified".into(), &false.into()));
    let output = temper(&["validate", text(model.path()), text(copy.path())]);
    assert_eq!(output.stdout, b"weights unmodified: this checkpoint quantizes lazily\n");
    let out = tempfile::tempdir().unwrap();
    let faked = out.path().join("q");
    stdout_of(&["quantize", text(model.path()), text(&faked), "--format", "nvfp4"]);
    let line = refusal_of(&["validate", text(model.path()), text(&faked)]);
    assert!(
        line.contains("found values that are not packed and differ from MODEL's, expected packed weights"),
        "{line}"
    );
}

#[test]
fn what_cannot_be_compared_is_one_line() {
    let (model, out) = packed("nvfp4");
    let reference = out.path().join("m");
    let line = refusal_of(&["validate", text(&reference), text(&reference)]);
    assert!(
        line.contains("found packed weights (compressed-tensors nvfp4), expected the weights that REFERENCE"),
        "{line}"
    );
    let line = refusal_of(&["validate", text(model.path()), "no/such/reference/here"]);
    assert!(line.contains("no such"), "{line}");
    assert!(refusal_of(&["validate", text(model.path())]).contains("REFERENCE"));
    let line = refusal_of(&["validate", text(model.path()), text(&reference.join("model.safetensors"))]);
    assert!(line.contains("found a file, expected a directory"), "{line}");
}

#[test]
fn the_originals_table_names_winners() {
    let model = tiny_model();
    let json: Value =
        serde_json::from_str(&stdout_of(&["--json", "validate", text(model.path()), "--original"])).unwrap();
    let metrics = json["original"]["metrics"].as_array().unwrap();
    let names: Vec<&str> = metrics.iter().map(|m| m["metric"].as_str().unwrap()).collect();
    assert_eq!(names, ["sqnr_db", "mse", "rmse", "relative_error", "cosine", "max_abs_error", "deadzone_ratio"]);
    for metric in metrics {
        assert_eq!((metric["linears"].as_u64(), metric["means"].as_array().unwrap().len()), (Some(14), 3));
        let wins: u64 = metric["wins"].as_array().unwrap().iter().map(|w| w.as_u64().unwrap()).sum();
        assert!(wins <= 14, "{metric}");
    }
    let means: Vec<f64> = metrics[0]["means"].as_array().unwrap().iter().map(|m| m.as_f64().unwrap()).collect();
    // Each as `quantize` finds it.
    let out = tempfile::tempdir().unwrap();
    for (i, format) in ["nvfp4", "mxfp4", "nvfp4_single_level"].into_iter().enumerate() {
        let output = out.path().join(format);
        let report = stdout_of(&["--json", "quantize", text(model.path()), text(&output), "--format", format]);
        let report: Value = serde_json::from_str(&report).unwrap();
        assert_eq!(report["mean"]["sqnr_db"].as_f64().unwrap(), means[i], "{format}");
    }
    let table = stdout_of(&["validate", text(model.path()), "--original"]);
    assert!(table.contains("deadzone_ratio") && table.contains("of 14"), "{table}");
}

#[test]
fn the_rules_of_a_dtype_include_its_own() {
    let names = |dtype| Rule::of(PackedKind::Nvfp4, dtype).iter().map(|rule| rule.name()).collect::<Vec<_>>();
    assert_eq!(names(StoredDtype::F32), ["te", "compressed_tensors", "modelopt"]);
    assert_eq!(names(StoredDtype::BF16), ["te", "compressed_tensors", "compressed_tensors_bf16", "modelopt"]);
}

/// Codes, scales and values of nvidia-modelopt itself, with zero blocks, an outlier and blocks that it lifts to 2^-9.
#[test]
fn model_opts_rule_is_its_library() {
    use temper::numerics::model_opt;
    use temper::numerics::packed::{StoredScale, dequantize, pack_codes};
    let golden: Value = serde_json::from_slice(&std::fs::read(golden("modelopt_nvfp4.json")).unwrap()).unwrap();
    let bits = |key: &str| -> Vec<u32> { serde_json::from_value(golden[key].clone()).unwrap() };
    let bytes = |key: &str| -> Vec<u8> { serde_json::from_value(golden[key].clone()).unwrap() };
    let x: Vec<f32> = bits("x").into_iter().map(f32::from_bits).collect();
    let amax = x.iter().fold(0.0, |a: f32, v| a.max(v.abs()));
    let decode_scale = model_opt::tensor_decode_scale(amax);
    assert_eq!(u64::from(decode_scale.to_bits()), golden["weight_scale_2"].as_u64().unwrap());
    let (codes, scales) = model_opt::quantize(&x, decode_scale);
    assert_eq!(scales, bytes("weight_scale"));
    assert_eq!(pack_codes(&codes), bytes("weight"));
    let mut values = vec![0.0; x.len()];
    dequantize(&pack_codes(&codes), &scales, StoredScale::TimesDecode(decode_scale), 16, &mut values);
    // The library has one zero.
    let expected: Vec<f32> = bits("dequantized").into_iter().map(f32::from_bits).collect();
    assert_eq!(values, expected);
}

/// The shared vectors of compressed-tensors, fed the tensor in its own dtype: G, scale bytes and packed codes.
#[test]
fn compressed_tensors_rule_is_its_library() {
    use temper::numerics::compressed_tensors::{ScaleDtype, quantize, tensor_encode_scale};
    use temper::numerics::packed::pack_codes;
    let Some(vectors) = shared("vectors") else { return };
    for case in ["gauss_s0", "student3", "zeros"] {
        for (name, dtype) in [("f32", ScaleDtype::F32), ("bf16", ScaleDtype::Bf16)] {
            let reference = Checkpoint::open(&vectors.join(format!("{case}.{name}.safetensors"))).unwrap();
            let x = reference.tensor_f32("x").unwrap();
            let encode_scale = tensor_encode_scale(x.iter().fold(0.0, |a: f32, v| a.max(v.abs())), dtype);
            let (codes, scales) = quantize(&x, encode_scale, dtype);
            assert_eq!(reference.tensor_f32("ct.nvfp4.g").unwrap(), [encode_scale], "{case}.{name}");
            assert_eq!(reference.tensor("ct.nvfp4.scales").unwrap().data, scales, "{case}.{name}");
            assert_eq!(reference.tensor("ct.nvfp4.codes").unwrap().data, pack_codes(&codes), "{case}.{name}");
        }
    }
}
