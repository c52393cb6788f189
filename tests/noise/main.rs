//! Noise as the model sees it: whose draw a token gets, what the backward pass computes with it, what AQN does to a
//! weight, and that a run notices when something else was injected than planned. numerics.md sections 4, 5 and 7.
#![allow(clippy::unwrap_used)]

mod activations;
mod activations_model;
mod aqn;
mod backward;
mod batching;
mod bridge;
mod draws;
mod fake_quant_tensor;
mod lora;
mod mutation;
mod nonfinite;
mod recompute;
mod shared_draws;
mod stochastic_weights;
mod support;
mod weight_gradient;
