//! `temper quantize` through the binary: bit-exact values, untouched neighbours, the JSON contract.

use std::borrow::Cow;
use std::path::Path;

use serde_json::Value;
use temper::model::checkpoint::{Checkpoint, StoredDtype, TensorBytes, TensorSpec, write_safetensors};
use temper::model::config::Qwen2Config;
use temper::numerics::block_format::{self, RoundingDraw, TensorScale, fake_quant, fake_quant_scaled, finite_amax};
use temper::numerics::format::Format;
use temper::numerics::noise_key::{Phase, Purpose, ROUNDED_WEIGHT, row_key, stream};

use crate::{listing, shared, stdout_of, text, tiny_model, values};

const METRICS: [&str; 8] =
    ["sqnr_db", "mse", "rmse", "relative_error", "cosine", "max_abs_error", "deadzone_ratio", "saturation_ratio"];

fn quantize(input: &Path, output: &Path, format: &str) -> Value {
    let json = stdout_of(&["--json", "quantize", text(input), text(output), "--format", format]);
    serde_json::from_str(&json).unwrap()
}

fn write_one(path: &Path, name: &str, dtype: StoredDtype, shape: &[usize], data: Vec<u8>) {
    let spec = TensorSpec::new(name, dtype, shape);
    write_safetensors(path, &[TensorBytes { spec, data: Cow::Owned(data) }]).unwrap();
}

fn le_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Equal as numbers: the sign of zero is no part of the comparison.
fn assert_same(found: &[f32], expected: &[f32], place: &str) {
    let differ = found.iter().zip(expected).filter(|(a, b)| a != b).count();
    assert!(found.len() == expected.len() && differ == 0, "{place}: {differ} of {} differ", found.len());
}

/// All inputs of the vectors as tensors of one file, one run of the binary per format.
#[test]
fn values_are_those_of_public_libraries() {
    let Some(vectors) = shared("vectors") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("in.safetensors");
    let cases = ["gauss_s0", "student3", "ties_mx", "zeros"]
        .iter()
        .flat_map(|case| [format!("{case}.f32"), format!("{case}.bf16")]);
    let references: Vec<(String, Checkpoint)> = cases
        .map(|case| {
            let file = vectors.join(format!("{case}.safetensors"));
            (case, Checkpoint::open(&file).unwrap())
        })
        .collect();
    let tensors: Vec<TensorBytes> = references
        .iter()
        .map(|(case, reference)| {
            let x = reference.tensor("x").unwrap();
            TensorBytes { spec: TensorSpec::new(case, x.dtype, x.shape), data: Cow::Borrowed(x.data) }
        })
        .collect();
    write_safetensors(&input, &tensors).unwrap();
    for (format, libraries) in [
        ("nvfp4", &["te.nvfp4", "spec.nvfp4_te"][..]),
        ("mxfp4", &["spec.mxfp4_floor", "ao.mxfp4_floor"]),
        ("mxfp4:even", &["spec.mxfp4_even", "ct.mxfp4"]),
        ("mxfp4:rceil", &["spec.mxfp4_rceil"]),
        ("nvfp4:4over6", &["fos.nvfp4_4over6_mse"]),
        ("mxfp8", &["spec.mxfp8_floor", "ao.mxfp8_floor"]),
        ("mxfp8:even", &["spec.mxfp8_even", "ct.mxfp8"]),
        ("nvfp4_single_level", &["original.nvfp4"]),
    ] {
        let output = dir.path().join(format!("{}.safetensors", format.replace(':', "_")));
        quantize(&input, &output, format);
        let found = Checkpoint::open(&output).unwrap();
        for (case, reference) in &references {
            for library in libraries {
                compare(&found, reference, case, library);
            }
        }
    }
}

/// Bit for bit after rounding to the input's dtype. TransformerEngine and fouroversix multiply their scale factors in
/// another order (tests/numerics/library_vectors.rs), which f32 values show in the last places and bf16 ones do not.
fn compare(found: &Checkpoint, reference: &Checkpoint, case: &str, library: &str) {
    let place = format!("{case} {library}");
    let tensor = found.tensor(case).unwrap();
    assert_eq!(tensor.dtype, reference.tensor("x").unwrap().dtype, "{place}");
    let mut found = tensor.to_f32().unwrap();
    let mut expected = reference.tensor_f32(&format!("{library}.dq")).unwrap();
    let reordered = library.contains("nvfp4") && !library.starts_with("original");
    if reordered {
        let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 3.6e-7 * b.abs() || tensor.dtype == StoredDtype::BF16;
        assert!(found.iter().zip(&expected).all(close), "{place}");
    }
    if reordered || tensor.dtype == StoredDtype::BF16 {
        let round = |v: &mut f32| *v = half::bf16::from_f32(*v).to_f32();
        found.iter_mut().for_each(round);
        expected.iter_mut().for_each(round);
    }
    assert_same(&found, &expected, &place);
}

