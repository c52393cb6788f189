//! Keys whose resolved values differ between arms.

use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::{Map, Value};

use super::arms::Arm;

#[derive(Debug, Serialize)]
pub struct KeyDifference {
    /// `section.name`
    pub key: String,
    /// By arm, in their order; null also where an arm has no such key.
    pub values: Map<String, Value>,
}

/// In the order of the keys. Name and seed are what they are meant to be.
pub fn between(arms: &[Arm]) -> Vec<KeyDifference> {
    let flat: Vec<Map<String, Value>> = arms.iter().map(|arm| flattened(&arm.config)).collect();
    let keys: BTreeSet<&String> = flat.iter().flat_map(|map| map.keys()).collect();
    let of = |map: &Map<String, Value>, key: &str| map.get(key).cloned().unwrap_or(Value::Null);
    keys.into_iter()
        .filter(|key| !["name", "seed"].contains(&key.as_str()))
        .filter(|key| flat.iter().any(|map| of(map, key) != of(&flat[0], key)))
        .map(|key| {
            let values = arms.iter().zip(&flat).map(|(arm, map)| (arm.arm.clone(), of(map, key))).collect();
            KeyDifference { key: key.clone(), values }
        })
        .collect()
}

/// `{a: {b: 1}}` -> `a.b: 1`. A map by layer numbers is one value.
fn flattened(config: &Value) -> Map<String, Value> {
    let (mut flat, mut open) = (Map::new(), vec![(String::new(), config)]);
    while let Some((prefix, value)) = open.pop() {
        match value.as_object().filter(|map| map.keys().any(|key| key.parse::<u64>().is_err())) {
            Some(map) => {
                let dot = if prefix.is_empty() { "" } else { "." };
                open.extend(map.iter().map(|(key, inner)| (format!("{prefix}{dot}{key}"), inner)));
            }
            None => drop(flat.insert(prefix, value.clone())),
        }
    }
    flat
}
