//! SRDD: where in a model, and how much, quantization and hardware errors hurt (numerics.md section 6).
//!
//! Weights and activations against formats, the output against each layer's injection, multipliers of AQN from any of them.

pub mod activations;
pub mod changes;
pub mod gaussian;
pub mod multipliers;
pub mod prompts;
pub mod sensitivity;
pub mod summary;
pub mod weights;
