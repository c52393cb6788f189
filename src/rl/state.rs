//! What a checkpoint holds besides the model directory, and how training continues from it, bit for bit.
//!
//! `trainer/master.safetensors`: f32 master weights of what is trained; `trainer/optimizer.safetensors`: AdamW's moments;
//! `trainer/state.json`: counters. Everything else follows from the configuration and the step (counter-based noise).

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::microbatch::Halvings;
use super::optimizer::{AdamW, AdamWCounters};
use crate::inject::plan::InjectionPlan;
use crate::model::calibration;
use crate::model::checkpoint::Checkpoint;
use crate::model::load::{save_model, tensor_of, write_f32};
use crate::model::qwen2::Qwen2;
use crate::model::section::Dtype;
use crate::ops::profile::span;
use crate::{Error, Result, input_error};

const MASTER: &str = "master.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";

/// Counters of the run.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct TrainerState {
    pub step: u64,
    pub update_number: u32,
    pub optimizer: AdamWCounters,
    #[serde(default)]
    pub halvings: Halvings,
}

/// Writes the model directory into `dir` and the trainer's state into `trainer_dir`.
pub fn save(
    dir: &Path,
    trainer_dir: &Path,
    model: &Qwen2,
    dtype: Dtype,
    tokenizer_dir: Option<&Path>,
    optimizer: &AdamW,
    state: &TrainerState,
) -> Result<()> {
    let _span = span("checkpoint");
    save_model(model, dtype, tokenizer_dir, dir)?;
    let masters: Vec<(String, Tensor)> =
        model.parameters().into_iter().filter_map(|p| Some((p.name.clone(), p.master()?))).collect();
    write_f32(&trainer_dir.join(MASTER), &masters)?;
    write_f32(&trainer_dir.join(OPTIMIZER), &optimizer.state_tensors())?;
    let path = trainer_dir.join(STATE);
    let text = serde_json::to_vec_pretty(state).map_err(|e| Error::Runtime(e.to_string()))?;
    std::fs::write(&path, text).map_err(|e| Error::io(&path, e))
}

/// Restores weights, moments and counters from `checkpoint`/trainer.
pub fn restore(checkpoint: &Path, model: &mut Qwen2, optimizer: &mut AdamW) -> Result<TrainerState> {
    let dir = checkpoint.join("trainer");
    let path = dir.join(STATE);
    let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
    let state: TrainerState = serde_json::from_slice(&bytes)
        .map_err(|e| input_error!("{}: {e}: the checkpoint is damaged", path.display()))?;
    let masters = Checkpoint::open(&dir.join(MASTER))?;
    let _no_grad = tch::no_grad_guard();
    for parameter in model.parameters_mut().into_iter().filter(|parameter| parameter.master().is_some()) {
        let view = masters.tensor(&parameter.name)?;
        let expected = parameter.value().size();
        if view.shape.iter().map(|&d| d as i64).collect::<Vec<_>>() != expected {
            return Err(input_error!(
                "{}: tensor {}: found {:?}, expected {expected:?}",
                dir.join(MASTER).display(),
                parameter.name,
                view.shape
            ));
        }
        parameter.assign(&tensor_of(&view)?)?;
    }
    model.set_update_number(state.update_number);
    let file = Checkpoint::open(&dir.join(OPTIMIZER))?;
    let names: Vec<String> = file.names().map(str::to_string).collect();
    let mut tensors = Vec::new();
    for name in names {
        tensors.push((name.clone(), tensor_of(&file.tensor(&name)?)?.f_to_device(model.device())?));
    }
    optimizer.load_state(state.optimizer, tensors)?;
    Ok(state)
}

/// The calibrated activation scales that the run's checkpoints carry.
pub fn restore_activation_amax(checkpoint: &Path, plan: &InjectionPlan) -> Result<BTreeMap<u32, f32>> {
    calibration::read(checkpoint, plan)?.ok_or_else(|| {
        input_error!("{}: no such file: the checkpoint is damaged", checkpoint.join(calibration::FILE).display())
    })
}
