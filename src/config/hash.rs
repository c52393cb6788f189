//! The config hash: SHA-256 over the keys that identify an experiment, in a fixed order.

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::Config;

/// Keys that change when or where something happens, never what is computed.
const OPERATIONAL: [(&str, &[&str]); 4] = [
    ("", &["name", "seed"]),
    ("rollout", &["max_sequences", "enforce_eager"]),
    (
        "trainer",
        &[
            "threads",
            "gradient_checkpointing",
            "microbatch_tokens",
            "offload_reference",
            "val_every",
            "val_before_train",
            "val_batch_size",
            "save_every",
            "keep_last",
            "keep_best",
            "best_metric",
        ],
    ),
    ("reward", &["timeout_s", "max_restarts"]),
];

/// Keys that hold a location: only the last component identifies the experiment.
const LOCATIONS: [(&str, &[&str]); 2] = [("model", &["path", "tokenizer"]), ("data", &["train", "val"])];

/// Keys that came after the first hashes, where they are not null by default: at their default they are left out, so that a
/// configuration without them keeps its hash.
const ADDED: [(&str, &str, &str); 6] = [
    ("algorithm", "ratio", "\"token\""),
    ("algorithm", "entropy_coef", "0.0"),
    ("optimizer", "schedule", "\"constant\""),
    ("optimizer", "min_lr_ratio", "0.0"),
    ("reward", "sum", "[]"),
    ("noisy_ops", "adapters", "false"),
];

pub(super) fn short(config: &Config) -> String {
    let digest = Sha256::digest(identity(config).to_string().as_bytes());
    digest[..4].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The identifying part as JSON, keys sorted, nulls and `ADDED` defaults left out (so that a new key does not change old
/// hashes), a disabled injection as nothing but disabled.
fn identity(config: &Config) -> Value {
    let mut tree = serde_json::to_value(config).expect("sections hold only strings, finite numbers, lists and maps");
    for (section, names) in OPERATIONAL {
        if let Some(map) = section_of(&mut tree, section) {
            names.iter().for_each(|name| drop(map.remove(*name)));
        }
    }
    // A run that a stop rule ended is the first part of the run without, and goes on in its directory once the rules are
    // others. As the empty list and not left out: hashes from before there were rules stay.
    if let Some(trainer) = section_of(&mut tree, "trainer") {
        trainer.insert("stop_rules".into(), Value::Array(Vec::new()));
    }
    for (section, name, default) in ADDED {
        if let Some(map) = section_of(&mut tree, section)
            && map.get(name).and_then(|value| serde_json::to_string(value).ok()).is_some_and(|text| text == default)
        {
            map.remove(name);
        }
    }
    for (section, names) in LOCATIONS {
        let Some(map) = section_of(&mut tree, section) else {
            continue;
        };
        for name in names {
            if let Some(Value::String(path)) = map.get_mut(*name) {
                *path = path.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_string();
            }
        }
    }
    for section in ["noisy_ops", "noise_injection", "fake_quant"] {
        if let Some(map) = section_of(&mut tree, section).filter(|map| map["enabled"] == Value::Bool(false)) {
            map.retain(|key, _| key == "enabled");
        }
    }
    sorted(tree)
}

fn section_of<'a>(tree: &'a mut Value, section: &str) -> Option<&'a mut Map<String, Value>> {
    if section.is_empty() { tree.as_object_mut() } else { tree.get_mut(section)?.as_object_mut() }
}

fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<(String, Value)> = map.into_iter().filter(|(_, v)| !v.is_null()).collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(entries.into_iter().map(|(k, v)| (k, sorted(v))).collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        other => other,
    }
}
