//! Reinforcement learning: rollout, reward, advantage, loss, optimizer, evaluation, trainer.

pub mod advantage;
pub mod evaluation;
pub mod flops;
pub mod launch;
pub mod loss;
pub mod lr_schedule;
pub mod memory;
pub mod metrics;
pub mod microbatch;
pub mod optimizer;
pub mod recipe;
pub mod reward;
pub mod rollout;
pub mod section;
pub mod state;
pub mod stop_rules;
pub mod supervised;
pub mod timing;
pub mod trainer;
pub mod update;
