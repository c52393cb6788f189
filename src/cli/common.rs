//! What several commands do alike: device, threads, recipe and questions from a configuration.

use std::path::{Path, PathBuf};

use super::{Global, inputs};
use crate::config::Config;
use crate::data::generated::{self, Split, Task};
use crate::data::section::DataKind;
use crate::data::{self, Question};
use crate::device::gpu::monitor::Watch;
use crate::device::gpu::selection::Card;
use crate::device::{self, Device};
use crate::inject::injector::Injector;
use crate::model::calibration;
use crate::model::checkpoint::{Checkpoint, resolve_model_path};
use crate::model::config::Qwen2Config;
use crate::model::qwen2::Qwen2;
use crate::model::tokenizer::Tokenizer;
use crate::numerics::format::Format;
use crate::ops::cuda::launch::Gpu;
use crate::ops::cuda::nvtx;
use crate::ops::profile::Recording;
use crate::rl::recipe::{Recipe, prepare};
use crate::rl::reward::scorer::Scorer;
use crate::rl::trainer::{Workload, check_lengths};
use crate::run::console::{Console, Verbosity, to_stderr};
use crate::run::trace;
use crate::{Error, Result, bail_input};

pub fn console(global: &Global) -> Console {
    Console::new(Verbosity::from_flags(global.quiet, global.verbose))
}

/// A table without lines, for a terminal or a file.
pub fn plain_table(header: &[&str]) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(header.iter().copied());
    table
}

