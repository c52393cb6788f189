//! Every bad input gives one line that names the source, the key and what would be right.

use super::{load_text, registry_file, write};
use temper::config;

/// (YAML, what the line must contain)
const TABLE: [(&str, &[&str]); 98] = [
    // Unknown keys name the nearest known one, next to it or elsewhere.
    ("trainer: {epoch: 3}", &["x.yaml: trainer.epoch: unknown key; nearest known key: trainer.epochs"]),
    ("trainr: {epochs: 3}", &["trainr: unknown key; nearest known key: trainer"]),
    ("noise_injection: {sigma_strat: 0.1}", &["noise_injection.sigma_start"]),
    ("noisy_ops: {error_scales: 0.1}", &["noisy_ops.error_scale"]),
    ("group_size: 4", &["group_size: unknown key; nearest known key: rollout.group_size"]),
    ("rollout: {prompts_per_step: 4}", &["nearest known key: data.prompts_per_step"]),
    ("data: {generated: {train_problem: 4}}", &["data.generated.train_problem: ", "data.generated.train_problems"]),
    (
        "noise_injection: {layer_sigma_config: {layer_multiplier: {1: 2}}}",
        &["nearest known key: noise_injection.layer_sigma_config.layer_multipliers"],
    ),
    ("trainer: {noisy_ops: {error_scal: 0.1}}", &["noisy_ops.error_scal: ", "noisy_ops.error_scale"]),
    ("1: x", &["1: unknown key"]),
    // Duplicates.
    ("trainer: {epochs: 1, epochs: 2}", &["x.yaml: ", "duplicate", "epochs", "line 3"]),
    ("seed: 1\nseed: 2", &["duplicate", "seed"]),
    (
        "trainer: {noisy_ops: {enabled: true}}\nnoisy_ops: {enabled: true}",
        &["trainer.noisy_ops: another name of noisy_ops"],
    ),
    (
        "noisy_ops: {exclude_patterns: [], exclude_modules: []}",
        &["noisy_ops.exclude_patterns: another name of noisy_ops.exclude_modules"],
    ),
    ("noise_injection: {layer_sigma_config: {layer_multipliers: {14: 1, \"14\": 2}}}", &["layer 14 is named twice"]),
    // Types.
    ("trainer: {epochs: many}", &["trainer.epochs: found string \"many\", expected a whole number"]),
    ("trainer: {epochs: 1.5}", &["trainer.epochs: found `1.5`, expected a whole number"]),
    ("trainer: {epochs: -1}", &["trainer.epochs: found `-1`"]),
    ("noisy_ops: {enabled: yes}", &["noisy_ops.enabled: found string \"yes\", expected true or false"]),
    ("optimizer: {betas: [0.9]}", &["optimizer.betas: found a list of length 1", "2"]),
    ("optimizer: {lr: fast}", &["optimizer.lr: found string \"fast\", expected a number"]),
    ("data: 3", &["data: found `3`, expected a section with keys kind, train"]),
    ("data:", &["data: found nothing (null), expected a section"]),
    ("reward: {mode: loose}", &["reward.mode: found `loose`, expected one of `strict`, `flexible`, `numeric`"]),
    ("noisy_ops: {phases: [forward, backwards]}", &["noisy_ops.phases: found `backwards`, expected all, or a list"]),
    ("noisy_ops: {layers: 17-14}", &["noisy_ops.layers: found `17-14`"]),
    ("fake_quant: {weights: mxfp5}", &["fake_quant.weights: ", "mxfp5", "nvfp4"]),
    ("fake_quant: {activations: fp4}", &["fake_quant.activations: ", "fp4", "nvfp4"]),
    (
        "fake_quant: {activation_scale: tensor}",
        &["fake_quant.activation_scale: found `tensor`, expected `token` or `static`"],
    ),
    (
        "noise_injection: {layer_sigma_config: {layer_multipliers: {final: 1}}}",
        &["layer_multipliers.final: expected a layer number"],
    ),
    // Ranges, with the reason.
    ("rollout: {group_size: 1}", &["rollout.group_size: found 1, expected 2 or more: an advantage compares"]),
    ("rollout: {temperature: .nan}", &["rollout.temperature: found NaN, expected a number above 0"]),
    (
        "trainer: {minibatch_prompts: 3}",
        &["trainer.minibatch_prompts: found 3, expected a divisor of data.prompts_per_step, which is 128"],
    ),
    ("trainer: {epochs: 0}", &["trainer.epochs: found 0, expected 1 or more"]),
    ("optimizer: {lr: -1}", &["optimizer.lr: found -1"]),
    ("algorithm: {dual_clip: 1.0}", &["algorithm.dual_clip: found 1, expected a number above 1, or null"]),
    ("noisy_ops: {error_scale: 5}", &["noisy_ops.error_scale: found 5, expected a number in [0, 1] (5 % is 0.05)"]),
    ("noise_injection: {sigma_end: 0}", &["noise_injection.sigma_end: found 0", "never reaches 0"]),
    ("noise_injection: {sigma_start: -0.1}", &["noise_injection.sigma_start: found -0.1"]),
    (
        "noise_injection: {num_stages: 1}",
        &["noise_injection.num_stages: found 1, expected 2 or more: the first stage is clean"],
    ),
    ("noise_injection: {stages_per_epoch: 0}", &["noise_injection.stages_per_epoch: found 0"]),
    ("noise_injection: {num_stages: 5, stages_per_epoch: 5}", &["noise_injection.epoch_aware: not set"]),
    (
        "noise_injection: {layer_sigma_config: {layer_multipliers: {14: -1}}}",
        &["layer_multipliers.14: found -1, expected a number, 0 or more"],
    ),
    (
        "data: {train_limit: 100}",
        &["data.train_limit: 100 training rows are fewer than the data.prompts_per_step of 128"],
    ),
    (
        "fake_quant: {enabled: true, activations: mxfp4, activation_scale: static}",
        &["fake_quant.activation_scale: found static with activations in mxfp4, which has no tensor scale"],
    ),
    (
        "fake_quant: {enabled: true, activations: \"fp8:row\", activation_scale: static}",
        &["found static with activations in fp8, which has no tensor scale"],
    ),
    (
        "fake_quant: {activations: \"nvfp4:2d\"}",
        &["fake_quant.activations: found nvfp4:2d, expected a format without 2d"],
    ),
    ("fake_quant: {calibration_prompts: 0}", &["fake_quant.calibration_prompts: found 0, expected 1 or more"]),
    ("name: a/b", &["name"]),
    // Known, not there yet.
    (
        "algorithm: {advantage: gae}",
        &["algorithm.advantage: found `gae`, expected one of `grpo`, `dr_grpo`, `rloo`, `batch_std`"],
    ),
    // Adapters.
    ("model.lora: {rank: 32}", &["model.lora: unknown key"]),
    // Options of the algorithm.
    ("algorithm: {ratio: sentence}", &["algorithm.ratio: found `sentence`, expected `token` or `sequence`"]),
    (
        "algorithm: {truncated_importance: 0}",
        &["algorithm.truncated_importance: found 0, expected a number above 0, or null"],
    ),
    ("algorithm: {entropy_coef: .inf}", &["algorithm.entropy_coef: found inf, expected a finite number"]),
    (
        "algorithm: {dynamic_sampling: true}",
        &["algorithm.dynamic_sampling: found `true`, expected a section with keys max_rounds"],
    ),
    (
        "algorithm: {dynamic_sampling: {rounds: 3}}",
        &["dynamic_sampling.rounds: unknown key; nearest known key: algorithm.dynamic_sampling.max_rounds"],
    ),
    (
        "algorithm: {dynamic_sampling: {max_rounds: 0}}",
        &["algorithm.dynamic_sampling.max_rounds: found 0, expected 1 or more"],
    ),
    (
        "algorithm: {dynamic_sampling: {}}\nnoisy_ops: {enabled: true, dw_draw: per_microbatch}",
        &["algorithm.dynamic_sampling: found with noisy_ops.dw_draw: per_microbatch, expected per_update"],
    ),
    (
        "optimizer: {schedule: step}",
        &["optimizer.schedule: found `step`, expected one of `constant`, `linear`, `cosine`"],
    ),
    (
        "optimizer: {schedule: linear, min_lr_ratio: 2}",
        &["optimizer.min_lr_ratio: found 2, expected a share of lr in [0, 1]"],
    ),
    ("optimizer: {min_lr_ratio: 0.1}", &["optimizer.min_lr_ratio: found 0.1 with schedule: constant"]),
    // Rewards.
    (
        "reward: {kind: command}",
        &[
            "reward.command: found null with kind: command, expected a program and its arguments such as [python3, score.py]",
        ],
    ),
    ("reward: {kind: command, command: []}", &["reward.command: found no program"]),
    ("reward: {kind: command, command: score.py}", &["reward.command: found string \"score.py\", expected a list"]),
    ("reward: {command: [score.py]}", &["reward.command: found a command with another kind, expected kind: command"]),
    ("reward: {timeout_s: 0}", &["reward.timeout_s: found 0, expected a number of seconds above 0"]),
    (
        "reward: {sum: [{kind: numeric, wait: 1}]}",
        &["reward.sum[0].wait: unknown key; nearest known key: reward.sum[].weight"],
    ),
    (
        "reward: {sum: [numeric]}",
        &["reward.sum[0]: found string \"numeric\", expected a part such as {kind: numeric, weight: 1.0}"],
    ),
    ("reward: {sum: [{weight: 0}]}", &["reward.sum[0].weight: found 0, expected a number other than 0"]),
    ("reward: {sum: [{kind: gsm8k}, {kind: command}]}", &["reward.sum[1].command: found null with kind: command"]),
    ("reward: {kind: command, command: [x], sum: [{}]}", &["reward.sum: found with reward.command"]),
    ("reward: {overlong: {buffer_tokens: 2000}}", &["reward.overlong.buffer_tokens: found 2000, expected 1 to 1024"]),
    ("reward: {overlong: {factor: 1}}", &["reward.overlong.buffer_tokens: found 0, expected 1 to 1024"]),
    (
        "reward: {overlong: {buffer_tokens: 9, factor: -1}}",
        &["reward.overlong.factor: found -1, expected a number, 0 or more"],
    ),
    // Stop rules: a list of sections.
    (
        "trainer: {stop_rules: [{metric: loss/entropy, above: 1}]}",
        &["trainer.stop_rules[0].metric: found \"loss/entropy\", which this run does not have"],
    ),
    (
        "trainer: {stop_rules: [entropy]}",
        &["trainer.stop_rules[0]: found string \"entropy\", expected a rule such as {metric: entropy, above: 1.0}"],
    ),
    ("trainer: {stop_rules: entropy}", &["trainer.stop_rules: found string \"entropy\", expected a list"]),
    (
        "trainer: {stop_rules: [{metric: entropy, above: 1}, {metrics: entropy, above: 1}]}",
        &["trainer.stop_rules[1].metrics: unknown key; nearest known key: trainer.stop_rules[].metric"],
    ),
    (
        "trainer: {stop_rules: [{metric: val/acc_clean, below: 60}]}",
        &["trainer.stop_rules[0].below: found 60, expected a share in [0, 1] (60 % is 0.6)"],
    ),
    (
        "trainer: {stop_rules: [{metric: reward/mean, below: 60}]}",
        &["trainer.stop_rules[0].below: found 60, expected a share in [0, 1] (60 % is 0.6)"],
    ),
    (
        "trainer: {microbatch_tokens: 9007199254740993}",
        &["trainer.microbatch_tokens: found 9007199254740993, expected 1 to"],
    ),
    ("sweep: {arms: {}}", &["sweep: not a key of a configuration: a sweep is a file of its own, for `temper sweep`"]),
    (
        "trainer: {stop_rules: [{metric: lr, above: 1, name: any}]}",
        &["trainer.stop_rules[0].name: found \"any\", expected a name of its own"],
    ),
    (
        "trainer: {stop_rules: [{metric: lr, above: 1, name: a}, {metric: lr, below: 0, name: a}]}",
        &["trainer.stop_rules[1].name: found \"a\", expected a name of its own"],
    ),
    ("trainer: {stop_rules: [{metric: lr, abov: 1}]}", &["nearest known key: trainer.stop_rules[].above"]),
    (
        "trainer: {stop_rules: [{metric: lr, above: much}]}",
        &["trainer.stop_rules[0].above: found string \"much\", expected a number"],
    ),
    (
        "trainer: {stop_rules: [{metric: lr, above: 1, after_step: -1}]}",
        &["trainer.stop_rules[0].after_step: found `-1`, expected a whole number"],
    ),
    (
        "trainer: {stop_rules: [{metric: lr, above: 1}, {metric: entrpy, above: 1}]}",
        &["trainer.stop_rules[1].metric: found \"entrpy\"", "nearest metric: entropy"],
    ),
    ("trainer: {stop_rules: [{above: 1}]}", &["trainer.stop_rules[0].metric: found \"\""]),
    (
        "noisy_ops: {enabled: false}\ntrainer: {stop_rules: [{metric: val/acc_noisy, below: 1}]}",
        &["trainer.stop_rules[0].metric: found \"val/acc_noisy\", which this run does not have"],
    ),
    (
        "trainer: {stop_rules: [{metric: lr, above: 1, below: 0}]}",
        &["trainer.stop_rules[0]: found both or none of above and below"],
    ),
    ("trainer: {stop_rules: [{metric: lr}]}", &["trainer.stop_rules[0]: found both or none"]),
    (
        "trainer: {stop_rules: [{metric: lr, above: .nan}]}",
        &["trainer.stop_rules[0].above: found NaN, expected a number"],
    ),
    (
        "trainer: {stop_rules: [{metric: lr, above: 1, patience: 0}]}",
        &["trainer.stop_rules[0].patience: found 0, expected 1 or more"],
    ),
    ("fake_quant: {weights: \"mxfp4:floor,sr\"}", &["fake_quant.weights: ", "expected rceil"]),
    (
        "trainer: {best_metric: val/acc_quantized}",
        &["trainer.best_metric: found \"val/acc_quantized\", expected one of val/acc_clean"],
    ),
    (
        "trainer: {microbatch_tokens: 4096}\nnoisy_ops: {enabled: true, dw_draw: per_microbatch}",
        &["trainer.microbatch_tokens: found 4096", "per_update"],
    ),
    ("rollout: {group_size: 4, max_sequences: 3}", &["rollout.max_sequences: found 3, expected at least"]),
];

