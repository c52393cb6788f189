//! `temper merge ADAPTER OUT`: a model directory whose weights have the adapter added, for programs that load no adapters.

use std::path::PathBuf;

use serde_json::json;

use super::quantize::check_output;
use super::{Global, common};
use crate::model::checkpoint::atomic_directory;
use crate::model::load::ModelSource;
use crate::model::lora;
use crate::{Result, bail_input};

#[derive(clap::Args)]
pub struct Args {
    /// A directory with adapter_config.json: a checkpoint of a run with model.lora, or PEFT's own
    #[arg(value_name = "ADAPTER")]
    adapter: String,
    /// The model directory to write; must not exist yet
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// The base model, where it lies elsewhere than adapter_config.json says
    #[arg(long, value_name = "DIR")]
    base: Option<String>,
}

pub fn run(args: &Args, global: &Global) -> Result<()> {
    let source = ModelSource::of(&args.adapter, args.base.as_deref())?;
    if !lora::is_adapter(&source.dir) {
        bail_input!("{}: found no {}, expected the directory of an adapter", args.adapter, lora::ADAPTER_CONFIG);
    }
    check_output(&source.dir, &args.output)?;
    let mut adapters = 0;
    atomic_directory(&args.output, |dir| {
        adapters = source.save_merged(dir)?;
        Ok(())
    })?;
    if global.json {
        let output = args.output.display().to_string();
        return super::print(json!({"base": source.weights(), "adapters": adapters, "output": output}));
    }
    common::console(global).note(&format!("base {}", source.weights().display()));
    super::print(format!("{adapters} adapters added; wrote {}", args.output.display()))
}
