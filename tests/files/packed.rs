//! `temper quantize --pack` through the binary and the library: codes, scales and G in the file, the values that come
//! back, and that nothing is left behind by what fails.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};
use temper::model::checkpoint::quantize::pack::Packer;
use temper::model::checkpoint::quantize::{DEFAULT_EXCLUDED, Quantizer, TensorSource};
use temper::model::checkpoint::{Checkpoint, StoredDtype, TensorBytes, TensorSpec, write_safetensors, write_weights};
use temper::model::config::Qwen2Config;
use temper::numerics::block_format::{Quantized, TensorScale, fake_quant_scaled, finite_amax};
use temper::numerics::format::Format;
use temper::numerics::packed::pack_codes;

use crate::{listing, refusal_of, stdout_of, text, tiny_model, values};

pub const FUSED: [&[&str]; 4] = [
    &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    &["self_attn.o_proj"],
    &["mlp.gate_proj", "mlp.up_proj"],
    &["mlp.down_proj"],
];

pub fn pack(input: &Path, output: &Path, format: &str) -> Value {
    let json = stdout_of(&["--json", "quantize", text(input), text(output), "--format", format, "--pack"]);
    serde_json::from_str(&json).unwrap()
}

/// Our definition of every projection of `layer`, siblings under one amax.
fn expected(model: &Checkpoint, layer: usize, format: Format) -> Vec<(String, Quantized)> {
    let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
    let mut all = Vec::new();
    for group in FUSED {
        let read = |part: &str| (model.tensor_f32(&name(part)).unwrap(), model.tensor(&name(part)).unwrap().shape[1]);
        let amax = group.iter().map(|part| finite_amax(&read(part).0, read(part).1, format)).fold(0.0, f32::max);
        for part in group {
            let (x, cols) = read(part);
            all.push((name(part), fake_quant_scaled(&x, x.len() / cols, cols, format, TensorScale::Amax(amax))));
        }
    }
    all
}

#[test]
fn the_file_holds_the_definitions_codes_and_scales() {
    let model = tiny_model();
    let before = Checkpoint::open(model.path()).unwrap();
    let out = tempfile::tempdir().unwrap();
    for format in ["nvfp4", "nvfp4:4over6", "nvfp4:2d", "mxfp4", "mxfp4:even", "mxfp4:rceil", "mxfp4:half_away,2d"] {
        let output = out.path().join(format.replace([':', ','], "_"));
        let report = pack(model.path(), &output, format);
        let format: Format = format.parse().unwrap();
        let after = Checkpoint::open(&output).unwrap();
        let nvfp4 = format.block_size(64) == 16;
        for (name, quantized) in expected(&before, 1, format) {
            let codes = after.tensor(&format!("{name}_packed")).unwrap();
            assert_eq!(
                (codes.dtype, codes.data),
                (StoredDtype::U8, &pack_codes(&quantized.codes)[..]),
                "{format} {name}"
            );
            let scales = after.tensor(&format!("{name}_scale")).unwrap();
            let dtype = if nvfp4 { StoredDtype::F8_E4M3 } else { StoredDtype::U8 };
            assert_eq!((scales.dtype, scales.data), (dtype, &quantized.block_scales[..]), "{format} {name}");
            assert_eq!(after.contains(&format!("{name}_global_scale")), nvfp4);
            if nvfp4 {
                let stored = after.tensor_f32(&format!("{name}_global_scale")).unwrap();
                assert_eq!(stored, [quantized.tensor_encode_scale], "{format} {name}");
            }
            // S / G here, S * (1 / G) there: the last place in nvfp4, nothing in mxfp4.
            let loaded = after.parameter(&name).unwrap().view().to_f32().unwrap();
            let limit = if nvfp4 { 2.4e-7 } else { 0.0 };
            for (a, b) in loaded.iter().zip(&quantized.dequantized) {
                assert!((a - b).abs() <= limit * b.abs(), "{format} {name}: {a} {b}");
            }
        }
        after.check(&Qwen2Config::from_dir(&output).unwrap()).unwrap();
        assert_eq!((report["tensors"].as_array().unwrap().len(), &report["packed"]), (14, &json!(true)));
        for name in before.names().filter(|name| !name.ends_with("proj.weight")) {
            assert_eq!(before.tensor(name).unwrap().data, after.tensor(name).unwrap().data, "{name}");
        }
    }
}

#[test]
fn the_metrics_are_those_of_the_unpacked_values() {
    let model = tiny_model();
    let out = tempfile::tempdir().unwrap();
    let (plain, packed) = (out.path().join("plain"), out.path().join("packed"));
    let packed = pack(model.path(), &packed, "nvfp4:sr");
    let plain = ["--json", "quantize", text(model.path()), text(&plain), "--format", "nvfp4:sr"];
    let plain: Value = serde_json::from_str(&stdout_of(&plain)).unwrap();
    for metric in ["sqnr_db", "mse", "relative_error", "cosine", "deadzone_ratio", "saturation_ratio"] {
        let of = |report: &Value| report["mean"][metric].as_f64().unwrap();
        assert!((of(&packed) - of(&plain)).abs() <= 1e-6 * of(&plain).abs(), "{metric}");
    }
}

