//! numerics/ and ops/cpu/ against nearest search, public libraries' vectors, statistical gates and each other.
#![allow(clippy::unwrap_used)]

mod codecs;
mod fast_fake_quant;
mod format_gates;
mod generator;
mod generator_gates;
mod grammar;
mod library_tiles;
mod library_vectors;
mod matmul_error;
mod nonfinite;
mod properties;
mod random;
mod stochastic_rounding;
mod support;
