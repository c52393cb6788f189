//! The CUDA side of every operation; launch.rs is the one place that launches.

pub mod batch;
pub mod decode_attention;
pub mod fake_quant;
pub mod graph;
pub mod launch;
mod loaded;
pub mod matmul;
pub mod memory;
pub mod noise;
pub mod nvtx;
pub mod place;
mod properties;
pub mod rms_norm;
pub mod rotary;
pub mod sampling;
pub mod swiglu;
pub mod timer;
pub mod torch_graph;
mod zeros;
