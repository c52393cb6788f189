//! Operations: one file each = definition and dispatch by device; cpu/ and cuda/ hold the two sides.

pub mod autograd;
pub mod cpu;
pub mod cuda;
pub mod decode_attention;
pub mod embedding;
pub mod fake_quant;
pub mod matmul_error;
pub mod noisy_linear;
pub mod packed_attention;
pub mod perturb;
pub mod profile;
pub mod rms_norm;
pub mod rotary;
pub mod sampling;
pub mod straight_through;
pub mod swiglu;
pub mod token_logprobs;
