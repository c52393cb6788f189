//! Low-rank adapters (Hu et al., arXiv 2106.09685) beside frozen linears.
//!
//! ```text
//! y = law(x Q(W)^T) + bias + (alpha / r) (x A^T) B^T        A [r, in], B [out, r]
//! ```
//!
//! A and B read x as it is and are never quantized; their two products carry an error where `noisy_ops.adapters` says so. They
//! begin as in PEFT: A uniform in +-1/sqrt(in), B zero, so that the first policy is the base. The reference policy is the base:
//! its phase leaves the adapters out. `lora/peft.rs` reads and writes them in PEFT's layout.

mod peft;

use tch::{Device, Kind, Tensor};

pub use peft::{ADAPTER_CONFIG, base_of, is_adapter, load, save};

use super::config::Qwen2Config;
use super::linear::Linear;
use super::linear_input::LinearInput;
use super::parameter::{Parameter, Role};
use super::pass::Pass;
use super::qwen2::Qwen2;
use super::section::LoraSection;
use crate::inject::plan::{ModuleSpec, adapter_modules};
use crate::numerics::generator::uniform_u32;
use crate::numerics::noise_key::{Phase, Purpose, row_key, stream};
use crate::{Error, Result};

/// A and B beside one linear.
pub struct Adapter {
    pub a: Linear, // weight [r, in]
    pub b: Linear, // weight [out, r]
    scale: f64,    // alpha / r
}

/// What the adapters of a model have in common.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    pub section: LoraSection,
    /// The base model, as PEFT names it: a directory or a hub id. Empty: random weights.
    pub base: String,
}

impl Adapter {
    /// x [tokens, in] -> (alpha / r) (x A^T) B^T [tokens, out].
    pub fn forward(&self, input: &LinearInput, pass: &Pass) -> Result<Tensor> {
        let inner = self.a.forward_shared(input, pass)?;
        Ok(self.b.forward(&inner, pass)?.f_mul_scalar(self.scale)?)
    }

    /// As [`Adapter::forward`], of several linears'.
    pub fn forward_each<const N: usize>(
        adapters: [&Adapter; N],
        inputs: [&LinearInput; N],
        pass: &Pass,
    ) -> Result<[Tensor; N]> {
        let inner = Linear::forward_each(adapters.map(|adapter| &adapter.a), inputs, pass)?;
        let inner = inner.each_ref().map(LinearInput::new);
        let outputs = Linear::forward_each(adapters.map(|adapter| &adapter.b), inner.each_ref(), pass)?;
        for (y, adapter) in outputs.iter().zip(adapters) {
            let _ = y.shallow_clone().f_mul_scalar_(adapter.scale)?;
        }
        Ok(outputs)
    }

    /// (alpha / r) B A in f32, [out, in].
    fn product(&self) -> Result<Tensor> {
        let [a, b] = [&self.a, &self.b].map(|linear| linear.weight.exact().f_to_kind(Kind::Float));
        Ok(b?.f_mm(&a?)?.f_mul_scalar(self.scale)?)
    }
}

/// The adapters of a model of these shapes; their indices in the noise keys follow those of the model's modules.
pub fn modules(config: &Qwen2Config, section: &LoraSection) -> Vec<ModuleSpec> {
    let targets: Vec<&str> = section.targets.iter().map(|target| target.name()).collect();
    adapter_modules(&config.modules(), &targets, section.rank)
}

/// Elements of all adapters: r (in + out) of every target in every layer.
pub fn elements(config: &Qwen2Config, section: &LoraSection) -> u64 {
    modules(config, section).iter().map(|spec| (spec.in_features * spec.out_features) as u64).sum()
}

/// Every module of such a model: its own, then its adapters'.
pub fn all_modules(config: &Qwen2Config, section: Option<&LoraSection>) -> Vec<ModuleSpec> {
    let mut all = config.modules();
    all.extend(section.into_iter().flat_map(|section| modules(config, section)));
    all
}

/// Puts adapters beside the linears that `lora` targets; `tensor(spec)` gives each matrix, [out, in].
pub fn attach(model: &mut Qwen2, lora: Lora, mut tensor: impl FnMut(&ModuleSpec) -> Result<Tensor>) -> Result<()> {
    let first = model.config.modules().len() as u32;
    let (device, kind) = (model.device(), model.kind());
    let scale = lora.section.alpha / lora.section.rank as f64;
    let specs = modules(&model.config, &lora.section);
    let mut made = Vec::with_capacity(specs.len());
    for (number, spec) in specs.iter().enumerate() {
        let name = format!("{}.weight", spec.name);
        let weight = Parameter::frozen(&name, Role::Matrix, tensor(spec)?.f_to_device(device)?, kind)?;
        made.push(Linear::new(first + number as u32, weight, None));
    }
    let mut made = made.into_iter();
    for linear in model.linears_mut().filter(|linear| lora.section.targets.iter().any(|t| linear.is(t.name()))) {
        let (Some(a), Some(b)) = (made.next(), made.next()) else {
            return Err(Error::Runtime(format!("{}: no adapter was made", linear.weight.name)));
        };
        linear.adapter = Some(Box::new(Adapter { a, b, scale }));
    }
    model.lora = Some(lora);
    Ok(())
}

/// As training begins. A depends on (seed, module) alone.
pub fn attach_new(model: &mut Qwen2, lora: Lora, seed: u64) -> Result<()> {
    let first = model.config.modules().len() as u32;
    let mut index = first;
    attach(model, lora, |spec| {
        let (rows, cols) = (spec.out_features, spec.in_features);
        let stream = stream(Purpose::Other, Phase::Update, 0, index)?;
        let is_a = (index - first).is_multiple_of(2);
        index += 1;
        if !is_a {
            return Ok(Tensor::f_zeros([rows as i64, cols as i64], (Kind::Float, Device::Cpu))?);
        }
        // torch's Kaiming uniform with a = sqrt(5): the bound is sqrt(6 / ((1 + 5) in)).
        let bound = 1.0 / (cols as f64).sqrt();
        let mut values = Vec::with_capacity(rows * cols);
        for row in 0..rows {
            let key = row_key(0, row as u32);
            values.extend((0..cols as u32).map(|column| {
                let u = f64::from(uniform_u32(seed, stream, key, column)) / f64::from(u32::MAX);
                ((2.0 * u - 1.0) * bound) as f32
            }));
        }
        Ok(Tensor::f_from_slice(&values)?.f_view([rows as i64, cols as i64])?)
    })
}

/// Adds every adapter into its linear's weight, in f32 with one rounding to the model's dtype, and removes it.
pub fn merge(model: &mut Qwen2) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    for linear in model.linears_mut() {
        if let Some(adapter) = linear.adapter.take() {
            let merged = linear.weight.value().f_to_kind(Kind::Float)?.f_add(&adapter.product()?)?;
            linear.weight.assign(&merged)?;
        }
    }
    model.lora = None;
    model.invalidate();
    Ok(())
}
