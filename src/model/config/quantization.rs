//! `quantization_config` of a config.json: which packed weights the directory holds, read and written.
//!
//! Read: compressed-tensors' nvfp4-pack-quantized and mxfp4-pack-quantized; ModelOpt's NVFP4, here or in
//! hf_quant_config.json. Written: compressed-tensors. Everything else is refused with the key that says so: other
//! arithmetic under the same name would be another model. What is said of activations and of the KV cache concerns
//! the machine that serves the model; it does not change the weights and is not simulated here.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::keys::{Keys, read_json};
use crate::numerics::packed::PackedKind;
use crate::{Result, bail_input};

const CONFIG: &str = "config.json";
const MODEL_OPT: &str = "hf_quant_config.json";
pub(crate) const KEY: &str = "quantization_config";

/// How the packed tensors of a directory are named and what they mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedLayout {
    pub kind: PackedKind,
    pub naming: Naming,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// weight_packed, weight_scale, weight_global_scale (G, a multiplier).
    CompressedTensors,
    /// weight (u8), weight_scale, weight_scale_2 (1/G).
    ModelOpt,
}

impl std::fmt::Display for PackedLayout {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let library = match self.naming {
            Naming::CompressedTensors => "compressed-tensors",
            Naming::ModelOpt => "modelopt",
        };
        write!(f, "{library} {}", self.kind.name())
    }
}

impl PackedLayout {
    /// What the model directory says of its weights; None where they are not packed.
    ///
    /// # Errors
    /// `Error::Input` for a kind of quantization that is not read here: file, key, found and expected.
    pub fn of_dir(dir: &Path) -> Result<Option<PackedLayout>> {
        let (config, model_opt) = (dir.join(CONFIG), dir.join(MODEL_OPT));
        if config.exists()
            && let Some(value) = read_json(&config)?.get(KEY).filter(|v| !v.is_null())
        {
            let layout = PackedLayout::from_json(value);
            return layout.map(Some).map_err(|e| e.at(format!("{}: {KEY}", config.display())));
        }
        if !model_opt.exists() {
            return Ok(None);
        }
        let value = read_json(&model_opt)?;
        let layout = match value.get("quantization") {
            Some(quantization) => of_model_opt(quantization).map_err(|e| e.at("quantization")),
            None => Err(crate::input_error!("quantization: missing, expected an object with quant_algo")),
        };
        layout.map(Some).map_err(|e| e.at(model_opt.display()))
    }

    /// Reads the value of `quantization_config`; the caller adds the place to errors.
    pub fn from_json(value: &Value) -> Result<PackedLayout> {
        match text(&Keys::new(value)?, "quant_method")? {
            "compressed-tensors" => of_compressed_tensors(value),
            "modelopt" => of_model_opt(value),
            other => bail_input!("quant_method: found {other:?}, expected \"compressed-tensors\" or \"modelopt\""),
        }
    }
}

/// The `quantization_config` of weights that temper packed. `activations`: W4A4, with the scales of NVFP4's inputs
/// stored beside the weights, and MXFP4's found by whoever runs the model.
pub fn to_json(kind: PackedKind, activations: bool) -> Value {
    let (strategy, scale_dtype, dynamic) = match kind {
        PackedKind::Nvfp4 => ("tensor_group", "torch.float8_e4m3fn", json!("local")),
        PackedKind::Mxfp4 => ("group", "torch.uint8", json!(true)),
    };
    let group = |dynamic: Value| {
        json!({
            "num_bits": 4,
            "type": "float",
            "symmetric": true,
            "strategy": strategy,
            "group_size": kind.block_size(),
            "dynamic": dynamic,
            "scale_dtype": scale_dtype,
        })
    };
    let inputs = if activations { group(dynamic) } else { Value::Null };
    json!({
        "quant_method": "compressed-tensors",
        "format": format_name(kind),
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": null,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": group(json!(false)),
                "input_activations": inputs,
                "output_activations": null,
                "format": format_name(kind),
            },
        },
    })
}

fn format_name(kind: PackedKind) -> &'static str {
    match kind {
        PackedKind::Nvfp4 => "nvfp4-pack-quantized",
        PackedKind::Mxfp4 => "mxfp4-pack-quantized",
    }
}

