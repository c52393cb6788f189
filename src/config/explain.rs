//! A resolved configuration key by key, with who set each one; and where two differ.

use serde_json::Value;

use super::Config;
use super::source::Merged;

/// A key that holds a value: no section, but a list of sections is one.
#[derive(Clone, Debug, PartialEq)]
pub struct Leaf {
    /// `optimizer.lr`.
    pub key: String,
    pub value: Value,
    /// The file or `--set` that set it; None: the default.
    pub source: Option<String>,
}

/// Of a configuration, in the order of its structs.
pub(super) fn leaves(config: &Config, merged: &Merged) -> Vec<Leaf> {
    let mut leaves = values(config);
    for leaf in &mut leaves {
        leaf.source = merged.origin.get(&leaf.key).cloned();
    }
    leaves
}

fn values(config: &Config) -> Vec<Leaf> {
    let mut leaves = Vec::new();
    collect("", serde_json::to_value(config).unwrap_or_default(), &mut leaves);
    leaves
}

fn collect(prefix: &str, value: Value, leaves: &mut Vec<Leaf>) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            map.into_iter().for_each(|(name, value)| collect(&super::keys::join(prefix, &name), value, leaves));
        }
        value => leaves.push(Leaf { key: prefix.to_string(), value, source: None }),
    }
}

/// As YAML that loads to the same configuration; what is not a default says who set it.
pub fn to_yaml(leaves: &[Leaf]) -> String {
    let mut text = String::new();
    let mut open: Vec<&str> = Vec::new();
    for leaf in leaves {
        let parts: Vec<&str> = leaf.key.split('.').collect();
        let Some((name, sections)) = parts.split_last() else { continue };
        let shared = open.iter().zip(sections).take_while(|(a, b)| a == b).count();
        open.truncate(shared);
        for section in &sections[shared..] {
            text += &format!("{}{section}:\n", "  ".repeat(open.len()));
            open.push(section);
        }
        // JSON is YAML.
        text += &format!("{}{name}: {}", "  ".repeat(open.len()), leaf.value);
        text += &leaf
            .source
            .as_ref()
            .map_or("\n".to_string(), |source| format!("  # {}\n", crate::error::one_line(source)));
    }
    text
}

/// A key in which two configurations differ; None where one does not have it (it is in a section that is null there).
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Difference {
    pub key: String,
    pub a: Option<Value>,
    pub b: Option<Value>,
}

/// Where `a` and `b` differ: a's keys in order, then those that only b has.
pub fn differences(a: &Config, b: &Config) -> Vec<Difference> {
    let (a, b) = (values(a), values(b));
    let find = |leaves: &[Leaf], key: &str| leaves.iter().find(|leaf| leaf.key == key).map(|leaf| leaf.value.clone());
    let only_b = b.iter().filter(|leaf| find(&a, &leaf.key).is_none());
    let keys = a.iter().chain(only_b).map(|leaf| leaf.key.clone());
    keys.map(|key| Difference { a: find(&a, &key), b: find(&b, &key), key }).filter(|d| d.a != d.b).collect()
}
