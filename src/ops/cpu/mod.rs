//! The CPU side of every operation: vectorised, parallel over rows.

mod element;
mod element_rounding;
mod error_segment;
pub mod fake_quant;
mod fake_quant_bands;
pub mod fake_quant_general;
mod fake_quant_portable;
pub mod matmul_error;
mod mxfp4;
pub mod normals;
#[cfg(target_arch = "x86_64")]
mod normals_avx2;
mod nvfp4;
#[cfg(target_arch = "x86_64")]
mod nvfp4_avx2;
#[cfg(target_arch = "x86_64")]
mod nvfp4_avx512;
pub mod path;
pub mod tensor;
mod uniforms;
