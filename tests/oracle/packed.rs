//! Packed checkpoints between temper and compressed-tensors, both ways, weight for weight (pack.py).
//!
//! The library's decompressor gives every weight in bf16, whatever the model's dtype. So in a bf16 model both read the
//! same bits; in an f32 model temper keeps what the library rounds away, and rounds to the same. Fake quantization
//! multiplies by S * (1/G) where a reader divides, S / G: NVFP4 values may differ in the last place of f32, and of bf16
//! where that last place decides a rounding. MXFP4 has no such place.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use half::bf16;
use serde_json::Value;
use temper::model::checkpoint::{Checkpoint, StoredDtype};

use crate::expected::{python, python_has, scratch};

/// Log-probabilities of a model that computes in bf16 against f32.
const BF16_LOGPROBS: f64 = 0.05;
const IDS: &str = "1,5,9,23,77";

/// The libraries' checkpoints: dtype and dtype.scheme; None, and a line that says why, without them.
fn library_models(scratch_name: &str) -> Option<PathBuf> {
    if let Err(reason) = python_has("torch, transformers, compressed_tensors, safetensors") {
        println!("skipped: {reason}");
        return None;
    }
    let dir = scratch(scratch_name);
    let output = python("pack.py", &["make", dir.to_str().unwrap()]);
    assert!(output.status.success(), "pack.py make failed: {}", String::from_utf8_lossy(&output.stderr));
    Some(dir)
}

/// What the library reads from directories.
fn read_by_library(dirs: &[PathBuf]) -> Vec<Checkpoint> {
    let target = |dir: &PathBuf| PathBuf::from(format!("{}.read", dir.display()));
    let pairs: Vec<String> =
        dirs.iter().flat_map(|dir| [dir.display().to_string(), target(dir).display().to_string()]).collect();
    let arguments: Vec<&str> = ["read"].into_iter().chain(pairs.iter().map(String::as_str)).collect();
    let output = python("pack.py", &arguments);
    assert!(output.status.success(), "pack.py read failed: {}", String::from_utf8_lossy(&output.stderr));
    dirs.iter().map(|dir| Checkpoint::open(&target(dir)).unwrap()).collect()
}

fn temper(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_temper")).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&temper(&[&["--json"], arguments].concat())).unwrap()
}

/// The weights that temper loads from `dir` are the library's, bit for bit: the f32 values, and what bf16 makes of them.
/// So are those that transformers holds, and `logprobs` says that it ran.
fn assert_read_alike(dir: &Path, library: &Checkpoint, with_logprobs: bool) {
    let ours = Checkpoint::open(dir).unwrap();
    let names: Vec<&str> = ours.packed_names().collect();
    assert_eq!(names.len(), 14, "{}", dir.display());
    for name in names {
        let (found, theirs) = (ours.parameter(name).unwrap(), library.tensor(name).unwrap());
        assert_eq!(theirs.dtype, StoredDtype::BF16, "{name}: the library's decompressor gives bf16");
        let bits: Vec<u8> = match found.spec.dtype {
            StoredDtype::BF16 => found.data.to_vec(),
            _ => found.view().to_f32().unwrap().iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        };
        assert!(bits == theirs.data, "{}: {name} differs from the library's", dir.display());
        let exact = library.tensor_f32(&format!("f32.{name}")).unwrap();
        let values = ours.packed_weight(name).unwrap().unwrap().values();
        let same = values.iter().zip(&exact).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same && values.len() == exact.len(), "{}: {name} in f32 differs from the library's", dir.display());
        let held = library.tensor(&format!("transformers.{name}")).unwrap();
        assert!(bits == held.data, "{}: {name} differs from what transformers holds", dir.display());
    }
    if with_logprobs {
        let found = json(&["score", dir.to_str().unwrap(), "--ids", IDS]);
        let theirs = library.tensor_f32("logprobs").unwrap();
        for (a, b) in found["logprobs"].as_array().unwrap().iter().zip(theirs) {
            assert!((a.as_f64().unwrap() - f64::from(b)).abs() < BF16_LOGPROBS, "{}: {a} {b}", dir.display());
        }
    }
}

/// The share of codes on which a rule differs.
fn codes_differing(report: &Value, rule: &str) -> f64 {
    let rules = report["rules"].as_array().unwrap();
    rules.iter().find(|r| r["rule"] == rule).unwrap()["codes_differing_ratio"].as_f64().unwrap()
}

