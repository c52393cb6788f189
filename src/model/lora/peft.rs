//! Adapters on disk as PEFT keeps them: `adapter_config.json` and `adapter_model.safetensors`, whose tensors are named
//! `base_model.model.<module>.lora_A.weight` and `.lora_B.weight`. config.json and the tokenizer lie beside them.
//!
//! What this model does not compute (DoRA, rank-stabilized scale, trained biases, other modules) is refused.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::{Lora, attach};
use crate::model::checkpoint::{Checkpoint, resolve_model_path, write_json, write_model_config};
use crate::model::config::{Keys, read_json};
use crate::model::load::{tensor_of, write_f32};
use crate::model::parameter::Parameter;
use crate::model::qwen2::Qwen2;
use crate::model::section::{Dtype, LoraSection, Projection};
use crate::{Error, Result, bail_input, input_error};

pub const ADAPTER_CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const PREFIX: &str = "base_model.model.";

/// Whether `dir` holds an adapter in place of a model.
pub fn is_adapter(dir: &Path) -> bool {
    dir.join(ADAPTER_CONFIG).exists()
}

/// Writes the adapters of `model`, config.json and the tokenizer files of `tokenizer_dir` into the existing directory `dir`.
/// The matrices are f32, the trained ones to the bit; `dtype` is that of the base.
pub fn save(model: &Qwen2, dtype: Dtype, tokenizer_dir: Option<&Path>, dir: &Path) -> Result<()> {
    let Some(lora) = &model.lora else {
        return Err(Error::Runtime("the model has no adapters".into()));
    };
    let exact = |parameter: &Parameter| -> Result<(String, Tensor)> {
        Ok((format!("{PREFIX}{}", parameter.name), parameter.exact().f_to_kind(Kind::Float)?))
    };
    write_f32(&dir.join(WEIGHTS), &model.adapters().map(exact).collect::<Result<Vec<_>>>()?)?;
    write_json(&dir.join(ADAPTER_CONFIG), &to_json(lora))?;
    let mut config = model.config.clone();
    config.dtype = dtype;
    write_model_config(dir, &config, tokenizer_dir)
}

fn to_json(lora: &Lora) -> Value {
    let LoraSection { rank, alpha, targets } = &lora.section;
    // PEFT declares a whole number, and some readers insist.
    let alpha = if alpha.fract() == 0.0 { json!(*alpha as i64) } else { json!(alpha) };
    json!({
        "base_model_name_or_path": lora.base,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": targets.iter().map(|target| target.name()).collect::<Vec<_>>(),
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": false,
    })
}

/// Where the base of the adapter in `dir` lies on this machine: `given`, or what adapter_config.json names.
pub fn base_of(dir: &Path, given: Option<&str>) -> Result<PathBuf> {
    let path = dir.join(ADAPTER_CONFIG);
    let (place, name) = match given {
        Some(given) => ("--base".to_string(), given.to_string()),
        None => {
            let name = base_name(&read_json(&path)?).map_err(|e| e.at(path.display()))?;
            (format!("{}: base_model_name_or_path", path.display()), name)
        }
    };
    let hint = if given.is_none() { "; name it with --base DIR" } else { "" };
    let base = resolve_model_path(&name).map_err(|e| match e {
        Error::Input(message) => Error::Input(format!("{place}: {message}{hint}")),
        other => other.at(&place),
    })?;
    if is_adapter(&base) {
        bail_input!("{place}: found an adapter ({name}), expected a model");
    }
    Ok(base)
}

/// Puts the adapter in `dir` beside the linears of its base.
pub fn load(model: &mut Qwen2, dir: &Path) -> Result<()> {
    let path = dir.join(ADAPTER_CONFIG);
    let json = read_json(&path)?;
    let weights = Checkpoint::open(&dir.join(WEIGHTS))?;
    let lora = from_json(&json, &weights).map_err(|e| e.at(path.display()))?;
    let specs = super::modules(&model.config, &lora.section);
    let stored = |name: &str| format!("{PREFIX}{name}.weight");
    let expected: BTreeSet<String> = specs.iter().map(|spec| stored(&spec.name)).collect();
    if let Some(name) = weights.names().find(|name| !expected.contains(*name)) {
        bail_input!(
            "{}: tensor {name}: unknown; expected lora_A and lora_B of the same linears in every layer",
            weights.path().display()
        );
    }
    attach(model, lora, |spec| {
        let view = weights.tensor(&stored(&spec.name))?;
        let shape = [spec.out_features, spec.in_features];
        if view.shape != shape {
            bail_input!(
                "{}: tensor {}: found {:?}, expected {shape:?}",
                weights.path().display(),
                stored(&spec.name),
                view.shape
            );
        }
        tensor_of(&view)?.f_to_device(Device::Cpu).map_err(Error::from)
    })
}

fn base_name(json: &Value) -> Result<String> {
    let base = Keys::new(json)?.get("base_model_name_or_path");
    let base =
        base.ok_or_else(|| input_error!("base_model_name_or_path: missing, expected a model directory or hub id"))?;
    base.as_str()
        .map(str::to_string)
        .ok_or_else(|| input_error!("base_model_name_or_path: found {base}, expected a text"))
}

fn from_json(json: &Value, weights: &Checkpoint) -> Result<Lora> {
    let keys = Keys::new(json)?;
    match keys.get("peft_type").and_then(Value::as_str) {
        Some("LORA") => {}
        other => bail_input!("peft_type: found {other:?}, expected \"LORA\""),
    }
    // Each is off by default; a pattern that is empty says nothing.
    let is_off = |value: &Value| matches!(value, Value::Bool(false)) || value == "none" || *value == json!({});
    for key in [
        "use_dora",
        "use_rslora",
        "fan_in_fan_out",
        "bias",
        "lora_bias",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "layers_to_transform",
        "trainable_token_indices",
        "alora_invocation_tokens",
        "target_parameters",
    ] {
        if let Some(value) = keys.get(key).filter(|value| !is_off(value)) {
            bail_input!("{key}: found {value}, expected the default: this model does not compute it");
        }
    }
    // These change the base's weights as they begin, and again as they are loaded.
    if let Some(Value::String(how)) = keys.get("init_lora_weights")
        && !["gaussian", "eva", "orthogonal"].contains(&how.as_str())
    {
        bail_input!("init_lora_weights: found \"{how}\", expected one that leaves the base as it is");
    }
    let alpha = keys.positive("lora_alpha")?.ok_or_else(|| input_error!("lora_alpha: missing, expected a number"))?;
    // `target_modules` may be a pattern; the tensors say which linears it met.
    let has =
        |target: &Projection| weights.names().any(|name| name.ends_with(&format!(".{}.lora_A.weight", target.name())));
    let targets: Vec<Projection> = Projection::ALL.into_iter().filter(has).collect();
    if targets.is_empty() {
        bail_input!("{}: found no tensor named ...q_proj.lora_A.weight or the like", weights.path().display());
    }
    Ok(Lora { section: LoraSection { rank: keys.size("r")?, alpha, targets }, base: base_name(json)? })
}
