//! The sections `rollout:`, `algorithm:`, `optimizer:`, `trainer:` and `reward:` of a configuration.
//!
//! Defaults are the recipe of the E5/E9 family: 128 prompts x group of 5, 4 updates a step, AdamW
//! at a constant 5e-7, clip .2/.2, dual clip 3, KL .001 (k3), token mean.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::stop_rules::StopRule;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RolloutSection {
    /// Responses per prompt; the advantage compares them, so at least 2.
    pub group_size: usize,
    pub temperature: f64,
    pub top_p: f64,
    /// 0 = no limit.
    pub top_k: usize,
    /// Most sequences decoded at once, whole groups; others follow as they end. null: all of a step.
    pub max_sequences: Option<usize>,
    /// No CUDA graphs in decoding.
    pub enforce_eager: bool,
}

impl Default for RolloutSection {
    fn default() -> RolloutSection {
        RolloutSection {
            group_size: 5,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            max_sequences: None,
            enforce_eager: false,
        }
    }
}

/// How rewards of a group become advantages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Advantage {
    /// (R - mean) / (std + 1e-6) over the group.
    Grpo,
    /// R - mean: no std (Dr. GRPO; TRL's scale_rewards "none").
    DrGrpo,
    /// R - mean of the other members: leave-one-out.
    Rloo,
    /// (R - group's mean) / (std + 1e-6 over the step's whole batch) (TRL's scale_rewards "batch").
    BatchStd,
}

/// How token losses become one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Aggregation {
    /// Mean over all tokens of the optimizer batch.
    TokenMean,
    /// Mean over sequences of each sequence's mean.
    SequenceMean,
    /// Sum over tokens / (sequences * max_response_tokens).
    SumOverLmax,
}

/// Estimator of KL(policy || reference) per token, x = ref - new: -x, x^2/2, e^x - 1 - x.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KlEstimator {
    K1,
    K2,
    K3,
}

/// Whose probabilities the ratio compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RatioLevel {
    /// Each token's.
    Token,
    /// The whole response's, per token: exp(mean of new - old) (GSPO; TRL's importance_sampling_level).
    Sequence,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AlgorithmSection {
    pub advantage: Advantage,
    /// The ratio is clipped to [1 - clip_low, 1 + clip_high].
    pub clip_low: f64,
    pub clip_high: f64,
    /// c > 1: for negative advantages a token's loss is at most c*|A|. null = off.
    pub dual_clip: Option<f64>,
    pub aggregation: Aggregation,
    /// 0 = no reference policy is held or run.
    pub kl_coef: f64,
    pub kl_estimator: KlEstimator,
    pub ratio: RatioLevel,
    /// C: the policy loss times min(exp(old - rollout), C), for rollouts under other noise than the update. null = off.
    pub truncated_importance: Option<f64>,
    /// Added to the loss: -entropy_coef * mean entropy of a token. 0 = off.
    pub entropy_coef: f64,
    /// null = off.
    pub dynamic_sampling: Option<DynamicSampling>,
}

/// Groups whose rewards are all equal are replaced by further questions (DAPO).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DynamicSampling {
    /// Rounds of sampling a step, the first included; then it trains on what there is.
    pub max_rounds: u64,
}

impl Default for DynamicSampling {
    fn default() -> DynamicSampling {
        DynamicSampling { max_rounds: 3 }
    }
}

impl Default for AlgorithmSection {
    fn default() -> AlgorithmSection {
        AlgorithmSection {
            advantage: Advantage::Grpo,
            clip_low: 0.2,
            clip_high: 0.2,
            dual_clip: Some(3.0),
            aggregation: Aggregation::TokenMean,
            kl_coef: 0.001,
            kl_estimator: KlEstimator::K3,
            ratio: RatioLevel::Token,
            truncated_importance: None,
            entropy_coef: 0.0,
            dynamic_sampling: None,
        }
    }
}

/// What the learning rate does after warm-up, over the run's optimizer updates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedule {
    Constant,
    /// Down to min_lr_ratio * lr on a straight line.
    Linear,
    /// Down to it on half a cosine.
    Cosine,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerSection {
    pub lr: f64,
    /// AdamW's decay rates of the first and second moment.
    pub betas: [f64; 2],
    pub eps: f64,
    pub weight_decay: f64,
    /// As verl does; false leaves norms and biases without weight decay.
    pub decay_norms_and_biases: bool,
    /// Largest global gradient norm; null = no clipping.
    pub grad_clip: Option<f64>,
    /// Optimizer updates of linear warm-up to `lr`.
    pub warmup_steps: u64,
    /// What follows.
    pub schedule: LrSchedule,
    /// Where linear and cosine end, as a share of `lr`.
    pub min_lr_ratio: f64,
}

