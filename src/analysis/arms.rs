//! Runs as arms: which belong together, what they are called, and the keys in which their configurations differ.

use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::{Map, Value};

use super::run_files::RunFiles;
use crate::{Result, bail_input};

/// Runs of one name and configuration hash: they differ by their seeds.
pub struct Arm<R> {
    /// The runs' name; with the configuration's hash where another arm has the same name.
    pub name: String,
    /// For a picture: without what all arms' names begin with.
    pub label: String,
    /// By seed.
    pub runs: Vec<R>,
}

impl<R: AsRef<RunFiles>> Arm<R> {
    pub fn first(&self) -> &RunFiles {
        self.runs[0].as_ref()
    }

    /// One of its runs.
    pub fn name_of(&self, run: &RunFiles) -> String {
        format!("{} seed {}", self.name, run.seed)
    }

    pub fn files(&self) -> Arm<&RunFiles> {
        let runs = self.runs.iter().map(AsRef::as_ref).collect();
        Arm { name: self.name.clone(), label: self.label.clone(), runs }
    }
}

/// The arms in the order of their first runs.
///
/// # Errors
/// `Error::Input`: two runs of one seed.
pub fn group<R: AsRef<RunFiles>>(runs: impl IntoIterator<Item = R>) -> Result<Vec<Arm<R>>> {
    let mut arms: Vec<Arm<R>> = Vec::new();
    for run in runs {
        let files: &RunFiles = run.as_ref();
        let same = |first: &RunFiles| (&first.name, &first.config_hash) == (&files.name, &files.config_hash);
        match arms.iter_mut().find(|arm| same(arm.first())) {
            Some(arm) => arm.runs.push(run),
            None => arms.push(Arm { name: files.name.clone(), label: String::new(), runs: vec![run] }),
        }
    }
    let names: Vec<String> = arms.iter().map(|arm| arm.name.clone()).collect();
    let shared = shared_beginning(&names);
    for arm in &mut arms {
        arm.runs.sort_by_key(|run| run.as_ref().seed);
        arm.label = arm.name[shared..].to_string();
        let hash = arm.first().config_hash.clone();
        if names.iter().filter(|other| **other == arm.name).count() > 1 {
            arm.label = format!("{} ({hash})", arm.name);
            arm.name = format!("{}-{hash}", arm.name);
        }
        let files: Vec<&RunFiles> = arm.runs.iter().map(AsRef::as_ref).collect();
        if let Some(two) = files.windows(2).find(|two| two[0].seed == two[1].seed) {
            let (one, other, seed) = (two[0].path.display(), two[1].path.display(), two[0].seed);
            bail_input!("{one} and {other}: the same run twice, both are seed {seed} of {}", arm.name);
        }
    }
    Ok(arms)
}

/// Length of the longest beginning that ends in `-` and that every name has, with something behind it.
fn shared_beginning(names: &[String]) -> usize {
    let Some(first) = names.first().filter(|_| names.len() > 1) else { return 0 };
    let mut ends = first.rmatch_indices('-').map(|(at, _)| at + 1);
    let shared = |end: &usize| names.iter().all(|name| name.len() > *end && name.starts_with(&first[..*end]));
    ends.find(shared).unwrap_or(0)
}

#[derive(Debug, Serialize)]
pub struct KeyDifference {
    /// `section.name`
    pub key: String,
    /// By arm, in their order; null also where an arm has no such key.
    pub values: Map<String, Value>,
}

/// Keys whose resolved values differ, in the order of the keys. Name and seed are what they are meant to be.
pub fn config_differences(arms: &[Arm<&RunFiles>]) -> Vec<KeyDifference> {
    let flat: Vec<Map<String, Value>> = arms.iter().map(|arm| flattened(&arm.first().config)).collect();
    let keys: BTreeSet<&String> = flat.iter().flat_map(|map| map.keys()).collect();
    let of = |map: &Map<String, Value>, key: &str| map.get(key).cloned().unwrap_or(Value::Null);
    keys.into_iter()
        .filter(|key| !["name", "seed"].contains(&key.as_str()))
        .filter(|key| flat.iter().any(|map| of(map, key) != of(&flat[0], key)))
        .map(|key| {
            let values = arms.iter().zip(&flat).map(|(arm, map)| (arm.name.clone(), of(map, key))).collect();
            KeyDifference { key: key.clone(), values }
        })
        .collect()
}

/// `{a: {b: 1}}` -> `a.b: 1`. A list is one value, and so is a map of numbers, such as multipliers by layer.
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

/// A value as people write it: text without quotes.
pub fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn arms_of_a_sweep_lose_the_sweeps_name() {
        let names = |names: &[&str]| names.iter().map(|n| n.to_string()).collect::<Vec<_>>();
        assert_eq!(shared_beginning(&names(&["s-none", "s-global"])), 2);
        assert_eq!(shared_beginning(&names(&["s-a-x", "s-a-y"])), 4);
        assert_eq!(shared_beginning(&names(&["s-", "s-y"])), 0);
        assert_eq!(shared_beginning(&names(&["e5c", "e5d"])), 0);
        assert_eq!(shared_beginning(&names(&["s-none"])), 0);
    }

    #[test]
    fn keys_are_dotted_and_maps_of_numbers_stay_together() {
        let config = json!({"a": {"b": 1.5, "layers": {"0": 1.0, "1": 2.0}}, "list": ["x", 2], "none": null});
        let expected = json!({"a.b": 1.5, "a.layers": {"0": 1.0, "1": 2.0}, "list": ["x", 2], "none": null});
        assert_eq!(Value::Object(flattened(&config)), expected);
    }
}