fn of_compressed_tensors(value: &Value) -> Result<PackedLayout> {
    let keys = Keys::new(value)?;
    let kinds = [PackedKind::Nvfp4, PackedKind::Mxfp4];
    let format = text(&keys, "format")?;
    let Some(kind) = kinds.into_iter().find(|&kind| format_name(kind) == format) else {
        bail_input!("format: found {format:?}, expected {:?} or {:?}", format_name(kinds[0]), format_name(kinds[1]));
    };
    expect(&keys, "quantization_status", &json!("compressed"), true)?;
    // A transform rotates weights and inputs; without it the products are other ones.
    for key in ["transform_config", "sparsity_config"] {
        if let Some(found) = keys.get(key).filter(|v| v.as_object().is_none_or(|map| !map.is_empty())) {
            bail_input!("{key}: found {found}, expected none");
        }
    }
    let groups = object(&keys, "config_groups")?;
    if groups.is_empty() {
        bail_input!("config_groups: found none, expected at least one");
    }
    for (name, group) in groups {
        let place = format!("config_groups.{name}");
        let group = Keys::new(group).map_err(|e| e.at(&place))?;
        expect(&group, "format", &json!(format), true).map_err(|e| e.at(&place))?;
        let place = format!("{place}.weights");
        let weights = match group.get("weights") {
            Some(weights) => Keys::new(weights).map_err(|e| e.at(&place))?,
            None => bail_input!("{place}: missing, expected an object with num_bits and group_size"),
        };
        check_weights(&weights, kind).map_err(|e| e.at(&place))?;
    }
    Ok(PackedLayout { kind, naming: Naming::CompressedTensors })
}

fn check_weights(weights: &Keys, kind: PackedKind) -> Result<()> {
    let strategy = match kind {
        PackedKind::Nvfp4 => "tensor_group",
        PackedKind::Mxfp4 => "group",
    };
    expect(weights, "num_bits", &json!(4), false)?;
    expect(weights, "type", &json!("float"), false)?;
    expect(weights, "group_size", &json!(kind.block_size()), false)?;
    expect(weights, "strategy", &json!(strategy), true)?;
    expect(weights, "symmetric", &json!(true), true)?;
    expect(weights, "dynamic", &json!(false), true)
}

/// `value`: ModelOpt's description, in config.json or under `quantization` in hf_quant_config.json.
fn of_model_opt(value: &Value) -> Result<PackedLayout> {
    let keys = Keys::new(value)?;
    let kind = PackedKind::Nvfp4;
    match text(&keys, "quant_algo")? {
        "NVFP4" | "W4A16_NVFP4" => {}
        other => bail_input!("quant_algo: found {other:?}, expected \"NVFP4\" or \"W4A16_NVFP4\""),
    }
    expect(&keys, "group_size", &json!(kind.block_size()), true)?;
    if keys.get("config_groups").is_some() {
        for (name, group) in object(&keys, "config_groups")? {
            let Some(weights) = group.get("weights").filter(|v| !v.is_null()) else { continue };
            let check = |weights: Keys| {
                expect(&weights, "num_bits", &json!(4), true)?;
                expect(&weights, "group_size", &json!(kind.block_size()), true)
            };
            Keys::new(weights).and_then(check).map_err(|e| e.at(format!("config_groups.{name}.weights")))?;
        }
    }
    Ok(PackedLayout { kind, naming: Naming::ModelOpt })
}

fn text<'a>(keys: &Keys<'a>, key: &str) -> Result<&'a str> {
    match keys.get(key) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => bail_input!("{key}: found {other}, expected a string"),
        None => bail_input!("{key}: missing, expected a string"),
    }
}

fn object<'a>(keys: &Keys<'a>, key: &str) -> Result<&'a Map<String, Value>> {
    match keys.get(key) {
        Some(Value::Object(map)) => Ok(map),
        Some(other) => bail_input!("{key}: found {other}, expected an object"),
        None => bail_input!("{key}: missing, expected an object"),
    }
}

fn expect(keys: &Keys, key: &str, expected: &Value, optional: bool) -> Result<()> {
    match keys.get(key) {
        Some(found) if found == expected => Ok(()),
        Some(found) => bail_input!("{key}: found {found}, expected {expected}"),
        None if optional => Ok(()),
        None => bail_input!("{key}: missing, expected {expected}"),
    }
}
