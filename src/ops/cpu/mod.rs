//! The CPU side of every operation: vectorised, parallel over rows.

mod error_segment;
pub mod fake_quant;
pub mod matmul_error;
pub mod normals;
#[cfg(target_arch = "x86_64")]
mod normals_avx2;
pub mod path;
pub mod tensor;
