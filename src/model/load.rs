//! A model from a directory or from a seed, and back to a directory that transformers loads.

use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use super::calibration;
use super::checkpoint::{
    Checkpoint, StoredDtype, TensorBytes, TensorSpec, TensorView, resolve_model_path, write_model_dir,
    write_safetensors,
};
use super::config::Qwen2Config;
use super::lora::{self, Lora};
use super::qwen2::Qwen2;
use super::section::{Dtype, ModelSection};
use crate::numerics::noise_key::{Phase, Purpose, row_key, stream};
use crate::ops::cpu::normals::normals_into;
use crate::{Error, Result, bail_input};

pub fn kind_of(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::F32 => Kind::Float,
        Dtype::Bf16 => Kind::BFloat16,
    }
}

/// Where the files of a model lie: its directory, or an adapter's and that of the adapter's base.
pub struct ModelSource {
    pub dir: PathBuf,
    base: Option<PathBuf>,
}

impl ModelSource {
    /// `name` as for `resolve_model_path`; `base`: of an adapter, in place of the one that adapter_config.json names.
    ///
    /// # Errors
    /// What is not on this machine; a base without adapter, or that is one.
    pub fn of(name: &str, base: Option<&str>) -> Result<ModelSource> {
        let dir = resolve_model_path(name)?;
        let base = match (lora::is_adapter(&dir), base) {
            (false, None) => None,
            (false, Some(_)) => {
                bail_input!("--base: {name} holds no {}, expected an adapter", lora::ADAPTER_CONFIG)
            }
            (true, base) => Some(lora::base_of(&dir, base)?),
        };
        Ok(ModelSource { dir, base })
    }

    /// The directory of the model's own weights.
    pub fn weights(&self) -> &Path {
        self.base.as_deref().unwrap_or(&self.dir)
    }

    /// The directory where `file` is to be read: an adapter's where it has one, else its base's (PEFT writes no config.json).
    pub fn home_of(&self, file: &str) -> &Path {
        if self.dir.join(file).exists() { &self.dir } else { self.weights() }
    }

    /// The model, with its adapter beside it.
    pub fn load(&self, device: Device, kind: Option<Kind>) -> Result<Qwen2> {
        let mut model = load_model(self.weights(), device, kind)?;
        if self.base.is_some() {
            lora::load(&mut model, &self.dir)?;
        }
        Ok(model)
    }

    /// As [`load`](ModelSource::load), for looking at a model rather than training it: f32 on a CPU, where bf16 products only
    /// cost accuracy, and the checkpoint's dtype on a GPU.
    pub fn load_for_inference(&self, device: Device) -> Result<Qwen2> {
        self.load(device, (device == Device::Cpu).then_some(Kind::Float))
    }

    /// Writes into `dir` a model whose weights have the adapter added, with the tokenizer and the calibration that lie beside
    /// the adapter; returns how many linears that were. In f32 both are exact; the sum is rounded once, to the dtype that
    /// the base is stored in.
    pub fn save_merged(&self, dir: &Path) -> Result<usize> {
        let mut model = self.load(Device::Cpu, Some(Kind::Float))?;
        let adapters = model.adapters().count() / 2;
        lora::merge(&mut model)?;
        let dtype = Qwen2Config::from_dir(self.weights())?.dtype;
        save_model(&model, dtype, Some(self.home_of("tokenizer.json")), dir)?;
        let (from, to) = (self.dir.join(calibration::FILE), dir.join(calibration::FILE));
        if from.exists() {
            std::fs::copy(&from, &to).map_err(|e| Error::io(&from, e))?;
        }
        Ok(adapters)
    }
}

/// Loads a model directory; packed weights are dequantized. `kind` None: the dtype that config.json names.
pub fn load_model(dir: &Path, device: Device, kind: Option<Kind>) -> Result<Qwen2> {
    let config = Qwen2Config::from_dir(dir)?;
    let checkpoint = Checkpoint::open(dir)?;
    checkpoint.check(&config)?;
    let kind = kind.unwrap_or(kind_of(config.dtype));
    Qwen2::build(config, device, kind, |name, _| tensor_of(&checkpoint.parameter(name)?.view()))
}

/// Hugging Face's `initializer_range`.
pub const INITIALIZER_RANGE: f32 = 0.02;

/// Random weights that depend on (config, seed, std) alone: N(0, std^2), output projections scaled by 1/sqrt(2 layers)
/// as in GPT-2, norms 1, biases 0.
pub fn random_model(config: Qwen2Config, seed: u64, std: f32, device: Device, kind: Kind) -> Result<Qwen2> {
    let residual_scale = 1.0 / (2.0 * config.num_hidden_layers as f32).sqrt();
    let mut index = 0u32;
    Qwen2::build(config, device, kind, |name, shape| {
        index += 1;
        let dims: Vec<i64> = shape.iter().map(|&d| d as i64).collect();
        if name.ends_with(".bias") {
            return Ok(Tensor::f_zeros(&dims, (Kind::Float, Device::Cpu))?);
        }
        let &[rows, cols] = shape else {
            return Ok(Tensor::f_ones(&dims, (Kind::Float, Device::Cpu))?);
        };
        let projects_out = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
        let std = std * if projects_out { residual_scale } else { 1.0 };
        let stream = stream(Purpose::Other, Phase::Shared, 0, index)?;
        let mut values = vec![0f32; rows * cols];
        for (row, values) in values.chunks_mut(cols).enumerate() {
            normals_into(seed, stream, row_key(0, row as u32), values);
            values.iter_mut().for_each(|v| *v *= std);
        }
        Ok(Tensor::f_from_slice(&values)?.f_view(dims.as_slice())?)
    })
}