#[test]
fn each_bad_input_is_one_clear_line() {
    for (yaml, parts) in TABLE {
        let error = load_text(yaml).expect_err(yaml);
        assert!(!error.contains('\n'), "{yaml}: {error}");
        assert!(error.starts_with("x.yaml: "), "{yaml}: {error}");
        for part in parts {
            assert!(error.contains(part), "{yaml}\n  gave: {error}\n  without: {part}");
        }
    }
}

#[test]
fn an_override_is_held_to_the_same_rules() {
    let file = registry_file("e9b.yaml");
    for (set, part) in [
        ("trainer.epoch=3", "--set trainer.epoch=3: trainer.epoch: unknown key; nearest known key: trainer.epochs"),
        ("trainer.epochs=x", "trainer.epochs: found string \"x\", expected a whole number"),
        ("trainer.epochs", "found no `=`"),
        ("trainer.epochs=", "found no value"),
        ("trainer..epochs=1", "found an empty part"),
        ("rollout.group_size=1", "--set rollout.group_size=1: rollout.group_size: found 1, expected 2 or more"),
        ("noise_injection.sigma_end=0", "noise_injection.sigma_end: found 0"),
        ("noise_injection.layer_sigma_config=nowhere.json", "nowhere.json: no such file"),
        ("trainer.epochs=\"a\nb\"", "trainer.epochs: found string"),
        ("model.lora={rank: 0}", "model.lora.rank: found 0, expected 1 to 65536"),
        ("model.lora={alpha: -1}", "model.lora.alpha: found -1, expected a number above 0"),
        ("model.lora={r: 32}", "model.lora.r: unknown key; nearest known key: model.lora.rank"),
        ("model.lora={targets: []}", "model.lora.targets: found none"),
        ("model.lora={targets: [q_proj, q_proj]}", "model.lora.targets: found q_proj twice"),
        ("model.lora={targets: [lm_head]}", "model.lora.targets: found `lm_head`, expected one of"),
        ("model.lora=32", "model.lora: found `32`, expected a section with keys rank, alpha, targets"),
        ("noisy_ops.adapters=true", "noisy_ops.adapters: found true without model.lora"),
        ("model.preset=qwen3", "model.preset: found \"qwen3\", expected one of"),
    ] {
        let error = config::load(&file, &[set.to_string()]).unwrap_err();
        let text = error.to_string();
        assert_eq!(error.exit_code(), 2);
        assert!(text.contains(part) && !text.contains('\n'), "{set}: {text}");
    }
}

