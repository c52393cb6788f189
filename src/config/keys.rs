//! Keys and types: every key must be one of ours, every value must have its key's type.
//!
//! The known keys are those of the default configuration written out, so they cannot drift from the
//! structs. A leaf's type is checked by reading a configuration in which only that leaf is set: the
//! error is then about that key alone.

use serde_yaml::{Mapping, Number, Value};

use super::Config;
use super::source::Merged;
use crate::error::one_line;
use crate::inject::section::LayerSigmaConfig;
use crate::model::section::LoraSection;
use crate::rl::section::{DynamicSampling, Overlong, RewardPart};
use crate::rl::stop_rules::StopRule;
use crate::{Result, bail_input, input_error};

pub(super) const LAYER_SIGMA_CONFIG: &str = "noise_injection.layer_sigma_config";
const LAYER_MULTIPLIERS: &str = "noise_injection.layer_sigma_config.layer_multipliers";
/// Lists of sections, with an example of an item; the keys of item 0 are `trainer.stop_rules[0].metric` and so on.
const LISTS: [(&str, &str); 2] = [
    ("trainer.stop_rules", "a rule such as {metric: entropy, above: 1.0}"),
    ("reward.sum", "a part such as {kind: numeric, weight: 1.0}"),
];
/// Sections that may be null.
const OPTIONAL: [&str; 4] = [LAYER_SIGMA_CONFIG, "algorithm.dynamic_sampling", "reward.overlong", "model.lora"];

/// Checks one source; returns it with numbers that YAML read as text (`5e-7`) as numbers.
pub(super) fn check(tree: Mapping, label: &str) -> Result<Mapping> {
    let known = known();
    check_map("", tree, &known, label)
}

/// The merged tree as structs.
pub(super) fn typed(merged: &Merged) -> Result<Config> {
    serde_yaml::from_value(Value::Mapping(merged.tree.clone()))
        .map_err(|e| input_error!("{}: {}", merged.file, explain(&e.to_string())))
}

/// Every key with its default; sections are maps. Those that are null by default are written out so that their keys are
/// known as well.
fn known() -> Mapping {
    let mut known = keys_of(Config::default());
    for (path, section) in OPTIONAL.into_iter().zip([
        keys_of(LayerSigmaConfig::default()),
        keys_of(DynamicSampling::default()),
        keys_of(Overlong::default()),
        keys_of(LoraSection::default()),
    ]) {
        if let Some((parent, name)) = path.split_once('.')
            && let Some(Value::Mapping(parent)) = known.get_mut(parent)
        {
            parent.insert(name.into(), Value::Mapping(section));
        }
    }
    known
}

/// The keys of an item of a list of sections.
fn item_of(list: &str) -> Mapping {
    if list == "reward.sum" { keys_of(RewardPart::default()) } else { keys_of(StopRule::default()) }
}

fn keys_of(section: impl serde::Serialize) -> Mapping {
    match serde_yaml::to_value(section) {
        Ok(Value::Mapping(map)) => map,
        _ => Mapping::new(),
    }
}

fn check_map(prefix: &str, tree: Mapping, known: &Mapping, label: &str) -> Result<Mapping> {
    let mut checked = Mapping::new();
    for (key, value) in tree {
        let name = text(&key);
        let path = join(prefix, &name);
        let Some(default) = known.get(Value::String(name.clone())).filter(|_| key.is_string()) else {
            if path == "sweep" {
                bail_input!(
                    "{label}: {path}: not a key of a configuration: a sweep is a file of its own, for `temper sweep`"
                );
            }
            bail_input!("{label}: {path}: unknown key; nearest known key: {}", nearest(prefix, &name));
        };
        let value = match (default, value) {
            (Value::Mapping(_), value) if path == LAYER_MULTIPLIERS => check_leaf(&path, value, label)?,
            (Value::Mapping(_), Value::Null) if OPTIONAL.contains(&path.as_str()) => Value::Null,
            (Value::Mapping(inner), Value::Mapping(value)) => Value::Mapping(check_map(&path, value, inner, label)?),
            (Value::Mapping(inner), other) => {
                let names: Vec<String> = inner.keys().map(text).collect();
                bail_input!(
                    "{label}: {path}: found {}, expected a section with keys {}",
                    describe(&other),
                    names.join(", ")
                )
            }
            (_, value) => match (LISTS.iter().find(|(list, _)| *list == path), value) {
                (Some(list), Value::Sequence(items)) => Value::Sequence(check_items(list, items, label)?),
                (_, value) => check_leaf(&path, value, label)?,
            },
        };
        checked.insert(key, value);
    }
    Ok(checked)
}

fn check_items((list, example): &(&str, &str), items: Vec<Value>, label: &str) -> Result<Vec<Value>> {
    let known = item_of(list);
    let one = |(i, item): (usize, Value)| match item {
        Value::Mapping(item) => Ok(Value::Mapping(check_map(&format!("{list}[{i}]"), item, &known, label)?)),
        other => bail_input!("{label}: {list}[{i}]: found {}, expected {example}", describe(&other)),
    };
    items.into_iter().enumerate().map(one).collect()
}

