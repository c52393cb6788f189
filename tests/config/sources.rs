//! extends, aliases, --set, numbers, round trip, hash.

use super::{load, load_text, registry_file, write};
use temper::config::{self, Config};
use temper::inject::section::{Compat, InjectPhase, LayerSet, LayerType, PhaseSet};

#[test]
fn defaults_are_the_recipe_of_the_e5_family_with_nothing_injected() {
    let config = load_text("").unwrap();
    assert_eq!((config.data.prompts_per_step, config.rollout.group_size, config.trainer.epochs), (128, 5, 2));
    assert_eq!((config.optimizer.lr, config.optimizer.betas, config.algorithm.kl_coef), (5e-7, [0.9, 0.999], 0.001));
    assert!(!config.noisy_ops.enabled && !config.noise_injection.enabled && !config.fake_quant.enabled);
    assert_eq!(config.noisy_ops.exclude_modules, ["lm_head", "embed_tokens"]);
    assert!(!config.fake_quant.phases.contains(InjectPhase::RefLogprobs));
}

#[test]
fn numbers_without_a_dot_are_numbers() {
    for text in ["5e-7", "5E-7", "5.0e-7", "0.0000005", "\"5e-7\"", "+5e-7"] {
        assert_eq!(load_text(&format!("optimizer: {{lr: {text}}}")).unwrap().optimizer.lr, 5e-7, "{text}");
        let set = [format!("optimizer.lr={text}")];
        assert_eq!(config::load(&registry_file("e5c.yaml"), &set).unwrap().optimizer.lr, 5e-7, "{text}");
    }
    assert_eq!(load_text("optimizer: {betas: [9e-1, \"999e-3\"]}").unwrap().optimizer.betas, [0.9, 0.999]);
    assert_eq!(load_text("algorithm: {kl_coef: 0}").unwrap().algorithm.kl_coef, 0.0);
}

#[test]
fn the_yaml_of_the_original_pastes_in() {
    let config = load_text(
        "trainer:
  epochs: 2
  noise_injection:
    enabled: true
    epoch_aware: true
    sigma_start: 0.01
    sigma_end: 0.00001
    stages_per_epoch: 5
    layer_types: ['rmsnorm', linear]
    target_modules: [input_layernorm]
    exclude_patterns: ['lm_head']
    compat: original
    layer_sigma_config:
      enabled: true
      _comment: from the scan
      default_multiplier: 1.0
      layer_multipliers: {'14': 1.5, 15: 1.2, _why: worst}
  noisy_ops: {enabled: true, error_scale: 5e-2, error_type: relative_gaussian, layers: 14-17, phases: [forward, backward]}",
    )
    .unwrap();
    let aqn = &config.noise_injection;
    assert_eq!(aqn.layer_types, [LayerType::Rmsnorm, LayerType::Linear]);
    assert_eq!(aqn.exclude_modules, ["lm_head"]);
    assert_eq!(aqn.compat, Some(Compat::Original));
    let multipliers = aqn.layer_sigma_config.as_ref().unwrap();
    assert_eq!(multipliers.layer_multipliers, [(14, 1.5), (15, 1.2)].into());
    assert_eq!(config.noisy_ops.error_scale, 0.05);
    assert_eq!(config.noisy_ops.layers, LayerSet::Only([14, 15, 16, 17].into()));
    assert_eq!(config.noisy_ops.phases, PhaseSet::of(&[InjectPhase::Forward, InjectPhase::Backward]));
    assert_eq!(config.trainer.epochs, 2);
}

#[test]
fn extends_merges_maps_and_replaces_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("base")).unwrap();
    write(&dir.path().join("base"), "m.yaml", "layer_multipliers: {3: 2.0}\n");
    let parent = "name: p
model: {preset: qwen2.5-1.5b, path: somewhere}
optimizer: {lr: 1e-3, betas: [0.5, 0.6]}
noise_injection: {layer_sigma_config: m.yaml}
";
    write(&dir.path().join("base"), "parent.yaml", parent);
    let child = "extends: base/parent.yaml
name: c
model: {path: null}
optimizer: {betas: [0.7, 0.8]}
";
    let file = write(dir.path(), "child.yaml", child);
    let config = config::load(&file, &[]).unwrap();
    assert_eq!((config.name.as_str(), config.optimizer.lr, config.optimizer.betas), ("c", 1e-3, [0.7, 0.8]));
    assert_eq!((config.model.path.clone(), config.model.preset.as_deref()), (None, Some("qwen2.5-1.5b")));
    // The multiplier file is relative to the file that names it.
    let of = |config: &Config| config.noise_injection.layer_sigma_config.clone().unwrap();
    assert_eq!(of(&config).layer_multipliers, [(3, 2.0)].into());
    // A child's multipliers replace the parent's, an override edits them.
    let grandchild = "extends: child.yaml\nnoise_injection: {layer_sigma_config: {layer_multipliers: {4: 1.0}}}\n";
    let file = write(dir.path(), "grandchild.yaml", grandchild);
    assert_eq!(of(&config::load(&file, &[]).unwrap()).layer_multipliers, [(4, 1.0)].into());
    let set = ["noise_injection.layer_sigma_config.layer_multipliers.5=3".to_string()];
    assert_eq!(of(&config::load(&file, &set).unwrap()).layer_multipliers, [(4, 1.0), (5, 3.0)].into());
}

