//! From files and `--set` to one YAML tree: `extends`, aliases, deep merge, and who set each key.
//!
//! Each source is checked on its own (keys.rs) before it is merged, so that an error names the file
//! in which the wrong key stands. Maps merge key by key and everything else is replaced by the later
//! source; a `layer_sigma_config` of a file replaces the one it extends as a whole, since multipliers
//! of two experiments mixed together are neither of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_yaml::{Mapping, Value};

use super::keys;
use crate::error::one_line;
use crate::inject::multipliers;
use crate::{Error, Result, bail_input, input_error};

/// The merged tree, and for each key the source that set it.
pub(super) struct Merged {
    pub tree: Mapping,
    pub origin: BTreeMap<String, String>,
    /// The file the user named.
    pub file: String,
}

pub(super) fn merge(path: &Path, overrides: &[String]) -> Result<Merged> {
    let mut merged = Merged { tree: Mapping::new(), origin: BTreeMap::new(), file: path.display().to_string() };
    add_file(path, &mut Vec::new(), &mut merged)?;
    for text in overrides {
        let tree = override_tree(text)?;
        merged.overlay(tree, &format!("--set {text}"), true);
    }
    Ok(merged)
}

impl Merged {
    /// Puts `tree` on top. `into_multipliers`: edit a layer_sigma_config key by key.
    fn overlay(&mut self, tree: Mapping, label: &str, into_multipliers: bool) {
        record("", &tree, label, &mut self.origin);
        overlay("", &mut self.tree, tree, into_multipliers);
    }

    /// The source to name for `key`: what set it, or else the file the user named.
    pub(super) fn source_of(&self, key: &str) -> &str {
        // A list has one source, whichever of its items is meant.
        let key = key.split('[').next().unwrap_or(key);
        let inside = format!("{key}.");
        let found = self.origin.get(key).or_else(|| {
            self.origin.range(inside.clone()..).next().filter(|(k, _)| k.starts_with(&inside)).map(|(_, label)| label)
        });
        found.unwrap_or(&self.file)
    }
}

fn record(prefix: &str, tree: &Mapping, label: &str, origin: &mut BTreeMap<String, String>) {
    for (key, value) in tree {
        let path = keys::join(prefix, &keys::text(key));
        match value {
            Value::Mapping(inner) if !inner.is_empty() => record(&path, inner, label, origin),
            _ => {
                origin.insert(path, label.to_string());
            }
        }
    }
}

