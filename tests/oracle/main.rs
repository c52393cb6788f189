//! Live parity with public libraries: transformers (log-probs, greedy tokens, gradients, directories it can load);
//! PEFT (adapters both ways); compressed-tensors, torchao and ml_dtypes (quantized values on fresh random inputs; packed checkpoints both ways).
//!
//! The expected values are made on the spot by this directory's scripts in a Python that has the libraries:
//! `$TEMPER_PYTHON`, else `.venv/bin/python`. Without one, and where ../shared is absent, the tests that need them
//! skip and say so.
#![allow(clippy::unwrap_used)]

mod adapters;
mod commands;
mod expected;
mod library;
mod packed;
mod peers;
mod quantizer_inputs;
mod quantizer_quirks;
mod quantizers;
#[path = "../numerics/random.rs"]
mod random;
mod written;
