//! Operations: one file each = definition and dispatch by device; cpu/ and cuda/ hold the two sides.

pub mod autograd;
pub mod cpu;
pub mod cuda;
pub mod embedding;
pub mod fake_quant;
pub mod matmul_error;
pub mod noisy_linear;
pub mod perturb;
pub mod profile;
pub mod straight_through;
pub mod token_logprobs;
