//! Static activation scales: the tensor amax A of every quantized linear's input, calibrated before training.
//!
//! A = the largest magnitude in any row of that input in a clean forward pass over the calibration prompts, blocks with
//! NaN or infinity left out. What is larger later saturates. The values lie in the model directory, so that a resume
//! and an evaluation quantize with the same bits: `activation_amax.json` = {module name: A}, A exact in f32.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

use super::generate::{Prompt, Request, Sampling, generate};
use super::pass::{Pass, PromptUid};
use super::qwen2::Qwen2;
use crate::inject::injector::Injector;
use crate::inject::plan::InjectionPlan;
use crate::ops::fake_quant::amax;
use crate::ops::matmul_error::RowKeys;
use crate::{Error, Result, input_error};

/// In a model directory.
pub const FILE: &str = "activation_amax.json";

/// Prompts of one forward pass: part of the definition, since products are not batch-invariant.
const PROMPTS_PER_PASS: usize = 16;

/// Collects A during a pass.
pub struct Calibration<'a> {
    plan: &'a InjectionPlan,
    amax: RefCell<BTreeMap<u32, f32>>,
}

impl Calibration<'_> {
    /// x [tokens, in]: the input of module `index`.
    pub fn observe(&self, index: u32, x: &tch::Tensor) -> Result<()> {
        let module = &self.plan.modules[index as usize];
        if let Some(format) = module.activation_format.filter(|_| self.plan.needs_activation_amax(module)) {
            let found = amax(&x.detach(), format)?;
            let mut all = self.amax.borrow_mut();
            let largest = all.entry(index).or_insert(0.0);
            *largest = largest.max(found);
        }
        Ok(())
    }
}

/// A by module index, of the model as it stands; nothing where the plan needs none.
pub fn calibrate(model: &Qwen2, plan: &InjectionPlan, prompts: &[&[u32]]) -> Result<BTreeMap<u32, f32>> {
    if !needs_any(plan) {
        return Ok(BTreeMap::new());
    }
    let calibration = Calibration { plan, amax: RefCell::default() };
    for prompts in prompts.chunks(PROMPTS_PER_PASS) {
        // No key is drawn from: any uid will do.
        let uid = PromptUid { step: 0, dataset_index: 0 };
        let prompts: Vec<Prompt> = prompts.iter().map(|ids| Prompt { uid, ids: ids.to_vec() }).collect();
        let request = Request {
            prompts: &prompts,
            group_size: 1,
            max_new_tokens: 1,
            limits: None,
            stop_ids: &[],
            sampling: &Sampling::greedy(),
            kv_cache: false,
        };
        let pass = Pass { calibration: Some(&calibration), ..Pass::clean(RowKeys::new(Vec::new())) };
        generate(model, &request, &pass, |_| {})?;
    }
    Ok(calibration.amax.into_inner())
}

/// Writes what `injector` quantizes with into the model directory `dir`; nothing where it needs none.
pub fn write(dir: &Path, injector: &Injector) -> Result<()> {
    if injector.activation_amax().is_empty() {
        return Ok(());
    }
    let by_name: BTreeMap<&str, f64> =
        injector.activation_amax().iter().map(|(&i, &amax)| (injector.module(i).name.as_str(), amax.into())).collect();
    let path = dir.join(FILE);
    let text = serde_json::to_vec_pretty(&by_name).map_err(|e| Error::Runtime(e.to_string()))?;
    std::fs::write(&path, text).map_err(|e| Error::io(&path, e))
}

/// A by module index from the model directory `dir`; None where it has no such file. Errors on a file that lacks a
/// module of the plan.
pub fn read(dir: &Path, plan: &InjectionPlan) -> Result<Option<BTreeMap<u32, f32>>> {
    let path = dir.join(FILE);
    if !needs_any(plan) {
        return Ok(Some(BTreeMap::new()));
    }
    if !path.exists() {
        return Ok(None);
    }
    let by_name = read_all(dir)?;
    let needed = plan.modules.iter().filter(|module| plan.needs_activation_amax(module));
    let amax = needed.map(|module| match by_name.get(&module.name) {
        Some(&amax) => Ok((module.index, amax)),
        None => {
            Err(input_error!("{}: module {} is missing, whose input is to be quantized", path.display(), module.name))
        }
    });
    amax.collect::<Result<_>>().map(Some)
}

/// Every A in the model directory `dir`, by module name.
pub fn read_all(dir: &Path) -> Result<BTreeMap<String, f32>> {
    let path = dir.join(FILE);
    let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
    let by_name: BTreeMap<String, f64> =
        serde_json::from_slice(&bytes).map_err(|e| input_error!("{}: {e}", path.display()))?;
    let checked = by_name.into_iter().map(|(name, amax)| match amax >= 0.0 && amax <= f64::from(f32::MAX) {
        true => Ok((name, amax as f32)),
        false => Err(input_error!("{}: {name}: found {amax}, expected an f32, 0 or more", path.display())),
    });
    checked.collect()
}

fn needs_any(plan: &InjectionPlan) -> bool {
    plan.modules.iter().any(|module| plan.needs_activation_amax(module))
}