#[test]
fn what_compressed_tensors_packs_is_reproduced_and_read() {
    let Some(root) = library_models("oracle_packed_by_library") else { return };
    let cases = [
        ("float32", "nvfp4", "compressed_tensors"),
        ("float32", "mxfp4", "even"),
        ("bfloat16", "nvfp4", "compressed_tensors_bf16"),
        ("bfloat16", "mxfp4", "even"),
    ];
    let dirs: Vec<PathBuf> = cases.iter().map(|(dtype, scheme, _)| root.join(format!("{dtype}.{scheme}"))).collect();
    for ((dir, library), (dtype, scheme, rule)) in dirs.iter().zip(read_by_library(&dirs)).zip(cases) {
        let report = json(&["validate", root.join(dtype).to_str().unwrap(), dir.to_str().unwrap()]);
        assert_eq!((&report["reproduced"], &report["best_rule"]), (&true.into(), &rule.into()), "{dtype} {scheme}");
        assert_eq!(codes_differing(&report, rule), 0.0);
        let mut line = format!("{dtype} {scheme}: {}", report["verdict"].as_str().unwrap());
        if scheme == "nvfp4" {
            let te = codes_differing(&report, "te");
            line += &format!("; te differs on {:.1e} of codes", te);
            // bf16 has other scales: the library rounds them to bf16 on the way.
            assert!(te <= if dtype == "float32" { 1e-3 } else { 1e-2 }, "{line}");
        }
        println!("{line}");
        assert_read_alike(dir, &library, true);
    }
}

#[test]
fn what_temper_packs_is_read_by_compressed_tensors_and_transformers() {
    let Some(root) = library_models("oracle_packed_by_temper") else { return };
    for dtype in ["float32", "bfloat16"] {
        let model = root.join(dtype);
        let amax: BTreeMap<String, f32> = Checkpoint::open(&model)
            .unwrap()
            .names()
            .filter_map(|name| name.strip_suffix(".weight").filter(|module| module.ends_with("proj")))
            .map(|module| (module.to_string(), 4.0))
            .collect();
        std::fs::write(model.join("activation_amax.json"), serde_json::to_vec(&amax).unwrap()).unwrap();
        let cases = [
            ("nvfp4", false),
            ("nvfp4:4over6", false),
            ("nvfp4:sr,2d", false),
            ("nvfp4", true),
            ("mxfp4", false),
            ("mxfp4:even", false),
            ("mxfp4:rceil,half_away", false),
            ("mxfp4:even", true),
        ];
        let name = |format: &str| format.replace([':', ','], "_");
        let dir = |format: &str, activations: bool| {
            root.join(format!("{dtype}-{}-{}", name(format), if activations { "w4a4" } else { "w4a16" }))
        };
        let dirs: Vec<PathBuf> = cases.iter().map(|&(format, activations)| dir(format, activations)).collect();
        for (&(format, activations), dir) in cases.iter().zip(&dirs) {
            let more = if activations { &["--pack", "--activations"][..] } else { &["--pack"] };
            let arguments = ["quantize", model.to_str().unwrap(), dir.to_str().unwrap(), "--format", format];
            temper(&[&arguments, more].concat());
        }
        for ((dir, library), &(format, activations)) in dirs.iter().zip(read_by_library(&dirs)).zip(&cases) {
            assert_read_alike(dir, &library, !activations);
            if !activations {
                let plain = root.join(format!("{dtype}-{}-plain", name(format)));
                temper(&["quantize", model.to_str().unwrap(), plain.to_str().unwrap(), "--format", format]);
                compare_with_fake_quantized(dir, &plain, dtype, format);
            }
        }
    }
}

/// Against the values that training saw: equal in MXFP4, within the last place in NVFP4.
fn compare_with_fake_quantized(packed: &Path, plain: &Path, dtype: &str, format: &str) {
    let (packed, plain) = (Checkpoint::open(packed).unwrap(), Checkpoint::open(plain).unwrap());
    let (mut differing, mut all) = (0, 0);
    // One place: a difference of the two quotients moves f32 by at most two places, bf16 by one.
    let place = if dtype == "float32" { 2.4e-7 } else { 7.9e-3 };
    for name in packed.packed_names() {
        let loaded = packed.parameter(name).unwrap().view().to_f32().unwrap();
        let trained = plain.tensor_f32(name).unwrap();
        for (a, b) in loaded.iter().zip(&trained) {
            assert!((a - b).abs() <= place * b.abs(), "{dtype} {format} {name}: {a} {b}");
            differing += (a != b) as usize;
            all += 1;
        }
    }
    println!(
        "{dtype} {format}: {differing} of {all} loaded values differ from the fake-quantized ones in the last place"
    );
    assert!(format.starts_with("nvfp4") || differing == 0, "{dtype} {format}");
    assert!(dtype == "float32" || (differing as f64) < 1e-4 * all as f64, "{dtype} {format}");
}
