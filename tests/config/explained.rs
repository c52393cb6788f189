//! `temper config`: the schema holds of every file and of no wrong one, `show` loads again, `diff` finds what differs.

use std::process::Command;

use serde_json::Value;
use temper::config;
use temper::config::schema::json_schema;

use super::{registry_file, write};

fn temper(args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_temper")).args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Whether `value` fits `schema`: the part of JSON Schema that ours uses, and a panic at any other word.
fn fits(schema: &Value, value: &Value, root: &Value) -> bool {
    let Value::Object(rules) = schema else { return schema != &Value::Bool(false) };
    rules.iter().all(|(word, rule)| match word.as_str() {
        "$schema" | "$defs" | "title" | "description" | "default" | "format" => true,
        "$ref" => fits(root.pointer(rule.as_str().unwrap().trim_start_matches('#')).unwrap(), value, root),
        "anyOf" => rule.as_array().unwrap().iter().any(|one| fits(one, value, root)),
        "oneOf" => rule.as_array().unwrap().iter().filter(|one| fits(one, value, root)).count() == 1,
        "const" => rule == value,
        "enum" => rule.as_array().unwrap().contains(value),
        "type" => match rule {
            Value::Array(names) => names.iter().any(|name| is_a(name, value)),
            name => is_a(name, value),
        },
        "minimum" => value.as_f64().is_none_or(|v| v >= rule.as_f64().unwrap()),
        "minItems" => value.as_array().is_none_or(|v| v.len() >= rule.as_u64().unwrap() as usize),
        "maxItems" => value.as_array().is_none_or(|v| v.len() <= rule.as_u64().unwrap() as usize),
        "items" => value.as_array().is_none_or(|v| v.iter().all(|item| fits(rule, item, root))),
        "properties" | "patternProperties" | "additionalProperties" => value.as_object().is_none_or(|map| {
            map.iter().all(|(key, value)| {
                let named = rules.get("properties").and_then(|p| p.get(key));
                let pattern = rules.get("patternProperties").and_then(Value::as_object);
                let matching =
                    pattern.and_then(|p| p.iter().find(|(p, _)| regex::Regex::new(p).unwrap().is_match(key)));
                let rule = named.or(matching.map(|(_, rule)| rule)).or(rules.get("additionalProperties"));
                rule.is_none_or(|rule| fits(rule, value, root))
            })
        }),
        other => panic!("a word that this test does not know: {other}"),
    })
}

fn is_a(name: &Value, value: &Value) -> bool {
    match name.as_str().unwrap() {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_u64() || value.is_i64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("{other}"),
    }
}

fn fits_file(text: &str) -> bool {
    let schema = json_schema();
    let value: serde_yaml::Value = serde_yaml::from_str(text).unwrap();
    fits(&schema, &serde_json::to_value(value).unwrap(), &schema)
}

#[test]
fn the_schema_holds_of_every_file_and_of_what_it_resolves_to() {
    let mut seen = 0;
    for entry in std::fs::read_dir(registry_file("")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "yaml") {
            assert!(fits_file(&std::fs::read_to_string(&path).unwrap()), "{}", path.display());
            assert!(fits_file(&config::load(&path, &[]).unwrap().to_yaml()), "{}, resolved", path.display());
            seen += 1;
        }
    }
    assert!(seen > 25);
    for text in [
        "noisy_ops: {phases: [rollout, forward], layers: 14-17, exclude_patterns: [lm_head]}",
        "noise_injection: {layer_sigma_config: {_why: x, layer_multipliers: {'14': 1.5, _note: y}}}",
        "noise_injection: {layer_sigma_config: layers.json, compat: original}",
        "reward: {sum: [{kind: command, command: [python3, x.py], weight: 0.5}, {}], overlong: {buffer_tokens: 8}}",
        "algorithm: {dynamic_sampling: {max_rounds: 2}, truncated_importance: 2, ratio: sequence}",
        "trainer: {stop_rules: [{metric: entropy, above: 1}]}",
    ] {
        assert!(fits_file(text), "{text}");
    }
}