fn overlay(prefix: &str, base: &mut Mapping, top: Mapping, into_multipliers: bool) {
    for (key, value) in top {
        let path = keys::join(prefix, &keys::text(&key));
        let whole = path == keys::LAYER_SIGMA_CONFIG && !into_multipliers;
        match (base.get_mut(&key), value) {
            (Some(Value::Mapping(old)), Value::Mapping(new)) if !whole => overlay(&path, old, new, into_multipliers),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

fn add_file(path: &Path, open: &mut Vec<PathBuf>, merged: &mut Merged) -> Result<()> {
    let label = path.display().to_string();
    let real = std::fs::canonicalize(path).map_err(|e| Error::io(path, e))?;
    if open.contains(&real) {
        bail_input!("{label}: extends: this file extends itself through {} file(s)", open.len());
    }
    let mut tree = read_yaml(path)?;
    let folder = path.parent().unwrap_or(Path::new(""));
    match tree.remove("extends") {
        None => {}
        Some(Value::String(parent)) => {
            let parent = folder.join(parent);
            if !parent.exists() {
                bail_input!(
                    "{label}: extends: found {}, which does not exist, expected a path relative to this file",
                    parent.display()
                );
            }
            open.push(real);
            add_file(&parent, open, merged)?;
            open.pop();
        }
        Some(other) => {
            bail_input!("{label}: extends: found {}, expected the path of one YAML file", keys::describe(&other))
        }
    }
    let tree = prepare(tree, &label, folder)?;
    merged.overlay(tree, &label, false);
    Ok(())
}

/// A YAML file whose top level is a map.
fn read_yaml(path: &Path) -> Result<Mapping> {
    let label = path.display();
    if path.is_dir() {
        bail_input!("{label}: found a directory, expected a YAML file");
    }
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let text = String::from_utf8(bytes)
        .map_err(|_| input_error!("{label}: found bytes that are not UTF-8, expected YAML text"))?;
    let mut value: Value = serde_yaml::from_str(&text).map_err(|e| input_error!("{label}: {}", one_line(e)))?;
    value.apply_merge().map_err(|e| input_error!("{label}: {}", one_line(e)))?;
    match value {
        Value::Mapping(tree) => Ok(tree),
        Value::Null => Ok(Mapping::new()),
        other => bail_input!(
            "{label}: found {} at the top level, expected sections (model:, data:, ...)",
            keys::describe(&other)
        ),
    }
}

/// Aliases renamed, the multiplier file read in, keys and types checked.
fn prepare(mut tree: Mapping, label: &str, folder: &Path) -> Result<Mapping> {
    rename_aliases(&mut tree, label)?;
    inline_multipliers(&mut tree, label, folder)?;
    keys::check(tree, label)
}

/// Names of the original experiments that stand for keys of ours.
fn rename_aliases(tree: &mut Mapping, label: &str) -> Result<()> {
    for section in ["noise_injection", "noisy_ops"] {
        let Some(Value::Mapping(trainer)) = tree.get_mut("trainer") else {
            break;
        };
        let Some(value) = trainer.remove(section) else {
            continue;
        };
        if tree.contains_key(section) {
            bail_input!("{label}: trainer.{section}: another name of {section}, which is set too; keep one");
        }
        tree.insert(section.into(), value);
    }
    for section in ["noise_injection", "noisy_ops", "fake_quant"] {
        let Some(Value::Mapping(inner)) = tree.get_mut(section) else {
            continue;
        };
        let Some(value) = inner.remove("exclude_patterns") else {
            continue;
        };
        if inner.contains_key("exclude_modules") {
            bail_input!(
                "{label}: {section}.exclude_patterns: another name of {section}.exclude_modules, which is set too; keep one"
            );
        }
        inner.insert("exclude_modules".into(), value);
    }
    Ok(())
}

/// `layer_sigma_config: path` becomes the file's content; comments (`_...`) go, layer keys become numbers.
fn inline_multipliers(tree: &mut Mapping, label: &str, folder: &Path) -> Result<()> {
    let Some(Value::Mapping(section)) = tree.get_mut("noise_injection") else {
        return Ok(());
    };
    let Some(value) = section.get_mut("layer_sigma_config") else {
        return Ok(());
    };
    let key = keys::LAYER_SIGMA_CONFIG;
    let (content, place) = match value {
        Value::Null => return Ok(()),
        Value::String(path) => {
            let path = folder.join(path);
            let content = multipliers::read_file(&path).map_err(|e| e.at(format!("{label}: {key}")))?;
            (content, format!("{label}: {key}: {}", path.display()))
        }
        Value::Mapping(inline) => (std::mem::take(inline), format!("{label}: {key}")),
        other => bail_input!(
            "{label}: {key}: found {}, expected multipliers or the path of a JSON or YAML file",
            keys::describe(other)
        ),
    };
    *value = Value::Mapping(multipliers::normalize(content).map_err(|e| e.at(place))?);
    Ok(())
}

/// `a.b=v` as a checked tree. v is YAML; where the key wants text, v is taken as it stands.
fn override_tree(text: &str) -> Result<Mapping> {
    let Some((path, raw)) = text.split_once('=') else {
        bail_input!("--set {text}: found no `=`, expected key.path=value");
    };
    let (path, raw) = (path.trim(), raw.trim());
    let label = format!("--set {text}");
    if path.split('.').any(str::is_empty) {
        bail_input!("{label}: found an empty part in `{path}`, expected key.path=value");
    }
    if raw.is_empty() {
        bail_input!("{label}: found no value, expected one (null, or '' for an empty text)");
    }
    let nested = |value: Value| {
        path.rsplit('.')
            .fold(value, |inner, part| Value::Mapping(Mapping::from_iter([(Value::String(part.to_string()), inner)])))
    };
    let tree = |value: Value| match nested(value) {
        Value::Mapping(tree) => prepare(tree, &label, Path::new("")),
        _ => Ok(Mapping::new()),
    };
    let parsed = serde_yaml::from_str::<Value>(raw).map_err(|e| input_error!("{label}: {}", one_line(e)));
    let as_yaml = parsed.and_then(tree);
    as_yaml.or_else(|error| tree(Value::String(raw.to_string())).map_err(|_| error))
}
