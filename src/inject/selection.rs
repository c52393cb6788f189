//! Which phases, layers and modules an injection applies to, as written in YAML:
//! `phases: all | name | [names]`, `layers: all | [14, 15] | "14-17"`, and module name patterns.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Where in a training step a matrix product happens. `forward` and `backward` are the two passes
/// of the policy update; the others are forward passes without gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum InjectPhase {
    Rollout,
    Validation,
    OldLogprobs,
    RefLogprobs,
    Forward,
    Backward,
}

impl InjectPhase {
    pub const ALL: [InjectPhase; 6] = [
        InjectPhase::Rollout,
        InjectPhase::Validation,
        InjectPhase::OldLogprobs,
        InjectPhase::RefLogprobs,
        InjectPhase::Forward,
        InjectPhase::Backward,
    ];
}

/// A set of phases.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PhaseSet(u8);

impl PhaseSet {
    pub const EMPTY: PhaseSet = PhaseSet(0);
    pub const ALL: PhaseSet = PhaseSet(0b11_1111);

    pub fn of(phases: &[InjectPhase]) -> PhaseSet {
        PhaseSet(phases.iter().fold(0, |bits, &phase| bits | 1 << phase as u8))
    }

    pub fn contains(self, phase: InjectPhase) -> bool {
        self.0 & (1 << phase as u8) != 0
    }

    pub fn without(self, phase: InjectPhase) -> PhaseSet {
        PhaseSet(self.0 & !(1 << phase as u8))
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub fn iter(self) -> impl Iterator<Item = InjectPhase> {
        InjectPhase::ALL.into_iter().filter(move |&phase| self.contains(phase))
    }
}

impl fmt::Debug for PhaseSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl<'de> Deserialize<'de> for PhaseSet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<PhaseSet, D::Error> {
        const EXPECTED: &str = "all, or a list of rollout, validation, old_logprobs, ref_logprobs, forward, backward";
        let names = match OneOrMany::deserialize(deserializer) {
            Ok(OneOrMany::One(name)) if name == "all" => return Ok(PhaseSet::ALL),
            Ok(OneOrMany::One(name)) => vec![name],
            Ok(OneOrMany::Many(names)) => names,
            Err(_) => return Err(D::Error::custom(format!("expected {EXPECTED}"))),
        };
        let mut phases = Vec::new();
        for name in names {
            let parsed = serde_json::from_value(serde_json::Value::String(name.clone()));
            phases.push(parsed.map_err(|_| D::Error::custom(format!("found `{name}`, expected {EXPECTED}")))?);
        }
        Ok(PhaseSet::of(&phases))
    }
}

impl Serialize for PhaseSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if *self == PhaseSet::ALL { serializer.serialize_str("all") } else { serializer.collect_seq(self.iter()) }
    }
}

/// all, a phase, or a list of phases.
impl JsonSchema for PhaseSet {
    fn schema_name() -> Cow<'static, str> {
        "PhaseSet".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let phase = generator.subschema_for::<InjectPhase>();
        json_schema!({"anyOf": [{"const": "all"}, phase, {"type": "array", "items": phase}]})
    }
}

/// A set of decoder layers, or all modules whether or not they belong to a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LayerSet {
    All,
    Only(BTreeSet<usize>),
}

impl LayerSet {
    /// Whether a module of this layer (None: embedding, final norm, head) is in the set.
    pub fn contains(&self, layer: Option<usize>) -> bool {
        match self {
            LayerSet::All => true,
            LayerSet::Only(layers) => layer.is_some_and(|layer| layers.contains(&layer)),
        }
    }

    /// The largest layer named, if layers are named.
    pub fn last(&self) -> Option<usize> {
        match self {
            LayerSet::All => None,
            LayerSet::Only(layers) => layers.last().copied(),
        }
    }

    /// Reads "14", "14-17" or "10-13, 18-21" into the set.
    fn parse_into(text: &str, layers: &mut BTreeSet<usize>) -> Result<(), String> {
        for part in text.split(',').map(str::trim) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let number = |t: &str| t.trim().parse::<usize>().ok().filter(|&layer| layer < 100_000);
            match (number(first), number(last)) {
                (Some(first), Some(last)) if first <= last => layers.extend(first..=last),
                _ => return Err(format!("found `{part}`, expected {LAYERS_EXPECTED}")),
            }
        }
        Ok(())
    }
}

const LAYERS_EXPECTED: &str = "all, a list of layer numbers, or a range like \"14-17\"";