#[test]
fn the_schema_refuses_what_the_program_refuses() {
    for text in [
        "trainer: {epoch: 3}",
        "trainr: {epochs: 3}",
        "trainer: {epochs: many}",
        "trainer: {epochs: -1}",
        "noisy_ops: {enabled: maybe}",
        "noisy_ops: {phases: [backwards]}",
        "optimizer: {betas: [0.9]}",
        "optimizer: {schedule: step}",
        "algorithm: {advantage: gae}",
        "algorithm: {dynamic_sampling: true}",
        "reward: {sum: [{wait: 1}]}",
        "reward: {command: score.py}",
        "trainer: {stop_rules: [{metrics: entropy}]}",
        "noise_injection: {layer_sigma_config: {layer_multiplier: {1: 2}}}",
        "data: 3",
    ] {
        assert!(!fits_file(text), "{text}");
        assert!(super::load_text(text).is_err(), "{text}");
    }
}

/// A description and a default at every key that has them in the structs, from the structs.
#[test]
fn the_schema_says_what_keys_mean() {
    let schema: Value = serde_json::from_str(&temper(&["config", "schema"])).unwrap();
    assert_eq!(schema, json_schema());
    let lr = &schema["$defs"]["OptimizerSection"]["properties"]["grad_clip"];
    assert_eq!(lr["description"], "Largest global gradient norm; null = no clipping.");
    assert_eq!(lr["default"], 1.0);
    assert_eq!(schema["$defs"]["Advantage"]["oneOf"].as_array().unwrap().len(), 4);
}

#[test]
fn what_is_shown_loads_again_and_names_its_sources() {
    let dir = tempfile::tempdir().unwrap();
    for (name, set) in [("e9b", "optimizer.lr=1e-6"), ("1a", "seed=3"), ("dapo", "reward.sum=[{kind: numeric}]")] {
        let file = registry_file(&format!("{name}.yaml"));
        let shown = temper(&["config", "show", file.to_str().unwrap(), "--set", set]);
        let expected = config::load(&file, &[set.to_string()]).unwrap();
        assert_eq!(config::load(&write(dir.path(), "shown.yaml", &shown), &[]).unwrap(), expected, "{shown}");
        assert_eq!(shown.matches("  # --set").count(), 1, "{shown}");
    }
    let file = registry_file("e9b.yaml");
    let shown = temper(&["config", "show", file.to_str().unwrap()]);
    let line = |key: &str| shown.lines().find(|l| l.trim_start().starts_with(key)).unwrap_or_else(|| panic!("{shown}"));
    assert!(line("name: \"e9b\"").ends_with("configs/e9b.yaml"));
    assert!(line("error_scale: 0.05").ends_with("configs/e5.yaml"));
    assert!(line("group_size: 5").ends_with("configs/e5_family.yaml"));
    assert!(!line("eps: ").contains('#'), "a default");
    let json: Value = serde_json::from_str(&temper(&["config", "show", file.to_str().unwrap(), "--json"])).unwrap();
    assert_eq!(json["config_hash"], "1f12fbac");
    assert_eq!(json["keys"]["optimizer.eps"], serde_json::json!({"value": 1e-8, "source": null}));
}

#[test]
fn differences_are_the_keys_that_differ() {
    let path = |name: &str| registry_file(name).display().to_string();
    let args =
        ["config", "diff", &path("e5.yaml"), &path("e9a.yaml"), "--json", "--set", "noise_injection.enabled=false"];
    let json: Value = serde_json::from_str(&temper(&args)).unwrap();
    let keys: Vec<&str> = json["differences"].as_array().unwrap().iter().map(|d| d["key"].as_str().unwrap()).collect();
    let multipliers = "noise_injection.layer_sigma_config";
    assert_eq!(keys[..4], ["name", "noise_injection.epoch_aware", "noise_injection.stages_per_epoch", multipliers]);
    assert!(keys[4..].iter().all(|key| key.starts_with(multipliers)), "{keys:?}");
    assert_eq!(json["config_hashes"][0], json["config_hashes"][1], "AQN is off in both: one experiment");
    let text = temper(&["config", "diff", &path("e5.yaml"), &path("dapo.yaml")]);
    assert!(text.lines().any(|l| l.split_whitespace().eq(["algorithm.clip_high", "0.2", "0.28"])), "{text}");
    assert!(text.lines().any(|l| l.split_whitespace().eq(["reward.overlong.factor", "-", "1.0"])), "{text}");
    let none = temper(&["config", "diff", &path("e5.yaml"), &path("e5.yaml")]);
    assert_eq!(none.trim(), "no difference (15131d8c)");
}