#[test]
fn a_model_keeps_everything_but_its_projections() {
    let model = tiny_model();
    std::fs::write(model.path().join("LICENSE"), "terms").unwrap();
    let before = Checkpoint::open(model.path()).unwrap();
    let out = tempfile::tempdir().unwrap();
    let output = out.path().join("quantized");
    let report = quantize(model.path(), &output, "nvfp4");
    assert_eq!(listing(out.path()), ["quantized"]);
    assert_eq!(listing(&output), listing(model.path()));
    for name in ["config.json", "generation_config.json", "LICENSE"] {
        assert_eq!(std::fs::read(output.join(name)).unwrap(), std::fs::read(model.path().join(name)).unwrap());
    }
    let after = Checkpoint::open(&output).unwrap();
    after.check(&Qwen2Config::from_dir(&output).unwrap()).unwrap();
    let tensors = report["tensors"].as_array().unwrap();
    let reported: Vec<&str> = tensors.iter().map(|t| t["name"].as_str().unwrap()).collect();
    for name in before.names() {
        let (old, new) = (before.tensor(name).unwrap(), after.tensor(name).unwrap());
        assert_eq!((old.dtype, old.shape), (new.dtype, new.shape), "{name}");
        let quantized = name.ends_with("proj.weight");
        assert_eq!(old.data != new.data, quantized, "{name}");
        assert_eq!(reported.contains(&name), quantized, "{name}");
    }
    assert_eq!((tensors.len(), &report["copied_tensors"]), (14, &Value::from(1 + 2 * 5 + 1)));
    for tensor in tensors.iter().chain([&report["mean"]]) {
        for metric in METRICS {
            assert!(tensor[metric].is_number(), "{metric} in {tensor}");
        }
    }
    assert_eq!(tensors[0]["format"], "nvfp4");
}

#[test]
fn fused_siblings_share_one_tensor_amax() {
    let model = tiny_model();
    let out = tempfile::tempdir().unwrap();
    let output = out.path().join("quantized");
    quantize(model.path(), &output, "nvfp4");
    let (before, after) = (Checkpoint::open(model.path()).unwrap(), Checkpoint::open(&output).unwrap());
    for group in [&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"][..], &["self_attn.o_proj"]] {
        let name = |part: &str| format!("model.layers.1.{part}.weight");
        let read = |part: &&str| before.tensor_f32(&name(part)).unwrap();
        let amax = group.iter().map(|part| finite_amax(&read(part), 64, Format::NVFP4)).fold(0.0, f32::max);
        for part in group {
            let x = read(part);
            let expected = fake_quant_scaled(&x, x.len() / 64, 64, Format::NVFP4, TensorScale::Amax(amax));
            assert_same(&after.tensor_f32(&name(part)).unwrap(), &expected.dequantized, part);
        }
    }
}

#[test]
fn a_file_keeps_what_is_not_a_matrix_of_floats() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.safetensors"), dir.path().join("out.safetensors"));
    let x = values(0, 2 * 3 * 40);
    let f16: Vec<u8> = x.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect();
    let tensor = |name: &str, dtype, shape: &[usize], data: Vec<u8>| TensorBytes {
        spec: TensorSpec::new(name, dtype, shape),
        data: Cow::Owned(data),
    };
    let tensors = [
        tensor("cube", StoredDtype::F32, &[2, 3, 40], le_bytes(&x)),
        tensor("half", StoredDtype::F16, &[6, 40], f16),
        tensor("vector", StoredDtype::F32, &[240], le_bytes(&x)),
        tensor("codes", StoredDtype::U8, &[2, 2], vec![1, 2, 3, 4]),
        tensor("ids", StoredDtype::I64, &[1, 1], vec![0; 8]),
        tensor("empty", StoredDtype::F32, &[0, 32], vec![]),
        tensor("a.lm_head.weight", StoredDtype::F32, &[6, 40], le_bytes(&x)),
        tensor("embed_tokens", StoredDtype::F32, &[6, 40], le_bytes(&x)),
        tensor("my_lm_head_too", StoredDtype::F32, &[6, 40], le_bytes(&x)),
    ];
    write_safetensors(&input, &tensors).unwrap();
    let report = quantize(&input, &output, "mxfp4:even");
    let after = Checkpoint::open(&output).unwrap();
    let format: Format = "mxfp4:even".parse().unwrap();
    let expected = fake_quant(&x, 6, 40, format).dequantized;
    assert_same(&after.tensor_f32("cube").unwrap(), &expected, "cube");
    assert_same(&after.tensor_f32("my_lm_head_too").unwrap(), &expected, "my_lm_head_too");
    let rounded: Vec<f32> = x.iter().map(|v| half::f16::from_f32(*v).to_f32()).collect();
    let expected = fake_quant(&rounded, 6, 40, format).dequantized;
    assert_same(&after.tensor_f32("half").unwrap(), &expected, "half");
    for t in &tensors[2..8] {
        assert_eq!(after.tensor(&t.spec.name).unwrap().data, &t.data[..], "{}", t.spec.name);
    }
    assert_eq!(report["tensors"].as_array().unwrap().len(), 3);
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let model = tiny_model();
    let out = tempfile::tempdir().unwrap();
    let bytes = |name: &str, format: &str| {
        let output = out.path().join(name);
        quantize(model.path(), &output, format);
        std::fs::read(output.join("model.safetensors")).unwrap()
    };
    assert_eq!(bytes("a", "mxfp4"), bytes("b", "mxfp4"));
    assert_eq!(bytes("c", "nvfp4:sr,2d"), bytes("d", "nvfp4:sr,2d"));
}

