//! The program as its users meet it: through the binary, from YAML to checkpoint, killed, interrupted and misused.
#![allow(clippy::unwrap_used)]

mod activation_scales;
mod bad_input;
mod bench;
mod bench_steps;
mod lora;
mod memory;
mod options;
mod out_of_memory;
mod outputs;
mod packed;
mod registry_minis;
mod resume;
mod robustness;
mod signals;
mod stop_rules;
mod support;
mod sweep;
