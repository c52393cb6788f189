//! Qwen2's `config.json`: read in its old and new forms, written back, and the shapes that follow from it.
//!
//! Old form (transformers 4): `rope_theta` and `torch_dtype` at the top level. New form (transformers 5):
//! `rope_parameters: {rope_theta, rope_type}` and `dtype`. What the model code does not compute (sliding
//! windows, scaled RoPE, other activations, weights packed in other ways) is refused here, so that no run starts on a
//! model that would silently be another one.

mod keys;
pub mod quantization;

use std::path::Path;

use serde_json::{Value, json};

pub(crate) use keys::{Keys, read_json};
use quantization::PackedLayout;

use crate::inject::plan::{ModuleSpec, qwen2_modules};
use crate::model::section::Dtype;
use crate::{Result, bail_input, input_error};

/// Names that [`Qwen2Config::preset`] knows.
pub const PRESETS: [&str; 6] =
    ["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b", "qwen2.5-mini", "tiny-28x32", "tiny-4x64"];

/// Shapes and constants of a Qwen2 model; the names are those of HF's `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct Qwen2Config {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub tie_word_embeddings: bool,
    /// q, k and v have biases, o has none: Qwen2 knows nothing else.
    pub attention_bias: bool,
    /// Every id that ends a response: those of config.json and generation_config.json, ascending.
    pub eos_token_ids: Vec<u32>,
    pub pad_token_id: Option<u32>,
    pub bos_token_id: Option<u32>,
    /// The dtype the weights are stored in; f16 counts as f32, which holds it exactly.
    pub dtype: Dtype,
}

impl Qwen2Config {
    /// Reads `dir/config.json` and, where present, the EOS ids of `dir/generation_config.json`.
    ///
    /// # Errors
    /// `Error::Input` names the file, the key, what was found and what was expected.
    pub fn from_dir(dir: &Path) -> Result<Qwen2Config> {
        let path = dir.join("config.json");
        let mut config = Qwen2Config::from_json(&read_json(&path)?).map_err(|e| e.at(path.display()))?;
        let path = dir.join("generation_config.json");
        if path.exists() {
            let ids = read_json(&path).and_then(|v| config.generation_eos(&v).map_err(|e| e.at(path.display())))?;
            config.add_eos(&ids);
        }
        Ok(config)
    }