fn check_leaf(path: &str, value: Value, label: &str) -> Result<Value> {
    let alone = |value: &Value| {
        let tree = path.rsplit('.').fold(value.clone(), |inner, part| {
            let (name, inner) = match part.split_once('[') {
                Some((list, _)) => (list, Value::Sequence(vec![inner])),
                None => (part, inner),
            };
            Value::Mapping(Mapping::from_iter([(Value::String(name.to_string()), inner)]))
        });
        serde_yaml::from_value::<Config>(tree)
    };
    let Err(error) = alone(&value) else {
        return Ok(value);
    };
    let as_numbers = numbers_from_text(&value);
    if as_numbers != value && alone(&as_numbers).is_ok() {
        return Ok(as_numbers);
    }
    let explained = explain(&error.to_string());
    let explained = explained.strip_prefix(&format!("{path}: ")).unwrap_or(&explained).to_string();
    bail_input!("{label}: {path}: {explained}")
}

/// Text that is a number, alone or in a list, as the number: whether `5e-7` or `1e5` is text
/// depends on the YAML version.
fn numbers_from_text(value: &Value) -> Value {
    match value {
        Value::String(text) if text.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c)) => {
            match text.replace('_', "").parse::<f64>() {
                Ok(number) if number.is_finite() => Value::Number(Number::from(number)),
                _ => value.clone(),
            }
        }
        Value::Sequence(items) => Value::Sequence(items.iter().map(numbers_from_text).collect()),
        Value::Mapping(map) => Value::Mapping(map.iter().map(|(k, v)| (k.clone(), numbers_from_text(v))).collect()),
        other => other.clone(),
    }
}

/// The nearest known key: among the neighbours if one is close, else anywhere.
fn nearest(prefix: &str, name: &str) -> String {
    let mut paths = Vec::new();
    collect_paths("", &known(), &mut paths);
    let inside = LISTS.iter().find(|(list, _)| prefix.starts_with(list)).map(|(list, _)| format!("{list}[]"));
    let prefix = inside.as_deref().unwrap_or(prefix);
    for (list, _) in LISTS {
        collect_paths(&format!("{list}[]"), &item_of(list), &mut paths);
    }
    paths.extend(
        ["extends", "noise_injection.exclude_patterns", "noisy_ops.exclude_patterns", "fake_quant.exclude_patterns"]
            .map(String::from),
    );
    let full = join(prefix, name);
    let score = |path: &String| {
        let (parent, last) = path.rsplit_once('.').unwrap_or(("", path));
        let same = strsim::normalized_damerau_levenshtein(&name.to_lowercase(), last);
        let whole = strsim::normalized_damerau_levenshtein(&full.to_lowercase(), path);
        same + 0.25 * whole + if parent == prefix { 0.2 } else { 0.0 }
    };
    let best = paths.iter().max_by(|a, b| score(a).total_cmp(&score(b)));
    best.cloned().unwrap_or_default()
}

fn collect_paths(prefix: &str, map: &Mapping, paths: &mut Vec<String>) {
    for (key, value) in map {
        let path = join(prefix, &text(key));
        if let Value::Mapping(inner) = value {
            collect_paths(&path, inner, paths);
        }
        paths.push(path);
    }
}

/// serde's message in the words of this tool: found what, expected what.
fn explain(message: &str) -> String {
    let mut out = one_line(message);
    for (serde, ours) in [
        ("invalid type: ", "found "),
        ("invalid value: ", "found "),
        ("invalid length ", "found a list of length "),
        ("unknown variant ", "found "),
    ] {
        if let Some(at) = out.find(serde) {
            out = format!("{ours}{}", &out[at + serde.len()..]);
        }
    }
    for (serde, ours) in [
        ("floating point `", "`"),
        ("integer `", "`"),
        ("expected usize", "expected a whole number, 0 or more"),
        ("expected u64", "expected a whole number, 0 or more"),
        ("expected f64", "expected a number"),
        ("expected a boolean", "expected true or false"),
        ("expected an array", "expected a list"),
        ("expected a sequence", "expected a list"),
        ("unit value", "nothing (null)"),
    ] {
        out = out.replace(serde, ours);
    }
    out
}

/// A value in a few words, for "found ...".
pub(super) fn describe(value: &Value) -> String {
    match value {
        Value::Null => "nothing (null)".to_string(),
        Value::Bool(b) => format!("`{b}`"),
        Value::Number(n) => format!("`{n}`"),
        Value::String(s) => format!("string \"{s}\""),
        Value::Sequence(_) => "a list".to_string(),
        Value::Mapping(_) => "a map".to_string(),
        Value::Tagged(t) => format!("a value tagged {}", t.tag),
    }
}

pub(super) fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_string() } else { format!("{prefix}.{name}") }
}

/// A key as text; keys that are not text are never ours, but are shown in errors.
pub(super) fn text(key: &Value) -> String {
    match key {
        Value::String(s) => s.clone(),
        Value::Number(n) => n.to_string(),
        other => describe(other),
    }
}
