//! A whole small model with error in every product: a pass whose blocks will be computed again takes, to the bit, the products of
//! one that keeps them, though it wants no gradient itself; over few rows and over many.

use tch::{Device, Kind};

use super::{Check, Compared, enter};
use crate::Result;
use crate::inject::injector::Injector;
use crate::inject::plan::InjectionPlan;
use crate::inject::section::{FakeQuantSection, NoiseInjectionSection, NoisyOpsSection};
use crate::model::config::Qwen2Config;
use crate::model::load::random_model;
use crate::model::logprobs::response_logprobs;
use crate::model::pass::{Pass, PromptUid, Sequence};
use crate::numerics::noise_key::Phase;
use crate::ops::cuda::launch::Executor;
use crate::ops::matmul_error::RowKeys;

/// Tokens of a sequence, and of its prompt.
const LENGTH: usize = 40;
const PROMPT: usize = 7;

pub fn checks(executor: &dyn Executor, checks: &mut Vec<Check>) -> Result<()> {
    for sequences in [2, 12] {
        let run = |compared: &mut Compared| computed_again(executor.device(), sequences, compared);
        let case = format!("blocks computed again, {sequences} sequences");
        enter(checks, "model", case, Kind::BFloat16, (sequences as usize * LENGTH, 64), run)?;
    }
    Ok(())
}

fn computed_again(device: Device, sequences: u32, compared: &mut Compared) -> Result<()> {
    let model = random_model(Qwen2Config::preset("tiny-4x64")?, 5, 0.2, device, Kind::BFloat16)?;
    let noise = NoisyOpsSection { enabled: true, exclude_modules: vec![], ..NoisyOpsSection::default() };
    let (aqn, quant) = (NoiseInjectionSection::default(), FakeQuantSection::default());
    let plan = InjectionPlan::resolve(&aqn, &noise, &quant, &model.config.modules(), 11)?;
    let injector = Injector::applying(plan.clone(), plan, 1);
    let sequence = |number: u32| Sequence {
        uid: PromptUid { step: 7, dataset_index: number },
        member: 0,
        ids: (0..LENGTH as u32).map(|p| 2 + (number * 31 + p * 17) % 40).collect(),
        prompt_len: PROMPT,
    };
    let all: Vec<Sequence> = (0..sequences).map(sequence).collect();
    let all: Vec<&Sequence> = all.iter().collect();
    let pass = || Pass::injected(&injector, Phase::Update, RowKeys::new(Vec::new()));
    let kept = response_logprobs(&model, &all, 1.0, &Pass { differentiable: true, ..pass() })?;
    let first = response_logprobs(&model, &all, 1.0, &Pass { to_recompute: true, ..pass() })?;
    compared.tensors(&first.logprobs, &kept.logprobs.f_to_device(Device::Cpu)?)
}
