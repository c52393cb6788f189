//! What a run is made of: the resolved sections, and the questions they name, as token ids.

use crate::data::Question;
use crate::data::section::DataSection;
use crate::inject::injector::Injector;
use crate::inject::plan::{InjectionPlan, ModuleSpec};
use crate::inject::schedule::SigmaSchedule;
use crate::inject::section::{FakeQuantSection, NoiseInjectionSection, NoisyOpsSection};
use crate::model::generate::Batching;
use crate::model::section::ModelSection;
use crate::model::tokenizer::Tokenizer;
use crate::numerics::generator::uniform_u32;
use crate::numerics::noise_key::{Phase, Purpose, row_key, stream};
use crate::rl::section::{AlgorithmSection, OptimizerSection, RewardSection, RolloutSection, TrainerSection};
use crate::{Result, bail_input};

/// The sections of a configuration that training reads; config::Config makes it.
#[derive(Clone, Debug)]
pub struct Recipe {
    pub name: String,
    pub seed: u64,
    pub hash: String,
    pub yaml: String,
    pub model: ModelSection,
    pub data: DataSection,
    pub rollout: RolloutSection,
    pub algorithm: AlgorithmSection,
    pub optimizer: OptimizerSection,
    pub trainer: TrainerSection,
    pub reward: RewardSection,
    pub noisy_ops: NoisyOpsSection,
    pub noise_injection: NoiseInjectionSection,
    pub fake_quant: FakeQuantSection,
}

impl Recipe {
    /// How validation's sequences share the device.
    pub fn validation_batching(&self) -> Batching {
        Batching {
            max_sequences: Some(self.trainer.val_batch_size),
            enforce_eager: self.rollout.enforce_eager,
            ..Batching::default()
        }
    }

    /// What is allowed and may not be meant. `positions`: the model's max_position_embeddings.
    pub fn notices(&self, positions: usize) -> Vec<String> {
        let mut notices = Vec::new();
        let longest = self.data.max_prompt_tokens + self.data.max_response_tokens;
        if longest > positions {
            notices.push(format!(
                "data.max_prompt_tokens and data.max_response_tokens: {longest} together, but the model has {positions} \
                 positions: longer questions than that leaves room for are refused"
            ));
        }
        let TrainerSection { val_every, save_every, keep_best, best_metric, .. } = &self.trainer;
        if let Some(metric) =
            best_metric.as_ref().filter(|_| *keep_best > 0 && *val_every > 0 && save_every % val_every != 0)
        {
            notices.push(format!(
                "trainer.best_metric: {metric}: a checkpoint is compared by the validation of its step, and save_every: \
                 {save_every} is no multiple of val_every: {val_every}"
            ));
        }
        notices
    }

    /// Whether the KL penalty needs a second model: the base of adapters is the reference policy itself.
    pub fn has_reference_model(&self) -> bool {
        self.algorithm.kl_coef != 0.0 && self.model.lora.is_none()
    }

    /// What is injected into every one of these modules.
    pub fn injection_plan(&self, modules: &[ModuleSpec]) -> Result<InjectionPlan> {
        let (aqn, ops, quant) = (&self.noise_injection, &self.noisy_ops, &self.fake_quant);
        InjectionPlan::resolve(aqn, ops, quant, modules, self.seed)
    }

    pub fn injector(&self, modules: &[ModuleSpec]) -> Result<Injector> {
        let plan = self.injection_plan(modules)?;
        Ok(Injector::applying(plan.clone(), plan, self.rollout.group_size as u64))
    }

