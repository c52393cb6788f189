//! The CUDA kernels against their definitions. The very .cu files run here on the CPU under kernels/host's shim, in
//! several thread orders, and must give the bits of src/numerics; NVIDIA's own headers and the vectors of public
//! libraries are independent oracles. What nvcc made is checked too. Nothing here needs a GPU.
#![allow(unsafe_code, clippy::unwrap_used)]

mod bench;
mod codecs;
mod decode_attention;
mod device_path;
mod embedded;
mod fake_quant;
mod ffi;
mod generator;
mod host;
mod matmul;
mod mutation;
mod noise;
mod packed;
mod preconditions;
mod rms_norm;
mod rotary;
mod sampling;
mod selftest;
mod shim;
mod support;
mod swiglu;