#[derive(Deserialize)]
#[serde(untagged)]
enum LayerItem {
    Number(usize),
    Text(String),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum LayerForms {
    One(LayerItem),
    Many(Vec<LayerItem>),
}

impl<'de> Deserialize<'de> for LayerSet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<LayerSet, D::Error> {
        let items = match LayerForms::deserialize(deserializer) {
            Ok(LayerForms::One(LayerItem::Text(text))) if text == "all" => {
                return Ok(LayerSet::All);
            }
            Ok(LayerForms::One(item)) => vec![item],
            Ok(LayerForms::Many(items)) => items,
            Err(_) => return Err(D::Error::custom(format!("expected {LAYERS_EXPECTED}"))),
        };
        let mut layers = BTreeSet::new();
        for item in items {
            match item {
                LayerItem::Number(layer) => {
                    layers.insert(layer);
                }
                LayerItem::Text(text) => LayerSet::parse_into(&text, &mut layers).map_err(D::Error::custom)?,
            }
        }
        Ok(LayerSet::Only(layers))
    }
}

impl Serialize for LayerSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            LayerSet::All => serializer.serialize_str("all"),
            LayerSet::Only(layers) => serializer.collect_seq(layers),
        }
    }
}

/// all, a layer, a range such as "14-17", or a list of them.
impl JsonSchema for LayerSet {
    fn schema_name() -> Cow<'static, str> {
        "LayerSet".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let item = json_schema!({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}]});
        json_schema!({"anyOf": [item, {"type": "array", "items": item}]})
    }
}

/// Whether a module name such as `model.layers.14.mlp.down_proj` matches a pattern: with `*` or `?`
/// a glob over the whole name; otherwise dot-separated parts that match neighbouring components of
/// the name. A part matches a component that contains it (`norm` matches `input_layernorm`), with
/// what follows or precedes a dot anchored there, and numbers match only as a whole (`layers.1` does
/// not match layer 14).
pub fn pattern_matches(pattern: &str, name: &str) -> bool {
    if pattern.contains(['*', '?']) {
        return glob(pattern.as_bytes(), name.as_bytes());
    }
    let parts: Vec<&str> = pattern.split('.').collect();
    let components: Vec<&str> = name.split('.').collect();
    let last = parts.len() - 1;
    components.windows(parts.len()).any(|window| {
        parts.iter().zip(window).enumerate().all(|(i, (part, component))| {
            let number = component.bytes().all(|b| b.is_ascii_digit());
            match (i == 0, i == last) {
                _ if number => part == component,
                (true, true) => component.contains(part),
                (true, false) => component.ends_with(part),
                (false, true) => component.starts_with(part),
                (false, false) => part == component,
            }
        })
    })
}

/// `*` = any run of characters, `?` = one.
fn glob(pattern: &[u8], name: &[u8]) -> bool {
    match pattern.first() {
        None => name.is_empty(),
        Some(b'*') => (0..=name.len()).any(|skip| glob(&pattern[1..], &name[skip..])),
        Some(b'?') => !name.is_empty() && glob(&pattern[1..], &name[1..]),
        Some(c) => name.first() == Some(c) && glob(&pattern[1..], &name[1..]),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn patterns_match_components_and_never_a_longer_number() {
        let down = "model.layers.14.mlp.down_proj";
        for pattern in
            ["mlp", "down_proj", "proj", "layers.14", "mlp.down", "layers.14.mlp", "*.down_proj", "model.layers.1?.*"]
        {
            assert!(pattern_matches(pattern, down), "{pattern}");
        }
        for pattern in ["layers.1", "1", "4", "layers.14.self_attn", "lm_head", "down_proj.weight", "*.1.*", ""] {
            assert!(!pattern_matches(pattern, down) || pattern.is_empty(), "{pattern}");
        }
        assert!(pattern_matches("norm", "model.layers.0.input_layernorm"));
        assert!(pattern_matches("embed_tokens", "model.embed_tokens"));
    }

    #[test]
    fn layers_and_phases_read_every_form() {
        let layers = |text: &str| serde_yaml::from_str::<LayerSet>(text);
        let only = |l: &[usize]| LayerSet::Only(l.iter().copied().collect());
        assert_eq!(layers("all").unwrap(), LayerSet::All);
        assert_eq!(layers("14").unwrap(), only(&[14]));
        assert_eq!(layers("[3, 1]").unwrap(), only(&[1, 3]));
        assert_eq!(layers("\"14-17\"").unwrap(), only(&[14, 15, 16, 17]));
        assert_eq!(layers("14-15,20").unwrap(), only(&[14, 15, 20]));
        assert_eq!(layers("[10-11, 20]").unwrap(), only(&[10, 11, 20]));
        for bad in ["17-14", "x", "[-1]", "{a: 1}", "1.5"] {
            assert!(layers(bad).is_err(), "{bad}");
        }
        let phases = |text: &str| serde_yaml::from_str::<PhaseSet>(text);
        assert_eq!(phases("all").unwrap(), PhaseSet::ALL);
        assert_eq!(phases("rollout").unwrap(), PhaseSet::of(&[InjectPhase::Rollout]));
        assert!(phases("[forward, backwards]").unwrap_err().to_string().contains("backwards"));
        assert_eq!(PhaseSet::of(&InjectPhase::ALL), PhaseSet::ALL);
    }
}
