//! One training step's experience: sampled completions of a group per prompt, their rewards and advantages.

use super::advantage::{grpo_advantages, zero_std_groups};
use super::recipe::{PreparedQuestion, Recipe, keyed_shuffle};
use super::reward::RewardScore;
use crate::Result;
use crate::inject::injector::Injector;
use crate::model::generate::{Completion, Prompt, Request, Sampling, generate};
use crate::model::pass::{Pass, PromptUid};
use crate::model::qwen2::Qwen2;
use crate::model::tokenizer::Tokenizer;
use crate::numerics::noise_key::{Phase, Purpose, stream};
use crate::ops::matmul_error::RowKeys;
use crate::ops::profile::span;

/// Group members stand together, prompts in order.
pub struct Rollout {
    pub completions: Vec<Completion>,
    pub texts: Vec<String>,
    pub scores: Vec<RewardScore>,
    pub rewards: Vec<f64>,
    pub advantages: Vec<f64>,
    pub zero_std_groups: usize,
}

/// Samples `group_size` completions of every question with the model as it stands (AQN applied or not), and scores them.
pub fn rollout(
    model: &Qwen2,
    injector: &Injector,
    tokenizer: &Tokenizer,
    recipe: &Recipe,
    questions: &[&PreparedQuestion],
    step: u32,
    progress: impl FnMut(usize),
) -> Result<Rollout> {
    let prompts: Vec<Prompt> = questions
        .iter()
        .map(|q| Prompt { uid: PromptUid { step, dataset_index: q.index }, ids: q.prompt_ids.clone() })
        .collect();
    let completions = completions(model, injector, recipe, &prompts, None, progress)?;
    let texts = completions.iter().map(|c| tokenizer.decode(c.sequence.response())).collect::<Result<Vec<String>>>()?;
    let group = recipe.rollout.group_size;
    let scores: Vec<RewardScore> =
        texts.iter().enumerate().map(|(i, text)| RewardScore::new(text, &questions[i / group].ground_truth)).collect();
    let mut rewards: Vec<f64> = scores.iter().map(|s| s.get(recipe.reward.mode)).collect();
    if recipe.reward.shuffled {
        // A control arm: the rewards say nothing of the answers any more.
        keyed_shuffle(&mut rewards, recipe.seed, stream(Purpose::Other, Phase::Rollout, 0, 1)?, step);
    }
    Ok(Rollout {
        advantages: grpo_advantages(&rewards, group)?,
        zero_std_groups: zero_std_groups(&rewards, group)?,
        completions,
        texts,
        scores,
        rewards,
    })
}

/// The completions alone. With `limits` (response tokens of each sequence, group members together) every response has
/// exactly that length: benchmarks use it, whose models have learnt no end.
pub fn completions(
    model: &Qwen2,
    injector: &Injector,
    recipe: &Recipe,
    prompts: &[Prompt],
    limits: Option<&[usize]>,
    progress: impl FnMut(usize),
) -> Result<Vec<Completion>> {
    let _span = span("rollout");
    let sampling = Sampling {
        greedy: recipe.rollout.temperature == 0.0,
        temperature: recipe.rollout.temperature,
        top_p: recipe.rollout.top_p,
        top_k: recipe.rollout.top_k,
        seed: recipe.seed,
        phase: Phase::Rollout,
    };
    let request = Request {
        prompts,
        group_size: recipe.rollout.group_size,
        max_new_tokens: recipe.data.max_response_tokens,
        limits,
        stop_ids: if limits.is_some() { &[] } else { &model.config.eos_token_ids },
        sampling: &sampling,
        kv_cache: true,
    };
    let pass = Pass { measure_norms: true, ..Pass::injected(injector, Phase::Rollout, RowKeys::new(Vec::new())) };
    generate(model, &request, &pass, progress)
}
