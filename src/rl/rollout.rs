//! One training step's experience: sampled completions of a group per prompt, their rewards and advantages.
//!
//! With `algorithm.dynamic_sampling` (DAPO, arXiv 2503.14476, 3.2) groups whose rewards are all equal teach nothing and are
//! replaced: as many further questions as are missing are sampled, in at most `max_rounds` rounds. The rewards are those
//! before the penalty for length and before shuffling. If some are still missing, the step trains on the groups that there
//! are; if there are none at all, on the first round's, whose advantages are 0. Which questions come further is a function
//! of seed and step (recipe.rs), so a step does not depend on what earlier ones used up.

use super::advantage::{advantages, teaches_nothing, zero_std_groups};
use super::microbatch::Halving;
use super::recipe::{PreparedQuestion, Recipe, keyed_shuffle};
use super::reward::RewardScore;
use super::reward::scorer::{Item, Scored, Scorer, overlong_penalty};
use crate::Result;
use crate::inject::injector::Injector;
use crate::model::generate::{Batching, Completion, Prompt, Request, Sampling};
use crate::model::pass::{Pass, PromptUid};
use crate::model::qwen2::Qwen2;
use crate::model::tokenizer::Tokenizer;
use crate::numerics::noise_key::{Phase, Purpose, stream};
use crate::ops::matmul_error::RowKeys;
use crate::ops::profile::span;

/// Group members stand together, prompts in order.
#[derive(Default)]
pub struct Rollout {
    pub completions: Vec<Completion>,
    pub texts: Vec<String>,
    pub scores: Vec<RewardScore>,
    /// None: unscorable.
    pub rewards: Vec<Option<f64>>,
    pub advantages: Vec<f64>,
    pub zero_std_groups: usize,
    /// Of each part of the reward, over the completions that it could score.
    pub part_means: Vec<f64>,
    /// Mean penalty for length.
    pub overlong_mean: f64,
    pub dynamic: Option<DynamicSummary>,
    /// (prompt, response) tokens of what was sampled and is not trained on.
    pub left_out: Vec<(usize, usize)>,
    /// For the console.
    pub warnings: Vec<String>,
}

/// What dynamic sampling did in a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DynamicSummary {
    pub rounds: u64,
    pub groups_sampled: usize,
    pub groups_kept: usize,
    /// Groups that the step should have.
    pub groups_wanted: usize,
    /// Mean reward of everything sampled: that of the groups kept is not the policy's.
    pub reward_sampled: f64,
}

impl DynamicSummary {
    /// What to say of a step that did not get all its groups.
    fn shortfall(&self, step: u32) -> Option<String> {
        let trained = match self.groups_kept {
            kept if kept >= self.groups_wanted => return None,
            0 => "the first round's, which teach nothing".to_string(),
            kept => format!("{kept} of {} groups", self.groups_wanted),
        };
        let (sampled, rounds) = (self.groups_sampled, self.rounds);
        Some(format!("step {step}: dynamic sampling: {sampled} groups in {rounds} rounds; training on {trained}"))
    }
}

struct Sample {
    completion: Completion,
    text: String,
    score: RewardScore,
    scored: Scored,
}

type Group = Vec<Sample>;

/// What sampling needs.
pub struct Sampler<'a> {
    pub model: &'a Qwen2,
    pub injector: &'a Injector,
    pub tokenizer: &'a Tokenizer,
    pub recipe: &'a Recipe,
    pub scorer: &'a Scorer,
    pub step: u32,
    pub halving: Halving<'a>,
}