/// Random f32 weights of a preset's shapes.
pub fn random_preset(name: &str, seed: u64, device: Device) -> Result<Qwen2> {
    random_model(Qwen2Config::preset(name)?, seed, INITIALIZER_RANGE, device, Kind::Float)
}

/// The model that a `model:` section names, as training begins with it: with new adapters where it asks for them.
pub fn model_of_section(section: &ModelSection, seed: u64, device: Device) -> Result<Qwen2> {
    let kind = kind_of(section.dtype);
    let (mut model, base) = match (&section.path, &section.preset) {
        (Some(path), _) => {
            let dir = resolve_model_path(path)?;
            if lora::is_adapter(&dir) {
                bail_input!(
                    "model.path: {path}: found an adapter, expected a model; make one with: temper merge {path} DIR"
                );
            }
            (load_model(&dir, device, Some(kind))?, base_name(path)?)
        }
        (None, Some(preset)) => {
            let mut config = Qwen2Config::preset(preset)?;
            config.dtype = section.dtype;
            (random_model(config, seed, INITIALIZER_RANGE, device, kind)?, String::new())
        }
        (None, None) => bail_input!("model: expected path (a model directory) or preset (known shapes)"),
    };
    if let Some(section) = &section.lora {
        lora::attach_new(&mut model, Lora { section: section.clone(), base }, seed)?;
    }
    Ok(model)
}

/// How an adapter names its base: a directory by its absolute path, a hub id as it is.
fn base_name(path: &str) -> Result<String> {
    match Path::new(path).exists() {
        true => Ok(std::fs::canonicalize(path).map_err(|e| Error::io(path, e))?.to_string_lossy().into_owned()),
        false => Ok(path.to_string()),
    }
}

/// Writes config.json, generation_config.json, the weights in `dtype`, and the tokenizer files of `tokenizer_dir`; of a model
/// with adapters nothing but those (`lora::save`).
pub fn save_model(model: &Qwen2, dtype: Dtype, tokenizer_dir: Option<&Path>, dir: &Path) -> Result<()> {
    if model.lora.is_some() {
        return lora::save(model, dtype, tokenizer_dir, dir);
    }
    let mut config = model.config.clone();
    config.dtype = dtype;
    let parameters = model.base_parameters();
    let stored = stored_dtype(dtype);
    let specs: Vec<TensorSpec> = parameters
        .iter()
        .map(|p| {
            let shape: Vec<usize> = p.value().size().iter().map(|&d| d as usize).collect();
            TensorSpec::new(&p.name, stored, &shape)
        })
        .collect();
    write_model_dir(dir, &config, tokenizer_dir, &specs, |index, sink| {
        let mut bytes = Vec::new();
        append_bytes(&parameters[index].exact().f_to_kind(kind_of(dtype))?, &mut bytes)?;
        sink.write(&bytes)
    })?;
    Ok(())
}

pub fn stored_dtype(dtype: Dtype) -> StoredDtype {
    match dtype {
        Dtype::F32 => StoredDtype::F32,
        Dtype::Bf16 => StoredDtype::BF16,
    }
}

/// Writes named f32 tensors into one .safetensors file.
pub fn write_f32(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    let entries = tensors
        .iter()
        .map(|(name, tensor)| {
            let shape: Vec<usize> = tensor.size().iter().map(|&d| d as usize).collect();
            let mut data = Vec::new();
            append_bytes(tensor, &mut data)?;
            Ok(TensorBytes { spec: TensorSpec::new(name.as_str(), StoredDtype::F32, &shape), data: data.into() })
        })
        .collect::<Result<Vec<_>>>()?;
    write_safetensors(path, &entries)
}

/// Appends the tensor's little-endian row-major bytes.
pub fn append_bytes(tensor: &Tensor, bytes: &mut Vec<u8>) -> Result<()> {
    let tensor = tensor.f_to_device(Device::Cpu)?.f_contiguous()?;
    let start = bytes.len();
    bytes.resize(start + tensor.numel() * tensor.kind().elt_size_in_bytes(), 0);
    tensor.f_copy_data_u8(&mut bytes[start..], tensor.numel())?;
    Ok(())
}

/// A CPU tensor with a copy of the stored values.
pub fn tensor_of(view: &TensorView) -> Result<Tensor> {
    let kind = match view.dtype {
        StoredDtype::F32 => Kind::Float,
        StoredDtype::BF16 => Kind::BFloat16,
        StoredDtype::F16 => Kind::Half,
        other => return Err(Error::Input(format!("found dtype {other:?}, expected F32, BF16 or F16"))),
    };
    let shape: Vec<i64> = view.shape.iter().map(|&d| d as i64).collect();
    Ok(Tensor::f_from_data_size(view.data, &shape, kind)?)
}