#[test]
fn config_json_keeps_its_keys_and_says_how_the_weights_are_packed() {
    let model = tiny_model();
    std::fs::write(model.path().join("LICENSE"), "terms").unwrap();
    let out = tempfile::tempdir().unwrap();
    let output = out.path().join("packed");
    pack(model.path(), &output, "mxfp4:even");
    assert_eq!(listing(&output), listing(model.path()));
    let read = |dir: &Path| -> BTreeMap<String, Value> {
        serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap()
    };
    let (before, mut after) = (read(model.path()), read(&output));
    let quantization = after.remove("quantization_config").unwrap();
    assert_eq!(before, after);
    assert_eq!(quantization["format"], "mxfp4-pack-quantized");
    assert_eq!(
        (&quantization["quant_method"], &quantization["ignore"]),
        (&json!("compressed-tensors"), &json!(["lm_head"]))
    );
    let weights = &quantization["config_groups"]["group_0"]["weights"];
    assert_eq!((&weights["group_size"], &weights["strategy"]), (&json!(32), &json!("group")));
    assert_eq!(weights["scale_dtype"], "torch.uint8");
}

#[test]
fn a_packed_model_scores_as_its_fake_quantized_one() {
    let model = tiny_model();
    let out = tempfile::tempdir().unwrap();
    let (packed, plain) = (out.path().join("packed"), out.path().join("plain"));
    pack(model.path(), &packed, "mxfp4");
    stdout_of(&["quantize", text(model.path()), text(&plain), "--format", "mxfp4"]);
    let score = |dir: &Path| stdout_of(&["--json", "score", text(dir), "--ids", "3,7,11,5"]);
    assert_eq!(score(&packed), score(&plain));
    let generate =
        |dir: &Path| stdout_of(&["--json", "generate", text(dir), "--ids", "3,7", "--greedy", "--max-new-tokens", "5"]);
    assert_eq!(generate(&packed), generate(&plain));
}

#[test]
fn activations_store_one_input_scale_for_siblings() {
    let model = tiny_model();
    let modules = |layer: usize| FUSED.concat().into_iter().map(move |part| format!("model.layers.{layer}.{part}"));
    let amax: BTreeMap<String, f64> =
        (0..2).flat_map(modules).enumerate().map(|(i, name)| (name, 1.0 + 0.5 * i as f64)).collect();
    std::fs::write(model.path().join("activation_amax.json"), serde_json::to_vec(&amax).unwrap()).unwrap();
    let out = tempfile::tempdir().unwrap();
    let output = out.path().join("packed");
    stdout_of(&["quantize", text(model.path()), text(&output), "--format", "nvfp4", "--pack", "--activations"]);
    let after = Checkpoint::open(&output).unwrap();
    for part in FUSED[0] {
        let stored = after.tensor_f32(&format!("model.layers.0.{part}.input_global_scale")).unwrap();
        assert_eq!(stored, [2688.0 / 2.0], "{part}");
    }
    let config: Value = serde_json::from_slice(&std::fs::read(output.join("config.json")).unwrap()).unwrap();
    let group = &config["quantization_config"]["config_groups"]["group_0"];
    assert_eq!(group["input_activations"]["dynamic"], "local");
    after.check(&Qwen2Config::from_dir(&output).unwrap()).unwrap();
    // One module less: which one, in which file.
    let mut fewer = amax.clone();
    fewer.remove("model.layers.1.mlp.up_proj");
    std::fs::write(model.path().join("activation_amax.json"), serde_json::to_vec(&fewer).unwrap()).unwrap();
    let again = out.path().join("again");
    let line =
        refusal_of(&["quantize", text(model.path()), text(&again), "--format", "nvfp4", "--pack", "--activations"]);
    assert!(line.contains("activation_amax.json: module model.layers.1.mlp.up_proj: missing"), "{line}");
    assert_eq!(listing(out.path()), ["packed"]);
}

/// A shard limit that lies anywhere: between a weight's codes and its scales too.
#[test]
fn shards_hold_what_one_file_does() {
    let model = tiny_model();
    let checkpoint = Checkpoint::open(model.path()).unwrap();
    let quantizer = Quantizer::new(&checkpoint, Format::NVFP4, &DEFAULT_EXCLUDED).unwrap();
    let out = tempfile::tempdir().unwrap();
    let single = out.path().join("single");
    pack(model.path(), &single, "nvfp4");
    let single = Checkpoint::open(&single.join("model.safetensors")).unwrap();
    for limit in [3000, 5000, 20_000] {
        let dir = tempfile::tempdir().unwrap();
        let packer = Packer::new(&quantizer, None).unwrap();
        write_weights(dir.path(), packer.specs(), limit, |index, sink| {
            packer.fill(index, sink, &mut |_| Ok(())).map(|_| ())
        })
        .unwrap();
        assert!(listing(dir.path()).len() > 3);
        let sharded = Checkpoint::open(dir.path()).unwrap();
        assert!(single.names().eq(sharded.names()));
        for name in single.names() {
            assert_eq!(single.tensor(name).unwrap().data, sharded.tensor(name).unwrap().data, "{name}");
        }
    }
}