impl Sampler<'_> {
    /// `group_size` completions of every question with the model as it stands (AQN applied or not). `further`: what
    /// dynamic sampling may ask besides, in its order.
    pub fn rollout(
        &self,
        questions: &[&PreparedQuestion],
        further: &[&PreparedQuestion],
        mut progress: impl FnMut(usize),
    ) -> Result<Rollout> {
        let mut groups = self.sample(questions, &mut progress)?;
        let (mut dynamic, mut left_out) = (None, Vec::new());
        if let Some(section) = &self.recipe.algorithm.dynamic_sampling {
            let (replaced, others, summary) = self.replace(groups, further, section.max_rounds, &mut progress)?;
            (groups, dynamic) = (replaced, Some(summary));
            left_out = others.iter().flatten().map(|sample| sample.completion.sequence.lengths()).collect();
        }
        let mut warnings = self.scorer.take_warnings();
        warnings.extend(dynamic.as_ref().and_then(|summary| summary.shortfall(self.step)));
        Ok(Rollout { dynamic, left_out, warnings, ..self.finish(groups)? })
    }

    /// The groups of one round of sampling.
    fn sample(&self, questions: &[&PreparedQuestion], progress: &mut dyn FnMut(usize)) -> Result<Vec<Group>> {
        let recipe = self.recipe;
        let prompts: Vec<Prompt> = questions
            .iter()
            .map(|q| Prompt { uid: PromptUid { step: self.step, dataset_index: q.index }, ids: q.prompt_ids.clone() })
            .collect();
        let group = recipe.rollout.group_size;
        let completions = completions(self.model, self.injector, recipe, &prompts, None, &self.halving, progress)?;
        let decode = |c: &Completion| self.tokenizer.decode(c.sequence.response());
        let texts = completions.iter().map(decode).collect::<Result<Vec<String>>>()?;
        let item =
            |(i, text)| Item { question: questions[i / group], text, member: (i % group) as u32, validation: false };
        let items: Vec<Item> = texts.iter().map(String::as_str).enumerate().map(item).collect();
        let scored = self.scorer.score(&items)?;
        let scores: Vec<RewardScore> =
            items.iter().map(|item| RewardScore::new(item.text, &item.question.ground_truth)).collect();
        let mut samples = completions
            .into_iter()
            .zip(texts)
            .zip(scores.into_iter().zip(scored))
            .map(|((completion, text), (score, scored))| Sample { completion, text, score, scored });
        Ok((0..questions.len()).map(|_| samples.by_ref().take(group).collect()).collect())
    }

    /// Keeps the groups that teach something and samples further ones in place of the others; what it keeps, and the others.
    fn replace(
        &self,
        first: Vec<Group>,
        further: &[&PreparedQuestion],
        max_rounds: u64,
        progress: &mut dyn FnMut(usize),
    ) -> Result<(Vec<Group>, Vec<Group>, DynamicSummary)> {
        let wanted = first.len();
        let mut sampled: Vec<f64> = Vec::new();
        let mut count = |groups: &[Group]| {
            sampled.extend(groups.iter().flatten().filter_map(|sample| sample.scored.reward));
        };
        let teaches = |group: &Group| {
            let rewards: Vec<Option<f64>> = group.iter().map(|sample| sample.scored.reward).collect();
            !teaches_nothing(&rewards)
        };
        count(&first);
        let (mut kept, dropped): (Vec<_>, Vec<_>) = first.into_iter().partition(teaches);
        let (mut rounds, mut used, mut left_out) = (1, 0, Vec::new());
        while kept.len() < wanted && rounds < max_rounds && used < further.len() {
            let next = &further[used..further.len().min(used + wanted - kept.len())];
            used += next.len();
            let groups = self.sample(next, progress)?;
            count(&groups);
            let (teaching, others): (Vec<_>, Vec<_>) = groups.into_iter().partition(teaches);
            kept.extend(teaching);
            left_out.extend(others);
            rounds += 1;
        }
        let summary = DynamicSummary {
            rounds,
            groups_sampled: wanted + used,
            groups_kept: kept.len(),
            groups_wanted: wanted,
            reward_sampled: mean(&sampled),
        };
        if kept.is_empty() {
            return Ok((dropped, left_out, summary));
        }
        left_out.extend(dropped);
        Ok((kept, left_out, summary))
    }

    /// Rewards and advantages of the groups that the step trains on.
    fn finish(&self, groups: Vec<Group>) -> Result<Rollout> {
        let recipe = self.recipe;
        let group = recipe.rollout.group_size;
        let samples: Vec<Sample> = groups.into_iter().flatten().collect();
        let penalties: Vec<f64> = match &recipe.reward.overlong {
            Some(overlong) => samples
                .iter()
                .map(|s| overlong_penalty(overlong, s.completion.logprobs.len(), recipe.data.max_response_tokens))
                .collect(),
            None => vec![0.0; samples.len()],
        };
        let mut rewards: Vec<Option<f64>> =
            samples.iter().zip(&penalties).map(|(sample, penalty)| sample.scored.reward.map(|r| r + penalty)).collect();
        if recipe.reward.shuffled {
            // A control arm: the rewards say nothing of the answers any more.
            keyed_shuffle(&mut rewards, recipe.seed, stream(Purpose::Other, Phase::Rollout, 0, 1)?, self.step);
        }
        let parts = samples.first().map_or(0, |sample| sample.scored.parts.len());
        let of_part = |part: usize| -> Vec<f64> { samples.iter().filter_map(|s| s.scored.parts[part]).collect() };
        let part_means = (0..parts).map(|part| mean(&of_part(part))).collect();
        let (mut completions, mut texts, mut scores) = (Vec::new(), Vec::new(), Vec::new());
        for sample in samples {
            completions.push(sample.completion);
            texts.push(sample.text);
            scores.push(sample.score);
        }
        Ok(Rollout {
            advantages: advantages(recipe.algorithm.advantage, &rewards, group)?,
            zero_std_groups: zero_std_groups(&rewards, group)?,
            completions,
            texts,
            scores,
            rewards,
            part_means,
            overlong_mean: mean(&penalties),
            ..Rollout::default()
        })
    }
}

/// The completions of `prompts`. Memory that runs out halves the sequences decoded at once. With `limits` (response tokens of
/// each sequence, group members together) every response has exactly that length: benchmarks use it, whose models have
/// learnt no end.
pub fn completions(
    model: &Qwen2,
    injector: &Injector,
    recipe: &Recipe,
    prompts: &[Prompt],
    limits: Option<&[usize]>,
    halving: &Halving,
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
    let (group, most_tokens) = (recipe.rollout.group_size, recipe.data.max_response_tokens);
    let stop_ids = if limits.is_some() { &[] } else { &model.config.eos_token_ids[..] };
    let keys = RowKeys::new(Vec::new());
    let pass = Pass { measure_norms: true, ..Pass::injected(injector, Phase::Rollout, keys) };
    let batching = Batching {
        max_sequences: recipe.rollout.max_sequences,
        enforce_eager: recipe.rollout.enforce_eager,
        ..Batching::default()
    };
    let request = Request { limits, batching, ..Request::new(prompts, group, most_tokens, stop_ids, &sampling) };
    halving.generate(model, &request, &pass, "rollout.max_sequences", progress)
}

/// NaN of nothing: null in the file.
pub(super) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}