#[test]
fn broken_files_and_extends_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str, text: &str| {
        let error = config::load(&write(dir.path(), name, text), &[]).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let text = error.to_string();
        assert!(!text.contains('\n'), "{text}");
        text
    };
    assert!(
        config::load(&dir.path().join("none.yaml"), &[]).unwrap_err().to_string().contains("none.yaml: no such file")
    );
    assert!(at("a.yaml", "- 1\n- 2\n").contains("found a list at the top level"));
    assert!(at("b.yaml", "name: [x\n").contains("b.yaml: "));
    assert!(at("c.yaml", "extends: missing.yaml\n").contains("missing.yaml, which does not exist"));
    assert!(at("d.yaml", "extends: [a, b]\n").contains("d.yaml: extends: found a list"));
    write(dir.path(), "e.yaml", "extends: f.yaml\n");
    assert!(at("f.yaml", "extends: e.yaml\n").contains("extends itself"));
    assert!(at("g.yaml", "").contains("name: found \"\""));
    // A mistake in a file that is extended is reported there.
    write(dir.path(), "parent.yaml", "name: p\ntrainer: {epoch: 1}\n");
    assert!(at("child.yaml", "extends: parent.yaml\n").contains("parent.yaml: trainer.epoch: unknown key"));
    write(dir.path(), "parent.yaml", "name: p\nmodel: {preset: qwen2.5-1.5b}\nrollout: {group_size: 1}\n");
    assert!(at("child.yaml", "extends: parent.yaml\n").contains("parent.yaml: rollout.group_size: found 1"));
    // Neither model nor preset.
    assert!(at("h.yaml", "name: h\n").contains("model.path: neither model.path nor model.preset is set"));
    // A multiplier file that is not one.
    write(dir.path(), "m.json", "{\"layer_multipliers\": {\"14\": 1.5,}}");
    let text = "name: i\nmodel: {preset: qwen2.5-1.5b}\nnoise_injection: {layer_sigma_config: m.json}\n";
    assert!(at("i.yaml", text).contains("m.json: "));
    write(dir.path(), "m.json", "{\"layer_multipliers\": {\"14\": 1.5, \"14\": 1.2}}");
    let error = at("i.yaml", text);
    assert!(error.contains("m.json: duplicate") && error.contains("14"), "{error}");
    write(dir.path(), "m.json", "{\"layer_multiplier\": {}}");
    assert!(at("i.yaml", text).contains("nearest known key: noise_injection.layer_sigma_config.layer_multipliers"));
}