#[test]
fn a_file_is_packed_into_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.safetensors"), dir.path().join("out.safetensors"));
    let mut x = values(0, 4 * 64);
    x[5] = f32::NAN;
    x[70] = f32::INFINITY;
    let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let tensor = |name: &str, shape: &[usize], x: &[f32]| TensorBytes {
        spec: TensorSpec::new(name, StoredDtype::F32, shape),
        data: Cow::Owned(bytes(x)),
    };
    write_safetensors(&input, &[tensor("a.weight", &[4, 64], &x), tensor("b.bias", &[256], &x)]).unwrap();
    let run = crate::temper(&["--json", "quantize", text(&input), text(&output), "--format", "mxfp4", "--pack"]);
    let stderr = String::from_utf8(run.stderr).unwrap();
    assert_eq!(stderr, "warning: tensor a.weight: 2 blocks hold NaN or infinity and became NaN\n");
    let report: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(report["nonfinite_blocks"], 2);
    let after = Checkpoint::open(&output).unwrap();
    assert_eq!(after.names().collect::<Vec<_>>(), ["a.weight_packed", "a.weight_scale", "b.bias"]);
    let scales = after.tensor("a.weight_scale").unwrap();
    assert_eq!((scales.shape, scales.data[0], scales.data[2]), (&[4, 2][..], 255, 255));
    assert!(after.tensor("a.weight_packed").unwrap().data[..16].iter().all(|&byte| byte == 0x77));

    // NVFP4: 0x7F, and the infinity is not in A.
    std::fs::remove_file(&output).unwrap();
    pack(&input, &output, "nvfp4");
    let after = Checkpoint::open(&output).unwrap();
    assert_eq!(after.tensor("a.weight_scale").unwrap().data[0], 0x7F);
    let amax = finite_amax(&x, 64, Format::NVFP4);
    assert_eq!(after.tensor_f32("a.weight_global_scale").unwrap(), [2688.0 / amax]);
}

#[test]
fn what_cannot_be_packed_is_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.safetensors"), dir.path().join("out.safetensors"));
    let write = |names: &[(&str, &[usize])]| {
        let tensors: Vec<TensorBytes> = names
            .iter()
            .map(|(name, shape)| TensorBytes {
                spec: TensorSpec::new(*name, StoredDtype::F32, shape),
                data: Cow::Owned(vec![0; 4 * shape.iter().product::<usize>()]),
            })
            .collect();
        write_safetensors(&input, &tensors).unwrap();
    };
    let refused = |format: &str, more: &[&str], expected: &str| {
        let line =
            refusal_of(&[&["quantize", text(&input), text(&output), "--format", format, "--pack"], more].concat());
        assert!(line.contains(expected), "{line:?}, expected {expected:?}");
        assert_eq!(listing(dir.path()), ["in.safetensors"]);
    };
    write(&[("a.weight", &[2, 48])]);
    for format in ["fp8", "fp8:tensor", "mxfp8", "nvfp4_single_level"] {
        refused(format, &[], &format!("--pack: found format {format}, expected nvfp4 or mxfp4"));
    }
    refused("mxfp4", &[], "tensor a.weight: found [2, 48], expected a last dimension that is a multiple of 32");
    refused("nvfp4", &["--activations"], "--activations: found a file");
    write(&[("a.weight", &[2, 47])]);
    refused("nvfp4", &[], "tensor a.weight: found [2, 47], expected a last dimension that is a multiple of 16");
    write(&[("a.weight", &[2, 48]), ("a.weight_scale", &[3])]);
    refused("nvfp4", &[], "tensor a.weight_scale: found already");
    let line = refusal_of(&["quantize", text(&input), text(&output), "--format", "nvfp4", "--activations"]);
    assert!(line.contains("--pack"), "{line}");
    let model = tiny_model();
    let line =
        refusal_of(&["quantize", text(model.path()), text(&output), "--format", "nvfp4", "--pack", "--activations"]);
    assert!(line.contains("activation_amax.json: no such file"), "{line}");
}

/// SIGINT while a file is half written: exit code 130, and the directory as it was.
#[test]
fn an_interrupt_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.safetensors"), dir.path().join("out.safetensors"));
    let spec = TensorSpec::new("a.weight", StoredDtype::F32, &[16_384, 4096]);
    let bytes: Vec<u8> = values(1, 4096).iter().flat_map(|v| v.to_le_bytes()).collect();
    write_safetensors(&input, &[TensorBytes { spec, data: Cow::Owned(bytes.repeat(16_384)) }]).unwrap();
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_temper"))
        .args(["quantize", text(&input), text(&output), "--format", "nvfp4:4over6", "--pack"])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    while listing(dir.path()).len() == 1 && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let pid = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(listing(dir.path()), ["in.safetensors"]);
}
