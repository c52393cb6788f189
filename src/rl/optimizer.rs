//! AdamW with f32 master weights, global-norm gradient clipping and skipped non-finite steps.
//!
//! Per element, at update t = 1, 2, ... (arXiv 1711.05101, algorithm 2; operation by operation as
//! torch.optim.AdamW does it, so that the two agree to the last bit or so):
//!
//! ```text
//! g = gradient * min(1, grad_clip / (norm + 1e-6))      norm over all gradients (torch.nn.utils.clip_grad_norm_)
//! w = w * (1 - lr * weight_decay)                       decoupled decay
//! m = m + (g - m) * (1 - beta1)
//! v = v * beta2 + g * g * (1 - beta2)
//! w = w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//! ```
//!
//! Everything is elementwise f32, worked off in chunks of a flat view, so a step allocates a few chunks, not a
//! copy of the model. The norm is summed in f64. A norm that is not finite changes nothing but the count of
//! skipped steps. State leaves and enters as named f32 tensors plus counters: resuming is exact.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::lr_schedule;
use super::section::{LrSchedule, OptimizerSection};
use crate::{Result, bail_input, input_error};

/// Elements worked on at a time: 16 MiB of f32, large enough to fill a GPU.
pub(super) const CHUNK: i64 = 1 << 22;

/// Names of the state's tensors: these and the parameter's name.
const FIRST_MOMENT: &str = "exp_avg.";
const SECOND_MOMENT: &str = "exp_avg_sq.";

/// A trained parameter and its accumulated gradient, of equal shape; the gradient is only read.
#[derive(Debug, Clone, Copy)]
pub struct ParamRef<'a> {
    pub name: &'a str,
    pub master: &'a Tensor, // f32, updated in place
    pub grad: &'a Tensor,   // f32 or bf16
    pub is_norm_or_bias: bool,
}

/// What one call of [`AdamW::step`] did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepOutcome {
    /// Global norm before clipping (`grad_norm`); NaN or infinite when skipped.
    pub grad_norm: f64,
    /// Factor the gradients were multiplied by, at most 1.
    pub clip_coefficient: f64,
    /// The norm was not finite: nothing was changed but the count.
    pub skipped: bool,
}

/// The part of the state that is not tensors.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AdamWCounters {
    /// Updates done; skipped ones are not among them.
    pub step: u64,
    pub skipped_steps: u64,
}

#[derive(Debug)]
struct Moments {
    first: Tensor,  // shape of the parameter, f32
    second: Tensor, // same
}

/// The optimizer. Moments appear at a parameter's first step, on its device.
#[derive(Debug)]
pub struct AdamW {
    config: OptimizerSection,
    /// Updates of the whole run, over which the learning rate falls.
    total_updates: u64,
    counters: AdamWCounters,
    moments: BTreeMap<String, Moments>,
}

impl AdamW {
    /// Under a learning rate that is constant after warm-up, whatever the schedule.
    ///
    /// # Errors
    /// A parameter out of its range, named as in the configuration.
    pub fn new(config: OptimizerSection) -> Result<AdamW> {
        check_config(&config)?;
        let counters = AdamWCounters { step: 0, skipped_steps: 0 };
        let config = OptimizerSection { schedule: LrSchedule::Constant, ..config };
        Ok(AdamW { config, total_updates: 0, counters, moments: BTreeMap::new() })
    }

    /// Under the schedule, for a run of `total_updates`.
    ///
    /// # Errors
    /// As [`new`](AdamW::new), and a warm-up that leaves nothing of a falling schedule.
    pub fn scheduled(config: OptimizerSection, total_updates: u64) -> Result<AdamW> {
        lr_schedule::check(&config, total_updates)?;
        Ok(AdamW { total_updates, config: config.clone(), ..AdamW::new(config)? })
    }

    pub fn config(&self) -> &OptimizerSection {
        &self.config
    }

    pub fn counters(&self) -> AdamWCounters {
        self.counters
    }

    /// Learning rate of the next update: lr times the schedule's factor.
    pub fn next_lr(&self) -> f64 {
        let factor = lr_schedule::factor(&self.config, self.counters.step + 1, self.total_updates);
        self.config.lr * factor
    }

    /// Counts an update that was not made because its loss was not finite.
    pub fn skip(&mut self) {
        self.counters.skipped_steps += 1;
    }

