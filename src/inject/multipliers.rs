//! Layer multipliers m_l of AQN: `{enabled?, base_sigma?, default_multiplier, layer_multipliers}`,
//! inline or in a JSON or YAML file. Layer keys are strings or numbers; keys that begin with `_`
//! are comments.

use std::path::Path;

use serde_yaml::{Mapping, Value};

use super::section::{Compat, LayerSigmaConfig, NoiseInjectionSection};
use crate::error::one_line;
use crate::{Error, Result, bail_input, input_error};

/// The map in a multiplier file. Errors: missing file, not JSON/YAML, duplicate keys, not a map.
pub fn read_file(path: &Path) -> Result<Mapping> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let wrong = |message: String| input_error!("{shown}: {}", one_line(message));
    let value: Value = if path.extension().is_some_and(|e| e == "json") {
        serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?
    } else {
        serde_yaml::from_str(&text).map_err(|e| wrong(e.to_string()))?
    };
    match value {
        Value::Mapping(map) => Ok(map),
        _ => bail_input!("{shown}: expected a map with default_multiplier and layer_multipliers"),
    }
}

/// Drops comments and turns layer keys into numbers. Errors: a layer key that is no layer number,
/// or one layer named twice ("14" and 14).
pub fn normalize(map: Mapping) -> Result<Mapping> {
    let comment = |key: &Value| key.as_str().is_some_and(|k| k.starts_with('_'));
    let mut out = Mapping::new();
    for (key, value) in map.into_iter().filter(|(key, _)| !comment(key)) {
        let value = match value {
            Value::Mapping(layers) if key.as_str() == Some("layer_multipliers") => {
                let mut numbered = Mapping::new();
                for (layer, multiplier) in layers.into_iter().filter(|(key, _)| !comment(key)) {
                    let number = match &layer {
                        Value::Number(n) => n.as_u64(),
                        Value::String(s) => s.trim().parse::<u64>().ok(),
                        _ => None,
                    };
                    let shown = layer.as_str().map_or_else(|| format!("{layer:?}"), str::to_string);
                    let Some(number) = number else {
                        bail_input!("layer_multipliers.{shown}: expected a layer number such as \"14\"");
                    };
                    if numbered.insert(Value::from(number), multiplier).is_some() {
                        bail_input!("layer_multipliers.{number}: layer {number} is named twice");
                    }
                }
                Value::Mapping(numbered)
            }
            other => other,
        };
        out.insert(key, value);
    }
    Ok(out)
}

/// The multipliers in force: none where they are absent, disabled, or ignored by `compat: original`.
pub fn in_force(section: &NoiseInjectionSection) -> Option<&LayerSigmaConfig> {
    let config = section.layer_sigma_config.as_ref()?;
    (config.enabled && section.compat != Some(Compat::Original)).then_some(config)
}

/// m_l of a module of this layer (None: the final norm, the head, the embedding).
pub fn multiplier(section: &NoiseInjectionSection, layer: Option<usize>) -> f64 {
    let Some(config) = in_force(section) else {
        return 1.0;
    };
    layer.and_then(|layer| config.layer_multipliers.get(&layer).copied()).unwrap_or(config.default_multiplier)
}
