//! GPUs as NVML tells of them, against a fake NVML of eight: the monitor, a training run beside it, the commands.
#![allow(clippy::unwrap_used)]

mod commands;
mod monitor;
#[allow(dead_code)] // it serves tests/noise
#[path = "../noise/support.rs"]
mod small_run;
mod support;
mod training;
