//! Number formats and noise as pure functions: codecs, block formats, Philox, the normal generator.

pub mod block_format;
pub mod block_scale;
pub mod compressed_tensors;
pub mod e2m1;
pub mod e4m3;
pub mod e8m0;
pub mod element;
pub mod error_law;
pub mod format;
pub mod generator;
pub mod model_opt;
pub mod noise_key;
pub mod original;
pub mod packed;
pub mod philox;
pub mod stochastic_rounding;
pub mod tensor_error;