    /// Reads the value of a `config.json`; the caller adds the file's name to errors.
    pub fn from_json(value: &Value) -> Result<Qwen2Config> {
        let keys = Keys::new(value)?;
        refuse_unsupported(&keys)?;
        let hidden_size = keys.size("hidden_size")?;
        let num_attention_heads = keys.size("num_attention_heads")?;
        let num_key_value_heads = keys.optional_size("num_key_value_heads")?.unwrap_or(num_attention_heads);
        let head_dim = match keys.optional_size("head_dim")? {
            Some(head_dim) => head_dim,
            None if hidden_size % num_attention_heads == 0 => hidden_size / num_attention_heads,
            None => bail_input!(
                "hidden_size: found {hidden_size}, expected a multiple of num_attention_heads ({num_attention_heads}) or a head_dim"
            ),
        };
        let mut config = Qwen2Config {
            hidden_size,
            intermediate_size: keys.size("intermediate_size")?,
            num_hidden_layers: keys.size("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: keys.size("vocab_size")?,
            max_position_embeddings: keys.optional_size("max_position_embeddings")?.unwrap_or(32768),
            rms_norm_eps: keys.positive("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta: rope_theta(&keys)?,
            tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(false),
            attention_bias: true,
            eos_token_ids: vec![],
            pad_token_id: keys.token_id("pad_token_id")?,
            bos_token_id: keys.token_id("bos_token_id")?,
            dtype: stored_dtype(&keys)?,
        };
        config.add_eos(&keys.token_ids("eos_token_id")?);
        config.check()?;
        Ok(config)
    }

    /// A model known by name, without weights.
    ///
    /// `qwen2.5-*` are the published shapes; `qwen2.5-mini` has the 28 layers and the vocabulary of the
    /// 1.5B model at hidden size 64; `tiny-*` are the quickstart's models over its vocabulary of 45.
    pub fn preset(name: &str) -> Result<Qwen2Config> {
        let qwen = |hidden, intermediate, layers, heads, kv_heads| Qwen2Config {
            hidden_size: hidden,
            intermediate_size: intermediate,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim: hidden / heads,
            vocab_size: 151_936,
            max_position_embeddings: 32_768,
            rms_norm_eps: 1e-6,
            rope_theta: 1e6,
            tie_word_embeddings: true,
            attention_bias: true,
            eos_token_ids: vec![151_643, 151_645],
            pad_token_id: Some(151_643),
            bos_token_id: Some(151_643),
            dtype: Dtype::Bf16,
        };
        let tiny = |hidden, intermediate, layers, heads, kv_heads| Qwen2Config {
            vocab_size: 45,
            max_position_embeddings: 256,
            rope_theta: 1e4,
            eos_token_ids: vec![1],
            pad_token_id: Some(0),
            bos_token_id: None,
            dtype: Dtype::F32,
            ..qwen(hidden, intermediate, layers, heads, kv_heads)
        };
        Ok(match name {
            "qwen2.5-0.5b" => qwen(896, 4864, 24, 14, 2),
            "qwen2.5-1.5b" => qwen(1536, 8960, 28, 12, 2),
            "qwen2.5-7b" => {
                Qwen2Config { vocab_size: 152_064, tie_word_embeddings: false, ..qwen(3584, 18_944, 28, 28, 4) }
            }
            "qwen2.5-mini" => Qwen2Config { dtype: Dtype::F32, ..qwen(64, 128, 28, 4, 2) },
            "tiny-28x32" => tiny(32, 64, 28, 2, 1),
            "tiny-4x64" => tiny(64, 128, 4, 4, 2),
            _ => bail_input!("model.preset: found {name:?}, expected one of {}", PRESETS.join(", ")),
        })
    }

    /// The `config.json` that transformers (4 and 5) and vLLM load: RoPE and dtype in both forms.
    pub fn to_hf_json(&self) -> Value {
        let dtype = match self.dtype {
            Dtype::F32 => "float32",
            Dtype::Bf16 => "bfloat16",
        };
        json!({
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "dtype": dtype,
            "eos_token_id": eos_json(&self.eos_token_ids),
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "max_window_layers": self.num_hidden_layers,
            "model_type": "qwen2",
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "pad_token_id": self.pad_token_id,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": dtype,
            "use_cache": true,
            "use_sliding_window": false,
            "vocab_size": self.vocab_size,
        })
    }

    /// The `generation_config.json` that goes with it.
    pub fn to_generation_json(&self) -> Value {
        json!({
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos_json(&self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        })
    }

    /// The module list whose positions are the module indices of the noise keys.
    pub fn modules(&self) -> Vec<ModuleSpec> {
        qwen2_modules(
            self.num_hidden_layers,
            self.hidden_size,
            self.intermediate_size,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
            self.vocab_size,
        )
    }

    /// Every stored parameter under its HF name, in module order; a tied head has none of its own.
    pub fn parameter_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (h, i) = (self.hidden_size, self.intermediate_size);
        let q = self.num_attention_heads * self.head_dim;
        let kv = self.num_key_value_heads * self.head_dim;
        let mut shapes = vec![("model.embed_tokens.weight".to_string(), vec![self.vocab_size, h])];
        for layer in 0..self.num_hidden_layers {
            let mut add = |name: &str, shape: Vec<usize>| {
                shapes.push((format!("model.layers.{layer}.{name}"), shape));
            };
            add("input_layernorm.weight", vec![h]);
            add("self_attn.q_proj.weight", vec![q, h]);
            add("self_attn.q_proj.bias", vec![q]);
            add("self_attn.k_proj.weight", vec![kv, h]);
            add("self_attn.k_proj.bias", vec![kv]);
            add("self_attn.v_proj.weight", vec![kv, h]);
            add("self_attn.v_proj.bias", vec![kv]);
            add("self_attn.o_proj.weight", vec![h, q]);
            add("post_attention_layernorm.weight", vec![h]);
            add("mlp.gate_proj.weight", vec![i, h]);
            add("mlp.up_proj.weight", vec![i, h]);
            add("mlp.down_proj.weight", vec![h, i]);
        }
        shapes.push(("model.norm.weight".to_string(), vec![h]));
        if !self.tie_word_embeddings {
            shapes.push(("lm_head.weight".to_string(), vec![self.vocab_size, h]));
        }
        shapes
    }

    /// Number of parameters; a tied head counts once.
    pub fn parameter_count(&self) -> u64 {
        let count = |shape: &[usize]| shape.iter().map(|&d| d as u64).product::<u64>();
        self.parameter_shapes().iter().map(|(_, shape)| count(shape)).sum()
    }

    /// Sizes that must fit together.
    fn check(&self) -> Result<()> {
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if heads % kv_heads != 0 {
            bail_input!("num_key_value_heads: found {kv_heads}, expected a divisor of num_attention_heads ({heads})");
        }
        if !self.head_dim.is_multiple_of(2) {
            bail_input!("head_dim: found {}, expected an even number (RoPE rotates pairs)", self.head_dim);
        }
        let special = [("pad_token_id", self.pad_token_id), ("bos_token_id", self.bos_token_id)];
        for (key, id) in special.into_iter().filter_map(|(key, id)| Some((key, id?))) {
            self.check_id(key, id)?;
        }
        self.eos_token_ids.iter().try_for_each(|&id| self.check_id("eos_token_id", id))
    }

    fn check_id(&self, key: &str, id: u32) -> Result<()> {
        if id as usize >= self.vocab_size {
            bail_input!("{key}: found {id}, expected an id below vocab_size ({})", self.vocab_size);
        }
        Ok(())
    }

    fn generation_eos(&self, value: &Value) -> Result<Vec<u32>> {
        let ids = Keys::new(value)?.token_ids("eos_token_id")?;
        ids.iter().try_for_each(|&id| self.check_id("eos_token_id", id))?;
        Ok(ids)
    }

    fn add_eos(&mut self, ids: &[u32]) {
        self.eos_token_ids.extend_from_slice(ids);
        self.eos_token_ids.sort_unstable();
        self.eos_token_ids.dedup();
    }
}

/// One id alone is a number, several are a list, as HF writes them.
fn eos_json(ids: &[u32]) -> Value {
    match ids {
        [] => Value::Null,
        [one] => json!(one),
        several => json!(several),
    }
}

fn refuse_unsupported(keys: &Keys) -> Result<()> {
    match keys.get("architectures") {
        Some(Value::Array(names)) if names.iter().any(|n| n == "Qwen2ForCausalLM") => {}
        Some(other) => bail_input!("architectures: found {other}, expected [\"Qwen2ForCausalLM\"]"),
        None => match keys.get("model_type") {
            Some(Value::String(kind)) if kind == "qwen2" => {}
            Some(other) => bail_input!("model_type: found {other}, expected \"qwen2\""),
            None => bail_input!("architectures: missing, expected [\"Qwen2ForCausalLM\"]"),
        },
    }
    if let Some(act) = keys.get("hidden_act").filter(|act| *act != "silu") {
        bail_input!("hidden_act: found {act}, expected \"silu\"");
    }
    if keys.flag("use_sliding_window")? == Some(true) {
        bail_input!("use_sliding_window: found true, expected false (sliding windows are not available)");
    }
    if keys.flag("attention_bias")? == Some(false) {
        bail_input!("attention_bias: found false, expected true (Qwen2 has q, k and v biases)");
    }
    if let Some(types) = keys.get("layer_types") {
        let full = types.as_array().is_some_and(|t| t.iter().all(|t| t == "full_attention"));
        if !full {
            bail_input!("layer_types: found {types}, expected only \"full_attention\"");
        }
    }
    if let Some(packed) = keys.get(quantization::KEY) {
        PackedLayout::from_json(packed).map_err(|e| e.at(quantization::KEY))?;
    }
    Ok(())
}

/// theta from the new form (`rope_parameters`), else the old one; any scaling is refused.
fn rope_theta(keys: &Keys) -> Result<f64> {
    let mut theta = keys.positive("rope_theta")?;
    for key in ["rope_parameters", "rope_scaling"] {
        let Some(value) = keys.get(key) else { continue };
        let inner = Keys::new(value).map_err(|e| e.at(key))?;
        let kind = inner.get("rope_type").or_else(|| inner.get("type"));
        if let Some(kind) = kind.filter(|kind| *kind != "default") {
            bail_input!("{key}.rope_type: found {kind}, expected \"default\" (RoPE scaling is not available)");
        }
        if let Some(found) = inner.positive("rope_theta").map_err(|e| e.at(key))? {
            theta = Some(found);
        }
    }
    theta.ok_or_else(|| input_error!("rope_theta: missing, expected a number here or in rope_parameters"))
}

fn stored_dtype(keys: &Keys) -> Result<Dtype> {
    let Some((key, value)) = ["dtype", "torch_dtype"].iter().find_map(|k| Some((k, keys.get(k)?))) else {
        return Ok(Dtype::F32);
    };
    match value.as_str() {
        Some("float32" | "float16") => Ok(Dtype::F32),
        Some("bfloat16") => Ok(Dtype::Bf16),
        _ => bail_input!("{key}: found {value}, expected float32, bfloat16 or float16"),
    }
}
