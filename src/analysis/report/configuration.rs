//! How the arms' configurations differ: keys written as `--set` takes them, without those that only name a run.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::Table;
use super::arms::Arm;

/// None where there is one arm.
pub(super) fn differences(arms: &[Arm]) -> Option<Table> {
    if arms.len() < 2 {
        return None;
    }
    let flat: Vec<BTreeMap<String, String>> = arms.iter().map(|arm| flat(&arm.runs[0].files.config)).collect();
    let keys: BTreeSet<&String> = flat.iter().flat_map(|config| config.keys()).collect();
    let mut rows = Vec::new();
    for key in keys.into_iter().filter(|key| !["name", "seed"].contains(&key.as_str())) {
        let values: Vec<&str> = flat.iter().map(|config| config.get(key).map_or("–", String::as_str)).collect();
        if values.iter().any(|value| *value != values[0]) {
            rows.push([key.as_str()].into_iter().chain(values).map(str::to_string).collect());
        }
    }
    let header = ["key"].into_iter().chain(arms.iter().map(|arm| arm.label.as_str())).map(str::to_string).collect();
    Some(Table { header, rows })
}

/// Dotted keys. A list is one value, and so is a map of numbers, such as multipliers by layer.
fn flat(config: &Value) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut open = vec![(String::new(), config)];
    while let Some((path, value)) = open.pop() {
        match value {
            Value::Object(map) if !map.is_empty() && !map.keys().all(|key| key.parse::<i64>().is_ok()) => {
                for (key, value) in map {
                    open.push((if path.is_empty() { key.clone() } else { format!("{path}.{key}") }, value));
                }
            }
            Value::Object(map) => {
                let pairs = map.iter().map(|(key, value)| format!("{key}: {}", text(value)));
                found.insert(path, pairs.collect::<Vec<_>>().join(", "));
            }
            Value::Array(list) => {
                found.insert(path, list.iter().map(text).collect::<Vec<_>>().join(", "));
            }
            value => {
                found.insert(path, text(value));
            }
        }
    }
    found
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn keys_are_dotted_and_maps_of_numbers_stay_together() {
        let config = json!({"a": {"b": 1.5, "layers": {"0": 1.0, "1": 2.0}}, "list": ["x", 2], "none": null});
        let expected = [("a.b", "1.5"), ("a.layers", "0: 1.0, 1: 2.0"), ("list", "x, 2"), ("none", "null")];
        assert_eq!(flat(&config), expected.map(|(k, v)| (k.to_string(), v.to_string())).into());
    }
}
