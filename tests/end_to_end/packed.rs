//! Packed models in the whole program: a run's checkpoint is packed with its calibrated activation scales, and a packed
//! model is evaluated and trained from like the same values unpacked.

use std::path::Path;

use serde_json::Value;
use temper::model::checkpoint::Checkpoint;

use crate::support::{config, model, names, run_dir, succeed, train_args};

const SHORT: &str = "
trainer: {val_every: 3, save_every: 3}
optimizer: {lr: 0.01}
reward: {mode: numeric}";

fn quantize(input: &Path, output: &Path, more: &[&str]) {
    succeed(&[&["quantize", input.to_str().unwrap(), output.to_str().unwrap()], more].concat());
}

#[test]
fn a_packed_model_is_evaluated_and_trained_from_like_its_values() {
    let dir = tempfile::tempdir().unwrap();
    let [packed, plain] = ["packed", "plain"].map(|name| dir.path().join(name));
    quantize(model(), &packed, &["--format", "mxfp4:even", "--pack"]);
    quantize(model(), &plain, &["--format", "mxfp4:even"]);
    let results = [&packed, &plain].map(|model| {
        let name = model.file_name().unwrap().to_str().unwrap();
        let place = dir.path().join(format!("{name}-run"));
        std::fs::create_dir(&place).unwrap();
        let config = config(&place, "short", SHORT);
        let path = format!("model.path={}", model.display());
        let eval = ["eval", model.to_str().unwrap(), "--config", config.to_str().unwrap(), "--json", "--device", "cpu"];
        let eval: Value = serde_json::from_str(&succeed(&eval)).unwrap();
        let out = place.join("out");
        let set = ["--set".to_string(), path];
        succeed(&[&train_args(&config, &out)[..], &set].concat());
        let run = run_dir(&out);
        let metrics = std::fs::read(run.join("metrics.jsonl")).unwrap();
        // What a run saves is not packed: it has moved off the grid.
        let saved = Checkpoint::open(&run.join("latest")).unwrap();
        assert!(saved.packed_layout().is_none() && saved.contains("model.layers.0.self_attn.q_proj.weight"));
        (eval["conditions"].clone(), metrics)
    });
    assert_eq!(results[0], results[1]);
    assert!(names(&packed).contains(&"tokenizer.json".to_string()));
}

#[test]
fn a_checkpoint_is_packed_with_the_scales_that_its_run_calibrated() {
    let dir = tempfile::tempdir().unwrap();
    let fake_quant = "fake_quant: {enabled: true, weights: nvfp4, activations: nvfp4, activation_scale: static, calibration_prompts: 5}";
    let config = config(dir.path(), "static", &format!("{SHORT}\n{fake_quant}"));
    let out = dir.path().join("out");
    succeed(&train_args(&config, &out));
    let (latest, packed) = (run_dir(&out).join("latest"), dir.path().join("packed"));
    quantize(&latest, &packed, &["--format", "nvfp4", "--pack", "--activations"]);
    let amax: Value = serde_json::from_slice(&std::fs::read(latest.join("activation_amax.json")).unwrap()).unwrap();
    let made = Checkpoint::open(&packed).unwrap();
    for (module, amax) in amax.as_object().unwrap() {
        let stored = made.tensor_f32(&format!("{module}.input_global_scale")).unwrap();
        assert_eq!(stored, [2688.0 / amax.as_f64().unwrap() as f32], "{module}");
    }
    let report: Value =
        serde_json::from_str(&succeed(&["validate", latest.to_str().unwrap(), packed.to_str().unwrap(), "--json"]))
            .unwrap();
    assert_eq!((&report["reproduced"], &report["best_rule"]), (&true.into(), &"te".into()));
}