    /// What a static activation scale is calibrated on: the first training prompts, whatever their order in an epoch.
    pub fn calibration_prompts<'a>(&self, train: &'a [PreparedQuestion]) -> Vec<&'a [u32]> {
        train.iter().take(self.fake_quant.calibration_prompts()).map(|q| q.prompt_ids.as_slice()).collect()
    }

    /// Errors when the training set is smaller than one step.
    pub fn schedule(&self, training_questions: usize) -> Result<SigmaSchedule> {
        let steps_per_epoch = training_questions / self.data.prompts_per_step;
        if steps_per_epoch == 0 {
            bail_input!(
                "data.prompts_per_step: found {}, expected at most the {training_questions} training questions",
                self.data.prompts_per_step
            );
        }
        SigmaSchedule::resolve(&self.noise_injection, steps_per_epoch as u64, self.trainer.epochs)
    }

    /// Which of `n` training questions `step` asks: consecutive ones in its epoch's order; and, with dynamic sampling, what
    /// may replace some of them.
    pub fn step_questions(&self, n: usize, schedule: &SigmaSchedule, step: u64) -> Result<[Vec<usize>; 2]> {
        let order = epoch_order(n, self.data.shuffle, self.seed, schedule.epoch(step))?;
        let first = ((step - 1) % schedule.steps_per_epoch()) as usize * self.data.prompts_per_step;
        let own = order[first..first + self.data.prompts_per_step].to_vec();
        let further = match self.algorithm.dynamic_sampling {
            Some(_) => further_order(n, &own, self.seed, step as u32)?,
            None => Vec::new(),
        };
        Ok([own, further])
    }

    /// Optimizer updates of the whole run.
    pub fn total_updates(&self, schedule: &SigmaSchedule) -> u64 {
        schedule.total_steps() * (self.data.prompts_per_step / self.trainer.minibatch_prompts) as u64
    }
}

/// A question ready for the model.
#[derive(Clone, Debug)]
pub struct PreparedQuestion {
    pub index: u32, // position in the data set: part of the noise keys
    pub question: String,
    pub prompt_ids: Vec<u32>,
    pub ground_truth: String,
}

/// Renders every question as a user turn (question, one space, suffix) in the model's chat template.
pub fn prepare(questions: &[Question], data: &DataSection, tokenizer: &Tokenizer) -> Result<Vec<PreparedQuestion>> {
    questions
        .iter()
        .map(|q| {
            let text = if data.prompt_suffix.is_empty() {
                q.question.clone()
            } else {
                format!("{} {}", q.question, data.prompt_suffix)
            };
            let prompt_ids = tokenizer.chat_prompt(&text)?;
            if prompt_ids.len() > data.max_prompt_tokens {
                bail_input!(
                    "data.max_prompt_tokens: found question {} with {} tokens, expected at most {}",
                    q.index,
                    prompt_ids.len(),
                    data.max_prompt_tokens
                );
            }
            let (question, ground_truth) = (q.question.clone(), q.ground_truth.clone());
            Ok(PreparedQuestion { index: q.index, question, prompt_ids, ground_truth })
        })
        .collect()
}

/// The order of `n` questions in `epoch`: shuffled, or 0..n.
pub fn epoch_order(n: usize, shuffle: bool, seed: u64, epoch: u64) -> Result<Vec<usize>> {
    let mut order: Vec<usize> = (0..n).collect();
    if shuffle {
        keyed_shuffle(&mut order, seed, stream(Purpose::Other, Phase::Rollout, 0, 0)?, epoch as u32);
    }
    Ok(order)
}

/// What dynamic sampling may ask in `step` besides its `own` questions: all others, in an order of the step's own.
fn further_order(n: usize, own: &[usize], seed: u64, step: u32) -> Result<Vec<usize>> {
    let mut is_own = vec![false; n];
    own.iter().for_each(|&i| is_own[i] = true);
    let mut order: Vec<usize> = (0..n).filter(|&i| !is_own[i]).collect();
    keyed_shuffle(&mut order, seed, stream(Purpose::Other, Phase::Rollout, 0, 2)?, step);
    Ok(order)
}

/// Fisher-Yates with 32-bit uniforms keyed by (seed, stream, counter, place).
pub fn keyed_shuffle<T>(items: &mut [T], seed: u64, stream: u32, counter: u32) {
    for i in (1..items.len()).rev() {
        let u = uniform_u32(seed, stream, row_key(counter, i as u32), 0);
        items.swap(i, ((u64::from(u) * (i as u64 + 1)) >> 32) as usize);
    }
}
