//! How far the model's output moves when only layer l, or a window of layers from l on, is quantized or noisy:
//!
//!   kl(l) = mean over tokens of sum_v p(v) (log p(v) - log q_l(v)), in nats
//!
//! with p the clean model's next-token distribution and q_l that of the model injected in those layers alone. What is injected is
//! an injection plan, as in training.

use serde::Serialize;
use tch::{Kind, Tensor};

use super::prompts::Laid;
use crate::Result;
use crate::inject::injector::Injector;
use crate::inject::plan::{InjectionPlan, ModuleSpec};
use crate::inject::section::{FakeQuantSection, LayerSet, NoiseInjectionSection, NoisyOpsSection};
use crate::model::pass::Pass;
use crate::model::qwen2::Qwen2;
use crate::numerics::format::Format;
use crate::numerics::noise_key::Phase;
use crate::ops::matmul_error::RowKeys;

/// What is done to the layers.
#[derive(Clone, Copy, Debug)]
pub enum Arm {
    /// Fake-quantized weights.
    Weights(Format),
    /// Relative Gaussian error of every matrix product.
    Noise(f64),
}

impl Arm {
    pub fn name(self) -> String {
        match self {
            Arm::Weights(format) => format.to_string(),
            Arm::Noise(scale) => format!("noise {scale}"),
        }
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct Sensitivity {
    pub arm: String,
    /// Layers of a window.
    pub window: usize,
    pub layers: Vec<LayerSensitivity>,
    /// With all layers injected.
    pub all_layers: Shift,
}

#[derive(Clone, Debug, Serialize)]
pub struct LayerSensitivity {
    /// The window's first.
    pub layer: usize,
    #[serde(flatten)]
    pub shift: Shift,
}

/// Of the next-token distribution, means over tokens.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Shift {
    pub kl: f64,
    /// Share of tokens whose likeliest next token is another one.
    pub top1_changed_ratio: f64,
}

/// `progress` is told of every forward pass: layers + 2 a prompt.
///
/// # Errors
/// As the injection plan's; what libtorch answers.
pub fn scan_sensitivity(
    model: &Qwen2,
    prompts: &[Vec<u32>],
    (arm, window): (Arm, usize),
    progress: &mut dyn FnMut() -> Result<()>,
) -> Result<Sensitivity> {
    let _no_grad = tch::no_grad_guard();
    let (layers, modules) = (model.config.num_hidden_layers, model.module_specs());
    let firsts: Vec<usize> = (0..=layers.saturating_sub(window)).collect();
    let laid = prompts.iter().enumerate().map(|(number, ids)| Laid::new(ids, number, model));
    let laid = laid.collect::<Result<Vec<Laid>>>()?;
    let mut clean = Vec::new();
    for prompt in &laid {
        clean.push(prompt.logprobs(model, &Pass::clean(RowKeys::new(Vec::new())))?);
        progress()?;
    }
    let mut shift = |injected: LayerSet| -> Result<Shift> {
        let plan = plan(&modules, arm, injected, layers)?;
        let injector = Injector::applying(plan.clone(), plan, 1);
        model.invalidate();
        let (mut sum, mut tokens) = (Shift::default(), 0.0);
        for (prompt, clean) in laid.iter().zip(&clean) {
            let pass = Pass::injected(&injector, Phase::Validation, RowKeys::new(Vec::new()));
            let moved = of_prompt(clean, &prompt.logprobs(model, &pass)?)?;
            let rows = clean.size()[0] as f64;
            sum.kl += moved.kl * rows;
            sum.top1_changed_ratio += moved.top1_changed_ratio * rows;
            tokens += rows;
            progress()?;
        }
        model.invalidate();
        Ok(Shift { kl: sum.kl / tokens, top1_changed_ratio: sum.top1_changed_ratio / tokens })
    };
    let of_window = |&layer: &usize| {
        let injected = LayerSet::Only((layer..layer + window).collect());
        Ok(LayerSensitivity { layer, shift: shift(injected)? })
    };
    let of_layers = firsts.iter().map(of_window).collect::<Result<Vec<_>>>()?;
    let all_layers = shift(LayerSet::All)?;
    Ok(Sensitivity { arm: arm.name(), window, layers: of_layers, all_layers })
}

/// The plan of an arm in all layers.
///
/// # Errors
/// As the injection plan's.
pub fn injecting_all(modules: &[ModuleSpec], arm: Arm) -> Result<InjectionPlan> {
    let layers = modules.iter().filter_map(|module| module.layer).max().map_or(0, |last| last + 1);
    plan(modules, arm, LayerSet::All, layers)
}

/// How many forward passes [`scan_sensitivity`] makes.
pub fn passes(layers: usize, window: usize, prompts: usize) -> usize {
    prompts * (layers.saturating_sub(window) + 3)
}

fn plan(modules: &[ModuleSpec], arm: Arm, injected: LayerSet, layers: usize) -> Result<InjectionPlan> {
    let others = (0..layers).filter(|layer| !injected.contains(Some(*layer))).collect();
    let (noise, quant) = match arm {
        Arm::Weights(format) => (
            NoisyOpsSection::default(),
            FakeQuantSection {
                enabled: true,
                weights: Some(format),
                exclude_layers: LayerSet::Only(others),
                ..FakeQuantSection::default()
            },
        ),
        Arm::Noise(scale) => (
            NoisyOpsSection { enabled: true, error_scale: scale, layers: injected, ..NoisyOpsSection::default() },
            FakeQuantSection::default(),
        ),
    };
    InjectionPlan::resolve(&NoiseInjectionSection::default(), &noise, &quant, modules, 0)
}

/// p, q: f32 log-probabilities [tokens, vocab].
fn of_prompt(p: &Tensor, q: &Tensor) -> Result<Shift> {
    let kl = p.f_exp()?.f_mul(&p.f_sub(q)?)?.f_sum_dim_intlist([1i64].as_slice(), false, Kind::Double)?;
    let changed = p.f_argmax(1, false)?.f_ne_tensor(&q.f_argmax(1, false)?)?;
    let mean = |t: Tensor| -> Result<f64> { Ok(f64::try_from(t.f_mean(Kind::Double)?)?) };
    Ok(Shift { kl: mean(kl)?, top1_changed_ratio: mean(changed.f_to_kind(Kind::Double)?)? })
}
