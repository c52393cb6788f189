//! Layer scans: metrics against the definitions, sensitivities against what they must be, the command as its users meet it.
#![allow(clippy::unwrap_used)]

mod command;
mod faults;
mod scans;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tch::{Device, Kind};
use temper::model::config::Qwen2Config;
use temper::model::load::{random_model, save_model};
use temper::model::qwen2::Qwen2;
use temper::model::section::Dtype;

/// Random weights; large enough that layers do something.
pub fn model(layers: usize) -> Qwen2 {
    let mut config = Qwen2Config::preset("tiny-4x64").unwrap();
    config.num_hidden_layers = layers;
    random_model(config, 7, 0.2, Device::Cpu, Kind::Float).unwrap()
}

/// Its directory, without tokenizer.
pub fn directory(parent: &Path, layers: usize) -> PathBuf {
    let dir = parent.join(format!("model{layers}"));
    std::fs::create_dir(&dir).unwrap();
    save_model(&model(layers), Dtype::F32, None, &dir).unwrap();
    dir
}

pub fn temper(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_temper")).args(args).env("OMP_WAIT_POLICY", "PASSIVE").output().unwrap()
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