#[test]
fn overrides_apply_in_order_and_texts_stay_texts() {
    let sets = [
        "trainer.epochs=3",
        "trainer.epochs=4",
        "model.path=12",
        "data.prompt_suffix=Answer: now",
        "rollout={group_size: 8}",
        "data.train=null",
        "trainer.noisy_ops.error_scale=1e-1",
    ];
    let config = config::load(&registry_file("e5c.yaml"), &sets.map(String::from)).unwrap();
    assert_eq!(config.trainer.epochs, 4);
    assert_eq!(config.model.path.as_deref(), Some("12"));
    assert_eq!(config.data.prompt_suffix, "Answer: now");
    assert_eq!((config.rollout.group_size, config.rollout.temperature), (8, 1.0));
    assert_eq!((config.data.train.clone(), config.noisy_ops.error_scale), (None, 0.1));
}

#[test]
fn the_resolved_yaml_loads_to_the_same_configuration() {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(registry_file("")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            let config = config::load(&path, &["optimizer.lr=3.7e-7".to_string()]).unwrap();
            let again = config::load(&write(dir.path(), "resolved.yaml", &config.to_yaml()), &[]).unwrap();
            assert_eq!(again, config, "{}", path.display());
            assert_eq!(again.hash(), config.hash());
        }
    }
}

/// Hashes from before algorithm.ratio, entropy_coef, dynamic_sampling, optimizer.schedule, reward.sum and their like: a run
/// directory of then is the same experiment now.
#[test]
fn new_keys_at_their_defaults_leave_old_hashes() {
    for (name, hash) in [
        ("1a", "331966e0"),
        ("baseline", "d37d402f"),
        ("debug", "28c52c72"),
        ("e5", "15131d8c"),
        ("e5c", "6a55452c"),
        ("e5c_mini", "e95c1c1c"),
        ("e9a", "51f7dcc1"),
        ("e9b", "1f12fbac"),
        ("mxfp4_aqn", "59217077"),
        ("nvfp4", "0fe9779c"),
        ("quickstart", "7cbe0583"),
        ("w4a4_nvfp4", "830d595d"),
    ] {
        assert_eq!(load(&format!("{name}.yaml")).hash(), hash, "{name}");
    }
}

#[test]
fn the_hash_is_of_the_experiment_alone() {
    let hash = |sets: &[&str]| {
        let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        config::load(&registry_file("e9b.yaml"), &sets).unwrap().hash()
    };
    let e9b = hash(&[]);
    assert_eq!(e9b.len(), 8);
    for operational in [
        "seed=7",
        "name=other",
        "trainer.val_every=1",
        "trainer.save_every=1",
        "trainer.threads=3",
        "trainer.keep_last=9",
        "trainer.stop_rules=[{metric: entropy, above: 1}]",
        "data.train=/elsewhere/gsm8k_train.jsonl",
        "model.path=/models/Qwen2.5-1.5B-Instruct/",
        "fake_quant.weights=nvfp4", // quantization is off
        "optimizer.lr=0.0000005",
        "reward.timeout_s=5",
        "reward.max_restarts=0",
        "algorithm.ratio=token",
        "algorithm.entropy_coef=0",
        "optimizer.schedule=constant",
        "reward.sum=[]",
    ] {
        assert_eq!(hash(&[operational]), e9b, "{operational}");
    }
    let mut seen = vec![e9b];
    for identifying in [
        "optimizer.lr=6e-7",
        "noise_injection.layer_sigma_config.layer_multipliers.14=1.6",
        "noisy_ops.error_scale=0.1",
        "data.train=other.jsonl",
        "model.path=other",
        "noise_injection.enabled=false",
        "fake_quant.enabled=true",
        "trainer.epochs=3",
        "data.prompt_suffix=x",
        "algorithm.advantage=rloo",
        "algorithm.ratio=sequence",
        "algorithm.truncated_importance=2",
        "algorithm.entropy_coef=0.001",
        "algorithm.dynamic_sampling={}",
        "optimizer.schedule=linear",
        "reward.kind=numeric",
        "reward.overlong={buffer_tokens: 9}",
        "reward.sum=[{}]",
    ] {
        let found = hash(&[identifying]);
        assert!(!seen.contains(&found), "{identifying}");
        seen.push(found);
    }
    // Two ways to write one experiment.
    assert_eq!(load("baseline_2ep.yaml").hash(), load("e5_family.yaml").hash());
}
