//! One training step's experience: sampled completions of a group per prompt, their rewards and advantages.

use super::advantage::{grpo_advantages, zero_std_groups};
use super::recipe::{PreparedQuestion, Recipe, keyed_shuffle};
use super::reward::RewardScore;
use crate::inject::injector::Injector;
use crate::model::generate::{Batching, Completion, Prompt, Request, Sampling, generate};
use crate::model::pass::{Pass, PromptUid};
use crate::model::qwen2::Qwen2;
use crate::model::tokenizer::Tokenizer;
use crate::numerics::noise_key::{Phase, Purpose, stream};
use crate::ops::matmul_error::RowKeys;
use crate::{Error, Result};

/// Group members stand together, prompts in order.
pub struct Rollout {
    pub completions: Vec<Completion>,
    pub texts: Vec<String>,
    pub scores: Vec<RewardScore>,
    pub rewards: Vec<f64>,
    pub advantages: Vec<f64>,
    pub zero_std_groups: usize,
}

/// Samples `group_size` completions of every question with the model as it stands (AQN applied or not). Memory that runs out
/// halves the sequences decoded at once (`halvings`, so far in the run).
pub fn rollout(
    model: &Qwen2,
    injector: &Injector,
    tokenizer: &Tokenizer,
    recipe: &Recipe,
    questions: &[&PreparedQuestion],
    step: u32,
    halvings: &mut u32,
    warn: &dyn Fn(&str),
    mut progress: impl FnMut(usize),
) -> Result<Rollout> {
    let prompts: Vec<Prompt> = questions
        .iter()
        .map(|q| Prompt { uid: PromptUid { step, dataset_index: q.index }, ids: q.prompt_ids.clone() })
        .collect();
    let sampling = Sampling {
        greedy: recipe.rollout.temperature == 0.0,
        temperature: recipe.rollout.temperature,
        top_p: recipe.rollout.top_p,
        top_k: recipe.rollout.top_k,
        seed: recipe.seed,
        phase: Phase::Rollout,
    };
    let (group, most_tokens) = (recipe.rollout.group_size, recipe.data.max_response_tokens);
    let all = prompts.len() * group;
    let most = recipe.rollout.max_sequences.unwrap_or(all).min(all);
    let pass = Pass { measure_norms: true, ..Pass::injected(injector, Phase::Rollout, RowKeys::new(Vec::new())) };
    injector.settle();
    let completions = loop {
        // Nothing of an attempt that failed counts.
        injector.forget();
        // A sequence does not depend on which others are decoded beside it: fewer at a time give the same.
        let at_once = (most >> *halvings).max(group);
        let request = Request {
            batching: Batching {
                max_sequences: Some(at_once),
                enforce_eager: recipe.rollout.enforce_eager,
                ..Batching::default()
            },
            warn,
            ..Request::new(&prompts, group, most_tokens, &model.config.eos_token_ids, &sampling)
        };
        match generate(model, &request, &pass, &mut progress) {
            Err(Error::OutOfMemory(message)) if at_once > group => {
                *halvings += 1;
                warn(&format!("out of memory in the rollout: {message}; fewer than {at_once} sequences at a time"));
            }
            result => break result?,
        }
    };
    let texts = completions.iter().map(|c| tokenizer.decode(c.sequence.response())).collect::<Result<Vec<String>>>()?;
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
