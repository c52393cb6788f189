//! LoRA adapters in PEFT: it loads what temper writes and computes the same log-probs, and temper loads what it writes.

use std::path::PathBuf;

use serde_json::Value;
use tch::{Device, Kind, Tensor};
use temper::model::load::{load_model, save_model};
use temper::model::lora::{Lora, attach_new};
use temper::model::section::{Dtype, LoraSection, Projection};

use crate::commands::{comma_separated, score, temper};
use crate::expected::{Model, assert_logprobs, expected, python, python_has, scratch};

/// Of log-probs in f32, here and there.
const TOLERANCE: f64 = 1e-4;

fn peft(args: &[String]) -> Vec<u8> {
    let output = python("adapters.py", &args.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn has_peft() -> bool {
    let found = python_has("torch, transformers, peft");
    found.inspect_err(|reason| println!("skipped: {reason}")).is_ok()
}

/// A base model, an adapter for it, ids to score.
struct Case<'a> {
    name: String,
    base: PathBuf,
    adapter: PathBuf,
    ids: &'a [u32],
}

/// temper's log-probs with the adapter, and merged by `temper merge`, against PEFT's of both.
fn compare(cases: &[Case]) {
    let text = |path: &PathBuf| path.to_str().unwrap().to_string();
    let triples = cases.iter().flat_map(|case| [text(&case.base), text(&case.adapter), comma_separated(case.ids)]);
    let args: Vec<String> = std::iter::once("score".to_string()).chain(triples).collect();
    let found: Vec<Value> = serde_json::from_slice(&peft(&args)).unwrap();
    for (Case { name, adapter, ids, .. }, found) in cases.iter().zip(found) {
        let of = |key: &str| -> Vec<f64> { serde_json::from_value(found[key].clone()).unwrap() };
        let adapted = score(adapter, ids);
        let moved = adapted.iter().zip(of("base")).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(moved > 0.01, "{name}: the adapter does nothing");
        for key in ["adapted", "automatic"] {
            assert_logprobs(&adapted, &of(key), TOLERANCE, &format!("{name}, {key}"));
        }
        let merged = adapter.with_extension("merged");
        let _ = std::fs::remove_dir_all(&merged);
        let said = temper("merge", adapter, &[merged.to_str().unwrap()]);
        assert!(said["adapters"].as_u64().unwrap() > 0);
        let merged = score(&merged, ids);
        assert_logprobs(&merged, &of("merged"), TOLERANCE, &format!("{name}, merged"));
        assert_logprobs(&merged, &adapted, 1e-5, &format!("{name}, merged and unmerged"));
    }
}

#[test]
fn peft_computes_the_same_with_an_adapter_of_ours() {
    let Some(expected) = expected().filter(|_| has_peft()) else { return };
    let targets = [&Projection::ALL[..], &Projection::ALL[3..5], &Projection::ALL[..]];
    // Those in f32: a merged bf16 weight is rounded.
    let make = |(model, targets): (&'static Model, &[Projection])| {
        let base = std::fs::canonicalize(expected.dir(model)).unwrap();
        let mut adapted = load_model(&base, Device::Cpu, Some(Kind::Float)).unwrap();
        let section = LoraSection { rank: 4, alpha: 6.0, targets: targets.to_vec() };
        let lora = Lora { section, base: base.to_str().unwrap().to_string() };
        attach_new(&mut adapted, lora, 7).unwrap();
        tch::manual_seed(5);
        for adapter in adapted.linears_mut().filter_map(|linear| linear.adapter.as_deref_mut()) {
            let b = &mut adapter.b.weight;
            b.assign(&(Tensor::randn(b.value().size(), (Kind::Float, Device::Cpu)) * 0.05)).unwrap();
        }
        let adapter = scratch(&format!("oracle_adapter_{}", model.name));
        save_model(&adapted, Dtype::F32, Some(&base), &adapter).unwrap();
        assert!(!adapter.join("model.safetensors").exists(), "the adapter alone");
        Case { name: model.name.clone(), base, adapter, ids: &model.scores[1].ids }
    };
    compare(&expected.models[..3].iter().zip(targets).map(make).collect::<Vec<_>>());
}

#[test]
fn an_adapter_of_pefts_is_the_same_here() {
    let Some(expected) = expected().filter(|_| has_peft()) else { return };
    let targets =
        ["q_proj,v_proj", "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "up_proj,k_proj,down_proj"];
    let mut args = vec!["make".to_string()];
    let mut cases = Vec::new();
    for (model, targets) in expected.models[..3].iter().zip(targets) {
        let base = std::fs::canonicalize(expected.dir(model)).unwrap();
        let adapter = scratch(&format!("oracle_peft_{}", model.name));
        args.extend([&base, &adapter].map(|path| path.to_str().unwrap().to_string()));
        args.push(targets.to_string());
        cases.push(Case { name: model.name.clone(), base, adapter, ids: &model.scores[1].ids });
    }
    peft(&args);
    // PEFT writes no config.json: temper reads the base's.
    assert!(cases.iter().all(|case| !case.adapter.join("config.json").exists()));
    compare(&cases);
}