    /// One update of every parameter with the learning rate `lr` (usually [`next_lr`](AdamW::next_lr)).
    ///
    /// # Errors
    /// A name twice, shapes or dtypes that do not fit, state of another parameter set, or what libtorch refuses.
    pub fn step(&mut self, params: &mut [ParamRef], lr: f64) -> Result<StepOutcome> {
        tch::no_grad(|| self.step_without_grad(params, lr))
    }

    fn step_without_grad(&mut self, params: &mut [ParamRef], lr: f64) -> Result<StepOutcome> {
        self.check_params(params)?;
        let grad_norm = global_norm(params)?;
        if !grad_norm.is_finite() {
            self.counters.skipped_steps += 1;
            return Ok(StepOutcome { grad_norm, clip_coefficient: 1.0, skipped: true });
        }
        let clip = clip_coefficient(grad_norm, self.config.grad_clip);
        self.counters.step += 1;
        for param in params.iter() {
            if !self.moments.contains_key(param.name) {
                let zeros = || param.master.f_zeros_like();
                self.moments.insert(param.name.to_string(), Moments { first: zeros()?, second: zeros()? });
            }
            let Some(moments) = self.moments.get_mut(param.name) else {
                continue;
            };
            moments.first = moments.first.f_to_device(param.master.device())?;
            moments.second = moments.second.f_to_device(param.master.device())?;
            update(param, moments, clip, lr, self.counters.step, &self.config).map_err(|e| e.at(param.name))?;
        }
        Ok(StepOutcome { grad_norm, clip_coefficient: clip, skipped: false })
    }

    /// The state's tensors in the order of their names: `exp_avg.<parameter>` and `exp_avg_sq.<parameter>`, f32.
    /// They share memory with the optimizer: write them out before the next step.
    pub fn state_tensors(&self) -> Vec<(String, Tensor)> {
        let first = self.moments.iter().map(|(n, m)| (format!("{FIRST_MOMENT}{n}"), m.first.shallow_clone()));
        let second = self.moments.iter().map(|(n, m)| (format!("{SECOND_MOMENT}{n}"), m.second.shallow_clone()));
        first.chain(second).collect()
    }

    /// Takes over a saved state. Shapes are checked against the parameters at the next step.
    ///
    /// # Errors
    /// A tensor that is no moment, is not f32, or lacks its partner; no tensors after a first update.
    pub fn load_state(
        &mut self,
        counters: AdamWCounters,
        tensors: impl IntoIterator<Item = (String, Tensor)>,
    ) -> Result<()> {
        let mut first: BTreeMap<String, Tensor> = BTreeMap::new();
        let mut second: BTreeMap<String, Tensor> = BTreeMap::new();
        for (name, tensor) in tensors {
            if tensor.kind() != Kind::Float {
                bail_input!("optimizer state: {name}: found dtype {:?}, expected f32", tensor.kind());
            }
            // Copied: the next step updates it in place, and the caller's tensor must not change.
            let tensor = tensor.f_detach_copy()?;
            if let Some(parameter) = name.strip_prefix(FIRST_MOMENT) {
                first.insert(parameter.to_string(), tensor);
            } else if let Some(parameter) = name.strip_prefix(SECOND_MOMENT) {
                second.insert(parameter.to_string(), tensor);
            } else {
                bail_input!("optimizer state: found tensor {name}, expected {FIRST_MOMENT}* or {SECOND_MOMENT}*");
            }
        }
        if counters.step > 0 && first.is_empty() && second.is_empty() {
            bail_input!("optimizer state: found no tensors, expected moments after {} updates", counters.step);
        }
        let mut moments = BTreeMap::new();
        for (name, first) in first {
            let second = second.remove(&name).ok_or_else(|| {
                input_error!("optimizer state: found {FIRST_MOMENT}{name} without {SECOND_MOMENT}{name}")
            })?;
            moments.insert(name, Moments { first, second });
        }
        if let Some(name) = second.keys().next() {
            bail_input!("optimizer state: found {SECOND_MOMENT}{name} without {FIRST_MOMENT}{name}");
        }
        self.counters = counters;
        self.moments = moments;
        Ok(())
    }

