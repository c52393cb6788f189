//! The CPU side of every operation: vectorised, parallel over rows.

mod error_segment;
pub mod fake_quant;
#[cfg(target_arch = "x86_64")]
mod fake_quant_avx2;
pub mod fake_quant_general;
mod fake_quant_portable;
pub mod matmul_error;
pub mod normals;
#[cfg(target_arch = "x86_64")]
mod normals_avx2;
pub mod tensor;
