//! Rows of metrics.jsonl and samples.jsonl: deterministic, so nothing in them depends on the clock.

use serde_json::{Map, Value, json};

use super::evaluation::Validation;
use super::recipe::Recipe;
use super::rollout::Rollout;
use super::section::{AlgorithmSection, RewardSection};
use super::update::UpdateSummary;
use crate::inject::measured::StepInjection;

const IMPORTANCE: [&str; 2] = ["importance/mean", "importance/truncated"];
const ENTROPY_LOSS: &str = "loss/entropy";
const OVERLONG: &str = "reward/overlong";
const UNSCORABLE: &str = "reward/unscorable";
const DYNAMIC: [&str; 4] = [
    "dynamic_sampling/rounds",
    "dynamic_sampling/groups_sampled",
    "dynamic_sampling/groups_kept",
    "dynamic_sampling/reward_sampled",
];

/// The metrics of a training row that only some configurations have.
pub fn optional(algorithm: &AlgorithmSection, reward: &RewardSection) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    let mut add = |on: bool, new: &[&str]| names.extend(new.iter().filter(|_| on).map(|name| name.to_string()));
    add(algorithm.truncated_importance.is_some(), &IMPORTANCE);
    add(algorithm.entropy_coef != 0.0, &[ENTROPY_LOSS]);
    add(reward.overlong.is_some(), &[OVERLONG]);
    add(reward.has_command(), &[UNSCORABLE]);
    add(algorithm.dynamic_sampling.is_some(), &DYNAMIC);
    names.extend((0..reward.sum.len()).map(part_name));
    names
}

/// `reward/part_0`: the mean of a sum's part, before its weight.
fn part_name(part: usize) -> String {
    format!("reward/part_{part}")
}

/// One training step.
pub fn metrics_row(
    recipe: &Recipe,
    step: u64,
    epoch: u64,
    experience: &Rollout,
    summary: &UpdateSummary,
    injected: &StepInjection,
) -> Map<String, Value> {
    let n = experience.completions.len().max(1) as f64;
    let mean = |f: &dyn Fn(usize) -> f64| (0..experience.completions.len()).map(f).sum::<f64>() / n;
    let groups = (experience.completions.len() / group_of(experience)).max(1) as f64;
    let mut row = Map::new();
    row.insert("step".into(), json!(step));
    row.insert("kind".into(), json!("train"));
    row.insert("epoch".into(), json!(epoch));
    let mut put = |key: &str, value: f64| {
        row.insert(key.into(), json!(value));
    };
    let scored: Vec<f64> = experience.rewards.iter().flatten().copied().collect();
    // Of nothing scored: null.
    put("reward/mean", super::rollout::mean(&scored));
    put("reward/strict", mean(&|i| experience.scores[i].strict));
    put("reward/numeric", mean(&|i| experience.scores[i].numeric));
    put("reward/zero_std_groups", experience.zero_std_groups as f64 / groups);
    if !recipe.reward.sum.is_empty() {
        experience.part_means.iter().enumerate().for_each(|(part, &mean)| put(&part_name(part), mean));
    }
    if recipe.reward.has_command() {
        put(UNSCORABLE, 1.0 - scored.len() as f64 / n);
    }
    if recipe.reward.overlong.is_some() {
        put(OVERLONG, experience.overlong_mean);
    }
    if let Some(dynamic) = &experience.dynamic {
        let values = [dynamic.rounds as f64, dynamic.groups_sampled as f64, dynamic.groups_kept as f64];
        DYNAMIC.iter().zip(values.into_iter().chain([dynamic.reward_sampled])).for_each(|(name, v)| put(name, v));
    }
    put("response_tokens/mean", mean(&|i| experience.completions[i].logprobs.len() as f64));
    put("response_tokens/clipped_ratio", mean(&|i| f64::from(u8::from(!experience.completions[i].finished))));
    put("entropy", summary.entropy);
    put("loss/policy", summary.loss.policy_loss);
    put("loss/kl", summary.loss.kl_loss);
    if recipe.algorithm.entropy_coef != 0.0 {
        put(ENTROPY_LOSS, summary.loss.entropy_loss);
    }
    put("kl/ref", summary.loss.kl_ref());
    put("ratio/clipped_low", summary.loss.clipped_low_ratio());
    put("ratio/clipped_high", summary.loss.clipped_high_ratio());
    put("ratio/max", summary.loss.ratio_max);
    put("ratio/first_minibatch_max", summary.first_ratio_max);
    if recipe.algorithm.truncated_importance.is_some() {
        put(IMPORTANCE[0], summary.loss.importance_mean());
        put(IMPORTANCE[1], summary.loss.truncated_ratio());
    }
    put("logprob_gap/mean_abs", summary.logprob_gap_abs);
    put("grad_norm", summary.grad_norm);
    put("lr", summary.lr);
    put("skipped_steps", summary.skipped as f64);
    row.extend(injected.summary.clone());
    row.insert("injection/disagreements".into(), json!(injected.disagreements.len()));
    row
}

fn group_of(experience: &Rollout) -> usize {
    let members = experience.completions.iter().map(|c| c.sequence.member as usize + 1).max();
    members.unwrap_or(1)
}

/// One validation, every condition.
pub fn validation_row(validation: &Validation, epoch: u64) -> Map<String, Value> {
    let mut row = Map::new();
    row.insert("step".into(), json!(validation.step));
    row.insert("kind".into(), json!("val"));
    row.insert("epoch".into(), json!(epoch));
    for (condition, answers) in &validation.conditions {
        let correct = answers.iter().filter(|a| a.correct).count();
        let marks: String = answers.iter().map(|a| if a.correct { '1' } else { '0' }).collect();
        row.insert("val/n".into(), json!(answers.len()));
        row.insert(format!("val/correct_{}", condition.name()), json!(correct));
        row.insert(format!("val/acc_{}", condition.name()), json!(correct as f64 / answers.len().max(1) as f64));
        // One mark per question, in order: what a paired test between runs needs.
        row.insert(format!("val/questions_{}", condition.name()), json!(marks));
    }
    row
}

/// The first `limit` completions of a step.
pub fn sample_rows(step: u64, experience: &Rollout, limit: usize) -> Vec<Value> {
    (0..experience.completions.len().min(limit))
        .map(|i| {
            let completion = &experience.completions[i];
            json!({
                "step": step,
                "dataset_index": completion.sequence.uid.dataset_index,
                "member": completion.sequence.member,
                "response": experience.texts[i],
                "reward": experience.rewards[i],
                "reward_strict": experience.scores[i].strict,
                "reward_numeric": experience.scores[i].numeric,
                "advantage": experience.advantages[i],
                "finished": completion.finished,
            })
        })
        .collect()
}