impl Default for OptimizerSection {
    fn default() -> OptimizerSection {
        OptimizerSection {
            lr: 5e-7,
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.01,
            decay_norms_and_biases: true,
            grad_clip: Some(1.0),
            warmup_steps: 0,
            schedule: LrSchedule::Constant,
            min_lr_ratio: 0.0,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TrainerSection {
    pub epochs: u64,
    /// Prompts per optimizer update; divides `data.prompts_per_step`.
    pub minibatch_prompts: usize,
    /// Sequences per forward and backward pass.
    pub microbatch_sequences: usize,
    /// Instead of `microbatch_sequences`: as many sequences as have this many tokens together, prompts included. null: not.
    pub microbatch_tokens: Option<usize>,
    /// Training steps between validations; 0 = only before the first and after the last step.
    pub val_every: u64,
    /// Training steps between checkpoints; 0 = only the last.
    pub save_every: u64,
    pub val_before_train: bool,
    /// Sequences decoded together in validation.
    pub val_batch_size: usize,
    /// Newest checkpoints kept.
    pub keep_last: usize,
    /// Best checkpoints by validation accuracy kept besides.
    pub keep_best: usize,
    /// Which validation accuracy is meant by best, e.g. `val/acc_clean`; null: that of the configuration's own full condition.
    pub best_metric: Option<String>,
    /// Steps with a non-finite loss or gradient before the run stops with a checkpoint.
    pub max_skipped_steps: u64,
    /// A run ends when one of them fires.
    pub stop_rules: Vec<StopRule>,
    /// Completions of every step that go into samples.jsonl; a large number keeps all.
    pub samples_per_step: usize,
    /// Compute blocks again in backward instead of keeping what is inside them: less memory, a third more time, the same
    /// gradients to the bit. null: on a GPU.
    pub gradient_checkpointing: Option<bool>,
    /// Keep the reference policy's weights in host memory but for the moment in which it is asked.
    pub offload_reference: bool,
    /// CPU threads; null = all cores. CPU results are bitwise the same only for the same count.
    pub threads: Option<usize>,
}

impl Default for TrainerSection {
    fn default() -> TrainerSection {
        TrainerSection {
            epochs: 2,
            minibatch_prompts: 32,
            microbatch_sequences: 4,
            microbatch_tokens: None,
            val_every: 20,
            save_every: 58,
            val_before_train: true,
            val_batch_size: 64,
            keep_last: 2,
            keep_best: 1,
            best_metric: None,
            max_skipped_steps: 20,
            stop_rules: Vec::new(),
            samples_per_step: 4,
            gradient_checkpointing: None,
            offload_reference: false,
            threads: None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RewardKind {
    /// An answer as GSM8K has it, found by `mode`.
    Gsm8k,
    /// A number, whatever the set: the last `####`, boxed or plain one, as a rational; `mode` says nothing.
    Numeric,
    /// What `command` says.
    Command,
}

/// How an answer is taken out of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RewardMode {
    /// The last `#### number` of the last 300 characters, string equality.
    Strict,
    /// The last number.
    Flexible,
    /// Last `####`, boxed or plain number, compared as rationals.
    Numeric,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RewardSection {
    pub kind: RewardKind,
    pub mode: RewardMode,
    /// Control arm: the step's rewards in a random order, so that they say nothing of the answers.
    pub shuffled: bool,
    /// A program and its arguments, for `kind: command`: JSON lines in, JSON lines out (rl/reward/command.rs).
    pub command: Option<Vec<String>>,
    /// Seconds that a command has for a batch of responses.
    pub timeout_s: f64,
    /// Times that a command that failed is started again before the run ends.
    pub max_restarts: u64,
    /// A penalty for long responses; null = off.
    pub overlong: Option<Overlong>,
    /// A weighted sum of several, in place of `kind`, `mode` and `command`. The first part says what is right in validation.
    pub sum: Vec<RewardPart>,
}

impl Default for RewardSection {
    fn default() -> RewardSection {
        RewardSection {
            kind: RewardKind::Gsm8k,
            mode: RewardMode::Strict,
            shuffled: false,
            command: None,
            timeout_s: 60.0,
            max_restarts: 3,
            overlong: None,
            sum: Vec::new(),
        }
    }
}

impl RewardSection {
    /// Whether anything is scored by a command.
    pub fn has_command(&self) -> bool {
        match self.sum.as_slice() {
            [] => self.kind == RewardKind::Command,
            sum => sum.iter().any(|part| part.kind == RewardKind::Command),
        }
    }
}

/// factor * clip((max_response_tokens - buffer_tokens - tokens) / buffer_tokens, -1, 0), added to the reward (DAPO).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Overlong {
    pub buffer_tokens: usize,
    pub factor: f64,
}

impl Default for Overlong {
    fn default() -> Overlong {
        Overlong { buffer_tokens: 0, factor: 1.0 }
    }
}

/// One part of a sum.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RewardPart {
    pub kind: RewardKind,
    pub mode: RewardMode,
    pub command: Option<Vec<String>>,
    pub weight: f64,
}

impl Default for RewardPart {
    fn default() -> RewardPart {
        RewardPart { kind: RewardKind::Gsm8k, mode: RewardMode::Strict, command: None, weight: 1.0 }
    }
}