    fn check_params(&self, params: &[ParamRef]) -> Result<()> {
        let mut names: Vec<&str> = params.iter().map(|p| p.name).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|w| w[0] == w[1]) {
            bail_input!("optimizer: found parameter {} twice", pair[0]);
        }
        for p in params {
            let shape = p.master.size();
            if p.master.kind() != Kind::Float || !p.master.is_contiguous() {
                bail_input!("{}: found a master weight of {:?}, expected contiguous f32", p.name, p.master.kind());
            }
            if p.grad.size() != shape {
                bail_input!("{}: found a gradient of shape {:?}, expected {shape:?}", p.name, p.grad.size());
            }
            match self.moments.get(p.name) {
                Some(m) if m.first.size() != shape || m.second.size() != shape => {
                    bail_input!("optimizer state: {}: found shape {:?}, expected {shape:?}", p.name, m.first.size());
                }
                // Fresh moments under an old step count would be scaled by the wrong bias correction.
                None if self.counters.step > 0 => {
                    bail_input!("optimizer state: found no {FIRST_MOMENT}{0}, expected one for parameter {0}", p.name);
                }
                _ => {}
            }
        }
        if let Some(name) = self.moments.keys().find(|n| names.binary_search(&n.as_str()).is_err()) {
            bail_input!("optimizer state: found {FIRST_MOMENT}{name}, but no parameter {name} is trained");
        }
        Ok(())
    }
}

/// Square root of the sum of squares of all gradients, in f64; reads the device once.
fn global_norm(params: &[ParamRef]) -> Result<f64> {
    let mut sums = Vec::new();
    for p in params {
        for chunk in p.grad.f_reshape([-1])?.f_split(CHUNK, 0)? {
            sums.push(chunk.f_to_kind(Kind::Double)?.f_square()?.f_sum(Kind::Double)?);
        }
    }
    if sums.is_empty() {
        return Ok(0.0);
    }
    Ok(f64::try_from(&Tensor::f_stack(&sums, 0)?.f_sum(Kind::Double)?.f_sqrt()?)?)
}

/// In f32, as clip_grad_norm_ computes it.
fn clip_coefficient(grad_norm: f64, grad_clip: Option<f64>) -> f64 {
    match grad_clip {
        Some(limit) => f64::from((limit as f32 / (grad_norm as f32 + 1e-6)).min(1.0)),
        None => 1.0,
    }
}

fn update(
    param: &ParamRef,
    moments: &mut Moments,
    clip: f64,
    lr: f64,
    step: u64,
    config: &OptimizerSection,
) -> Result<()> {
    let [beta1, beta2] = config.betas;
    let bias_correction1 = 1.0 - beta1.powf(step as f64);
    let bias_correction2_sqrt = (1.0 - beta2.powf(step as f64)).sqrt();
    let decays = config.weight_decay != 0.0 && (config.decay_norms_and_biases || !param.is_norm_or_bias);

    let flat = |t: &Tensor| -> Result<Vec<Tensor>> { Ok(t.f_view([-1])?.f_split(CHUNK, 0)?) };
    let masters = flat(param.master)?;
    let grads = param.grad.f_reshape([-1])?.f_split(CHUNK, 0)?;
    let firsts = flat(&moments.first)?;
    let seconds = flat(&moments.second)?;
    for (((mut w, g), mut m), mut v) in masters.into_iter().zip(grads).zip(firsts).zip(seconds) {
        let mut g = g.f_to_kind(Kind::Float)?;
        if clip != 1.0 {
            g = g.f_mul_scalar(clip)?;
        }
        if decays {
            let _ = w.f_mul_scalar_(1.0 - lr * config.weight_decay)?;
        }
        let _ = m.f_lerp_(&g, 1.0 - beta1)?;
        let scaled = g.f_mul_scalar(1.0 - beta2)?;
        let _ = v.f_mul_scalar_(beta2)?.f_addcmul_(&scaled, &g)?;
        let denominator = v.f_sqrt()?.f_div_scalar_(bias_correction2_sqrt)?.f_add_scalar_(config.eps)?;
        let numerator = m.f_mul_scalar(-(lr / bias_correction1))?;
        let _ = w.f_addcdiv_(&numerator, &denominator)?;
    }
    Ok(())
}

fn check_config(config: &OptimizerSection) -> Result<()> {
    let finite_at_least_0 = [("lr", config.lr), ("eps", config.eps), ("weight_decay", config.weight_decay)];
    for (key, value) in finite_at_least_0 {
        if !(value.is_finite() && value >= 0.0) {
            bail_input!("optimizer.{key}: found {value}, expected a finite number of at least 0");
        }
    }
    for beta in config.betas {
        if !(0.0..1.0).contains(&beta) {
            bail_input!("optimizer.betas: found {beta}, expected at least 0 and below 1");
        }
    }
    if let Some(limit) = config.grad_clip
        && (limit.is_nan() || limit <= 0.0)
    {
        bail_input!("optimizer.grad_clip: found {limit}, expected more than 0 (or null for no clipping)");
    }
    Ok(())
}