/// Its text, without blanks at the ends of lines.
pub fn lines(table: &comfy_table::Table) -> String {
    table.to_string().lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// `mxfp4,nvfp4:sr,2d` -> mxfp4 and nvfp4:sr,2d: what is no format of its own, nor `none`, is an option of the one before it.
pub fn format_names(texts: &[String]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    let whole = |part: &str| part == "none" || part.parse::<Format>().is_ok();
    for part in texts.iter().flat_map(|text| text.split(',')) {
        match names.last_mut() {
            Some(last) if last.contains(':') && !whole(part) => *last = format!("{last},{part}"),
            _ => names.push(part.to_string()),
        }
    }
    names
}

/// The device of `--device`, with libtorch and our own loops set to `threads` (None: all cores).
pub fn device(global: &Global, threads: Option<usize>) -> Result<Device> {
    let device = device::parse(global.device.as_deref())?;
    device::set_threads(threads);
    Ok(device)
}

/// The card of a CUDA device: by its PCI address where CUDA tells it, else through the environment.
pub fn watch(device: Device) -> Option<Watch> {
    let Device::Cuda(index) = device else { return None };
    Some(Watch::card(Gpu::number(index).pci_address().map_or(Card::Cuda(index), Card::Pci)))
}

/// Writes what `--profile` recorded, and says where NVTX ranges went.
pub fn write_trace(file: &Path, command: &str, recording: Recording, global: &Global) -> Result<()> {
    trace::write(file, command, recording)?;
    if !global.quiet {
        let ranges = nvtx::library().map_or("NVTX was not found, so there are no ranges".to_string(), |library| {
            format!("NVTX ranges went to {library}")
        });
        to_stderr(format_args!("profile: {} (load it in ui.perfetto.dev); {ranges}", file.display()));
    }
    Ok(())
}

pub fn recipe(config: &Config) -> Recipe {
    Recipe {
        name: config.name.clone(),
        seed: config.seed,
        hash: config.hash(),
        yaml: config.to_yaml(),
        model: config.model.clone(),
        data: config.data.clone(),
        rollout: config.rollout.clone(),
        algorithm: config.algorithm.clone(),
        optimizer: config.optimizer.clone(),
        trainer: config.trainer.clone(),
        reward: config.reward.clone(),
        noisy_ops: config.noisy_ops.clone(),
        noise_injection: config.noise_injection.clone(),
        fake_quant: config.fake_quant.clone(),
    }
}

/// The shapes that the `model:` section names, without reading weights.
pub fn model_config(config: &Config) -> Result<(Qwen2Config, Option<PathBuf>)> {
    match (&config.model.path, &config.model.preset) {
        (Some(path), _) => {
            let dir = resolve_model_path(path)?;
            Ok((Qwen2Config::from_dir(&dir)?, Some(dir)))
        }
        (None, Some(preset)) => Ok((Qwen2Config::preset(preset)?, None)),
        (None, None) => {
            bail_input!("model.path: found null, expected a model directory (or model.preset for random weights)")
        }
    }
}

/// Tokenizer and questions of a configuration. `training`: also the training questions.
pub fn workload(config: &Config, training: bool) -> Result<Workload> {
    let (shapes, model_dir) = model_config(config)?;
    let mut scratch = None;
    let tokenizer_dir = match (&config.model.tokenizer, model_dir) {
        (Some(path), _) => resolve_model_path(path).map_err(|e| e.at("model.tokenizer"))?,
        (None, Some(dir)) => dir,
        (None, None) if config.data.kind == DataKind::Generated => {
            let dir = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
            generated::write_tokenizer(dir.path())?;
            scratch.insert(dir).path().to_path_buf()
        }
        (None, None) => bail_input!(
            "model.tokenizer: found null, expected the directory of tokenizer.json (model.preset has none); set it with --set model.tokenizer=DIR"
        ),
    };
    let tokenizer = Tokenizer::from_dir(&tokenizer_dir)?.with_model_vocab_size(shapes.vocab_size)?;
    let prepared = |questions: Vec<Question>| prepare(&questions, &config.data, &tokenizer);
    // Both files are read before anything is encoded: a broken file is named first.
    let train = if training { training_questions(config)? } else { Vec::new() };
    let val = validation_questions(config)?;
    if training {
        recipe(config).schedule(train.len())?;
    }
    let (train, val) = (prepared(train)?, prepared(val)?);
    let source = match config.data.kind {
        DataKind::Generated => "generated",
        _ => "gsm8k",
    };
    let inputs = inputs::digests(config, &tokenizer_dir)?;
    Ok(Workload { tokenizer, tokenizer_dir, train, val, source: source.to_string(), inputs, _scratch: scratch })
}

/// Everything that can be known to be wrong before a run: tokenizer, questions, lengths, shapes of the weights.
pub fn check_inputs(config: &Config) -> Result<()> {
    let (shapes, model_dir) = model_config(config)?;
    let workload = workload(config, true)?;
    check_lengths(&recipe(config), &workload, &shapes)?;
    // Starts a reward's command and ends it again: is it there?
    Scorer::new(&config.reward)?;
    match model_dir {
        Some(dir) => Checkpoint::open(&dir)?.check(&shapes),
        None => Ok(()),
    }
}

/// Static activation scales of the model in `dir`: those that lie beside its weights, else calibrated on the
/// configuration's training prompts, as a run would before its first step.
pub fn set_activation_amax(
    injector: &mut Injector,
    model: &Qwen2,
    dir: &Path,
    config: &Config,
    workload: &Workload,
    console: &Console,
) -> Result<()> {
    let amax = match calibration::read(dir, injector.plan())? {
        Some(amax) => amax,
        None => {
            let n = config.fake_quant.calibration_prompts();
            let mut first = config.clone();
            first.data.train_limit = Some(n.min(config.data.train_limit.unwrap_or(n)));
            let reason = || format!("{} has no {}: calibrating", dir.display(), calibration::FILE);
            let questions = training_questions(&first).map_err(|e| e.at(reason()))?;
            console.note(&format!("{} on {} training prompts", reason(), questions.len()));
            let questions = prepare(&questions, &config.data, &workload.tokenizer)?;
            calibration::calibrate(model, injector.plan(), &recipe(config).calibration_prompts(&questions))?
        }
    };
    injector.set_activation_amax(amax);
    Ok(())
}

fn training_questions(config: &Config) -> Result<Vec<Question>> {
    let data = &config.data;
    if data.kind == DataKind::Generated {
        let n = data.train_limit.unwrap_or(data.generated.train_problems).min(data.generated.train_problems);
        return Ok(Task::new(data.generated.seed).questions(Split::Train, 0..n as u32));
    }
    file_questions("data.train", data.train.as_deref(), data.train_limit)
}

fn validation_questions(config: &Config) -> Result<Vec<Question>> {
    let data = &config.data;
    if data.kind == DataKind::Generated {
        let n = data.val_limit.unwrap_or(data.generated.val_problems).min(data.generated.val_problems);
        return Ok(Task::new(data.generated.seed).questions(Split::Validation, 0..n as u32));
    }
    file_questions("data.val", data.val.as_deref(), data.val_limit)
}

fn file_questions(key: &str, path: Option<&str>, limit: Option<usize>) -> Result<Vec<Question>> {
    let Some(path) = path else {
        bail_input!("{key}: found null, expected a .jsonl or .parquet file; set it with --set {key}=FILE");
    };
    data::load(Path::new(path), limit).map_err(|e| e.at(key))
}
