//! `temper quickstart`: the main job in minutes on a CPU, without downloads.
//!
//! Makes the generated task and a tiny model (supervised steps on hasty and careful demonstrations), then runs the
//! training of configs/quickstart.yaml on it: 5 % matmul error, E5c's sigma schedule.

use std::path::{Path, PathBuf};

use super::{Global, common, results, train};
use crate::data::generated::{self, Task};
use crate::model::checkpoint::atomic_directory;
use crate::model::config::Qwen2Config;
use crate::model::load::save_model;
use crate::model::section::Dtype;
use crate::model::tokenizer::Tokenizer;
use crate::rl::supervised::{self, SupervisedRecipe};
use crate::run::signals::Interrupt;
use crate::{Error, Result};

const CONFIG: &str = include_str!("../../configs/quickstart.yaml");

#[derive(clap::Args)]
pub struct Args {
    /// Where the model and the run directory are made
    #[arg(long, default_value = "runs/quickstart", value_name = "DIR")]
    pub out: PathBuf,
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Override one key of configs/quickstart.yaml (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Only make the model directory (the start that all runs share), and print its path
    #[arg(long)]
    pub model_only: bool,
}

pub fn run(args: &Args, global: &Global) -> Result<()> {
    let console = common::console(global);
    let config_path = args.out.join("quickstart.yaml");
    std::fs::create_dir_all(&args.out).map_err(|e| Error::io(&args.out, e))?;
    std::fs::write(&config_path, CONFIG).map_err(|e| Error::io(&config_path, e))?;
    let mut overrides = vec![format!("seed={}", args.seed)];
    overrides.extend(args.overrides.iter().cloned());
    let mut config = crate::config::load(&config_path, &overrides)?;

    let interrupt = Interrupt::install()?;
    let global = Global { device: global.device.clone().or_else(|| Some("cpu".into())), ..global.clone() };
    let preset = config.model.preset.clone().unwrap_or_else(|| "tiny-28x32".to_string());
    let model_dir = args.out.join(format!("model-{preset}"));
    if !model_dir.exists() {
        console
            .note(&format!("making the tiny model ({preset}): supervised steps on hasty and careful demonstrations"));
        make_model(&preset, config.data.generated.seed, &model_dir, &config.trainer.threads, &global)?;
    }
    if args.model_only {
        return super::print(model_dir.display());
    }
    config.model.path = Some(model_dir.display().to_string());
    config.model.preset = None;
    console.note("reinforcement learning under 5 % matmul error, with E5c's AQN schedule");
    // A second call continues or shows the run that is there.
    let outcome = train::train(&config, &args.out, true, &global, &interrupt)?;
    results::print(&outcome.run_dir, &global)
}

/// Supervised recipe of a tiny preset.
fn recipe(preset: &str) -> SupervisedRecipe {
    let (steps, lr) = if preset == "tiny-4x64" { (260, 3e-3) } else { (300, 4e-3) };
    SupervisedRecipe { steps, lr, batch: 64, warmup_steps: 20, seed: 0 }
}

fn make_model(preset: &str, seed: u64, dir: &Path, threads: &Option<usize>, global: &Global) -> Result<()> {
    let device = common::device(global, *threads)?;
    let console = common::console(global);
    let config = Qwen2Config::preset(preset)?;
    atomic_directory(dir, |dir| {
        generated::write_tokenizer(dir)?;
        let tokenizer = Tokenizer::from_dir(dir)?.with_model_vocab_size(config.vocab_size)?;
        let recipe = recipe(preset);
        let mut bar = console.progress("supervised", recipe.steps);
        let task = Task::new(seed);
        let model = supervised::train(config.clone(), &task, &tokenizer, &recipe, device, |_, loss| {
            bar.set_message(format!("loss {loss:.3}"));
            bar.inc(1);
        })?;
        bar.finish();
        save_model(&model, Dtype::F32, None, dir)
    })
}