/// A tensor's stochastic rounding draws by its position among the names, under seed 0 and update 0.
#[test]
fn stochastic_rounding_draws_by_tensor_and_row() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.safetensors"), dir.path().join("out.safetensors"));
    let x = values(3, 6 * 40);
    let tensor = |name: &str| TensorBytes {
        spec: TensorSpec::new(name, StoredDtype::F32, &[6, 40]),
        data: Cow::Owned(le_bytes(&x)),
    };
    write_safetensors(&input, &[tensor("a"), tensor("b")]).unwrap();
    quantize(&input, &output, "mxfp4:sr");
    let after = Checkpoint::open(&output).unwrap();
    let keys: Vec<u64> = (0..6).map(|row| row_key(0, row)).collect();
    for (index, name) in ["a", "b"].into_iter().enumerate() {
        let stream = stream(Purpose::StochasticRounding, Phase::Shared, ROUNDED_WEIGHT, index as u32).unwrap();
        let draw = RoundingDraw { seed: 0, stream, row_keys: &keys };
        let expected = block_format::quantize(&x, 6, 40, "mxfp4:sr".parse().unwrap(), TensorScale::Tensor, Some(&draw));
        assert_same(&after.tensor_f32(name).unwrap(), &expected.dequantized, name);
    }
    assert_ne!(after.tensor_f32("a").unwrap(), after.tensor_f32("b").unwrap());
}

#[test]
fn a_tile_does_not_reach_into_the_next_matrix() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.safetensors"), dir.path().join("out.safetensors"));
    let spec = TensorSpec::new("experts", StoredDtype::F32, &[3, 20, 32]);
    write_safetensors(&input, &[TensorBytes { spec, data: Cow::Owned(le_bytes(&values(4, 3 * 20 * 32))) }]).unwrap();
    let run = crate::temper(&["--json", "quantize", text(&input), text(&output), "--format", "nvfp4:2d"]);
    let line = String::from_utf8_lossy(&run.stderr).into_owned();
    assert_eq!(run.status.code(), Some(2), "{line}");
    assert!(line.contains("tensor experts: found [3, 20, 32], expected a multiple of 16 rows"), "{line}");
}

#[test]
fn blocks_that_are_not_finite_are_counted_and_said() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.safetensors"), dir.path().join("out.safetensors"));
    let mut x = values(0, 4 * 64);
    x[5] = f32::NAN;
    x[70] = f32::INFINITY;
    write_one(&input, "x", StoredDtype::F32, &[4, 64], le_bytes(&x));
    let run = crate::temper(&["--json", "quantize", text(&input), text(&output), "--format", "mxfp4"]);
    assert!(run.status.success());
    let stderr = String::from_utf8(run.stderr).unwrap();
    assert_eq!(stderr, "warning: tensor x: 2 blocks hold NaN or infinity and became NaN\n");
    let report: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(report["nonfinite_blocks"], 2);
    let q = Checkpoint::open(&output).unwrap().tensor_f32("x").unwrap();
    for (block, values) in q.chunks(32).enumerate() {
        assert_eq!(values.iter().all(|v| v.is_nan()), block == 0 || block == 2, "block {block}");
    }
}

#[test]
fn without_json_there_is_a_table() {
    let model = tiny_model();
    let out = tempfile::tempdir().unwrap();
    let table = stdout_of(&["quantize", text(model.path()), text(&out.path().join("q")), "--format", "mxfp4"]);
    assert!(table.contains("model.layers.0.self_attn.q_proj.weight"), "{table}");
    assert!(table.trim_end().ends_with("14 tensors quantized to mxfp4, 12 copied"), "{table}");
}
