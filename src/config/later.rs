//! Keys and values of the documents that this version does not have yet: a clear word instead of
//! "unknown".

use serde_yaml::Value;

/// For a key that will exist.
pub(super) fn key(path: &str) -> Option<&'static str> {
    const KEYS: [&str; 6] = [
        "model.lora",
        "rollout.dynamic_sampling",
        "algorithm.overlong_penalty",
        "algorithm.importance_cap",
        "reward.command",
        "sweep",
    ];
    KEYS.contains(&path).then_some("known, but not available yet in this version")
}

/// For a value that its key will accept.
pub(super) fn value(path: &str, value: &Value) -> Option<String> {
    let values: &[&str] = match path {
        "reward.kind" => &["command"],
        "algorithm.advantage" => &["dr_grpo", "leave_one_out", "rloo", "batch_std", "dapo", "gspo"],
        _ => return None,
    };
    let found = value.as_str()?;
    values.contains(&found).then(|| format!("`{found}` is known, but not available yet in this version"))
}
