//! The JSON Schema (draft 2020-12) of a configuration file, for editors: made from the sections' structs, so that keys,
//! types, defaults and descriptions cannot drift from them.
//!
//! A file may hold less than the structs and a little more: `extends`, a path in place of multipliers, other names of some
//! keys. Ranges and combinations are beyond it: `temper plan` checks those.

use schemars::schema_for;
use serde_json::{Map, Value, json};

use super::Config;

/// The schema, keys in the order of the structs.
pub fn json_schema() -> Value {
    let mut schema = schema_for!(Config).to_value();
    schema["title"] = json!("temper configuration");
    if let Some(properties) = properties(&mut schema, None) {
        properties.insert(
            "extends".into(),
            json!({"type": "string", "description": "A file whose keys this one replaces, relative to this one."}),
        );
    }
    for section in ["NoiseInjectionSection", "NoisyOpsSection", "FakeQuantSection"] {
        if let Some(properties) = properties(&mut schema, Some(section))
            && let Some(excluded) = properties.get("exclude_modules").cloned()
        {
            properties.insert("exclude_patterns".into(), excluded);
        }
    }
    if let Some(section) = properties(&mut schema, Some("NoiseInjectionSection"))
        && let Some(Value::Object(multipliers)) = section.get_mut("layer_sigma_config")
        && let Some(Value::Array(forms)) = multipliers.get_mut("anyOf")
    {
        forms.push(json!({"type": "string", "description": "Path of a JSON or YAML file with them."}));
    }
    // Keys that begin with _ are comments; layers are numbers, or numbers in quotes.
    if let Some(Value::Object(multipliers)) = schema.pointer_mut("/$defs/LayerSigmaConfig") {
        multipliers.insert("patternProperties".into(), json!({"^_": {}}));
    }
    if let Some(layers) = properties(&mut schema, Some("LayerSigmaConfig")).and_then(|p| p.get_mut("layer_multipliers"))
    {
        layers["patternProperties"] = json!({"^\\d+$": {"type": "number"}, "^_": {}});
        layers["additionalProperties"] = json!(false);
    }
    schema
}

/// The properties of a definition, or of the whole.
fn properties<'a>(schema: &'a mut Value, definition: Option<&str>) -> Option<&'a mut Map<String, Value>> {
    let place = definition.map_or("/properties".to_string(), |name| format!("/$defs/{name}/properties"));
    schema.pointer_mut(&place)?.as_object_mut()
}
