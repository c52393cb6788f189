//! `temper scan MODEL`: what formats and hardware errors do to a model, layer by layer; multipliers of AQN from it.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::{Global, common, prompt, scan_faults, scan_plots, scan_tables as tables};
use crate::model::checkpoint::{Checkpoint, atomic_file, resolve_model_path};
use crate::numerics::format::Format;
use crate::run::signals::Interrupt;
use crate::srdd::activations::{ActivationScan, scan_activations};
use crate::srdd::changes::{Changes, changes};
use crate::srdd::fault_table::FaultRow;
use crate::srdd::faults::FaultScan;
use crate::srdd::gaussian;
use crate::srdd::multipliers::{self, Choice, Rule, Score, named};
use crate::srdd::prompts::{Prompts, prompts};
use crate::srdd::sensitivity::{Arm, Sensitivity, passes, scan_sensitivity};
use crate::srdd::weights::{WeightScan, bytes_to_read, scan_weights};
use crate::{Error, Result, bail_input};

#[derive(clap::Args)]
pub struct Args {
    /// Model directory, hub id in the local cache, or (weights alone) a .safetensors file
    #[arg(required_unless_present_any = ["gaussian", "preset"], conflicts_with = "gaussian")]
    pub model: Option<String>,
    /// Instead of MODEL: the weights of 28 layers drawn from N(0, SIGMA^2), in bf16
    #[arg(long, value_name = "SIGMA", conflicts_with_all = ["activations", "sensitivity", "since"])]
    pub gaussian: Option<f32>,
    /// Instead of MODEL: random weights of these shapes, such as tiny-28x32
    #[arg(long, value_name = "NAME", conflicts_with_all = ["model", "gaussian", "weights", "since"])]
    pub preset: Option<String>,
    /// Of --preset's weights
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Block formats, such as mxfp4,mxfp4:2d,nvfp4:sr (default: mxfp4,nvfp4)
    #[arg(long, short)]
    pub format: Vec<String>,
    /// Every linear weight in every format (the default where nothing else is asked for)
    #[arg(long)]
    pub weights: bool,
    /// Every layer's output in every format, per token, with and without attention sinks
    #[arg(long)]
    pub activations: bool,
    /// KL of the output when one layer alone has fake-quantized weights, or noisy products with --noise
    #[arg(long)]
    pub sensitivity: bool,
    /// Layers whose arithmetic is faulty, of the model with quantized weights, or noisy products with --noise
    #[arg(long)]
    pub faults: bool,
    /// With --faults: a fault to be found, KIND@LAYER[:SEVERITY][:sparse], such as clip@3:0.01; in exact arithmetic unless --noise
    /// or --format is given
    #[arg(long, value_name = "FAULT", requires = "faults")]
    pub plant: Option<String>,
    /// How well planted faults are found in this model
    #[arg(long)]
    pub fault_table: bool,
    /// With --fault-table: how often each is planted at each layer
    #[arg(long, default_value_t = 3)]
    pub draws: u64,
    /// With --sensitivity or --faults: this relative error of every product, instead of quantized weights
    #[arg(long, value_name = "SCALE")]
    pub noise: Option<f64>,
    /// With --sensitivity: so many layers at a time
    #[arg(long, default_value_t = 1, value_name = "LAYERS")]
    pub window: usize,
    /// A prompt a line (default: eight built-in ones)
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// An earlier checkpoint: what changed since, layer by layer
    #[arg(long, value_name = "MODEL")]
    pub since: Option<String>,
    /// Write the JSON here too
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Write charts over layers into this directory, as SVG and PNG
    #[arg(long, value_name = "DIR")]
    pub plots: Option<PathBuf>,
    /// Write a layer_sigma_config here
    #[arg(long, value_name = "FILE", requires = "rule")]
    pub multipliers: Option<PathBuf>,
    /// quantile, bands, proportional, inverse, targeted or healthy
    #[arg(long)]
    pub rule: Option<String>,
    /// relative_error, sqnr_deficit or output_kl (default: of the deepest scan: sensitivity, activations, weights)
    #[arg(long)]
    pub score: Option<String>,
    /// With --rule targeted or healthy: how many layers
    #[arg(long, default_value_t = 4, value_name = "LAYERS")]
    pub top: usize,
    /// With --rule bands: relative errors above which a layer gets 1.2 and 1.5
    #[arg(long, value_name = "LOW,HIGH", default_value = "0.37,0.408")]
    pub thresholds: String,
}

/// What was scanned.
#[derive(Default)]
pub struct Found {
    pub weights: Option<WeightScan>,
    pub activations: Option<ActivationScan>,
    pub sensitivity: Vec<Sensitivity>,
    pub changes: Option<Changes>,
    /// Where the prompts of activations and sensitivity come from, and those of faults.
    pub prompts: Option<String>,
    pub fault_prompts: Option<String>,
    pub faults: Vec<FaultScan>,
    pub fault_table: Vec<FaultRow>,
}

pub fn run(args: &Args, global: &Global) -> Result<()> {
    let default = ["mxfp4,nvfp4".to_string()];
    let formats = formats(if args.format.is_empty() { &default } else { &args.format })?;
    let wanted = multipliers_wanted(args)?;
    if args.window == 0 {
        bail_input!("--window: found 0, expected at least 1");
    }
    let made = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
    let (name, dir) = model(args, made.path())?;
    let before = args.since.as_deref().map(resolve_model_path).transpose()?;
    let found = scan(args, global, &formats, (&dir, before.as_deref()))?;
    let value = found.json(&name);
    let text = format!("{value:#}\n");
    if let Some((file, choice, score)) = &wanted {
        let (scores, source) = found.scores(*score)?;
        let made = multipliers::multipliers(&scores, choice)?;
        let hash: String = Sha256::digest(text.as_bytes())[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        let from = json!({"model": name, "score": source, "rule": choice.rule, "sha256_16": hash});
        let config = multipliers::config(&made, from.as_object().cloned().unwrap_or_default());
        write(file, &config)?;
    }
    if let Some(file) = &args.out {
        write(file, &text)?;
    }
    if let Some(directory) = &args.plots {
        scan_plots::write(&found, directory)?;
    }
    if global.json { super::print(value) } else { super::print(tables::text(&found)) }
}

/// Its name and its place; made weights go to `made`.
fn model(args: &Args, made: &Path) -> Result<(String, PathBuf)> {
    if let Some(preset) = &args.preset {
        if !(args.activations || args.sensitivity || args.faults || args.fault_table) {
            bail_input!(
                "--preset: found no scan of a model, expected --activations, --sensitivity, --faults or --fault-table"
            );
        }
        return Ok((format!("{preset}, seed {}", args.seed), PathBuf::new()));
    }
    match (&args.model, args.gaussian) {
        (Some(model), _) => Ok((model.clone(), resolve_model_path(model)?)),
        (None, Some(sigma)) if sigma.is_finite() && sigma > 0.0 => {
            let file = made.join("gaussian.safetensors");
            gaussian::write(&file, sigma)?;
            Ok((format!("gaussian, sigma {sigma}"), file))
        }
        (None, sigma) => bail_input!("--gaussian: found {sigma:?}, expected a sigma above 0"),
    }
}

fn write(file: &Path, text: &str) -> Result<()> {
    atomic_file(file, |out| out.write_all(text.as_bytes()).map_err(|e| Error::io(file, e)))
}

fn scan(args: &Args, global: &Global, formats: &[Format], dirs: (&Path, Option<&Path>)) -> Result<Found> {
    let (dir, before) = dirs;
    let (console, interrupt) = (common::console(global), Interrupt::install()?);
    let go_on = || interrupt.check();
    let mut found = Found::default();
    let needs_model = args.activations || args.sensitivity || args.faults || args.fault_table;
    if args.weights || !(needs_model || before.is_some()) {
        let checkpoint = Checkpoint::open(dir)?;
        let mut bar = console.progress("weights, MiB", bytes_to_read(&checkpoint) >> 20);
        let mut bytes_done = 0u64;
        let scanned = scan_weights(&checkpoint, formats, &mut |bytes| {
            let before = bytes_done >> 20;
            bytes_done += bytes as u64;
            bar.inc((bytes_done >> 20) - before);
            go_on()
        });
        bar.finish();
        found.weights = Some(scanned?);
    }
    if let Some(before) = before {
        found.changes = Some(changes(&Checkpoint::open(before)?, &Checkpoint::open(dir)?, &mut |_| go_on())?);
    }
    if needs_model {
        let loaded = match &args.preset {
            Some(preset) => prompt::of_preset(preset, args.seed, global)?,
            None => prompt::load(&dir.to_string_lossy(), None, false, global)?,
        };
        let (model, tokenizer) = (&loaded.model, loaded.tokenizer.as_ref());
        if args.faults || args.fault_table {
            // Text has too few different tokens; statistics of channels want many.
            let known = tokenizer.filter(|_| args.prompts.is_some());
            let Prompts { ids, source } = prompts(args.prompts.as_deref(), known, model)?;
            found.fault_prompts = Some(source);
            if args.faults {
                found.faults = scan_faults::faults(args, model, formats, &ids, &interrupt, &console)?;
            }
            if args.fault_table {
                found.fault_table = scan_faults::table_of_faults(args, model, &ids, &interrupt, &console)?;
            }
        }
        if !(args.activations || args.sensitivity) {
            return Ok(found);
        }
        let Prompts { ids: prompts, source } = prompts(args.prompts.as_deref(), tokenizer, model)?;
        found.prompts = Some(source);
        if args.activations {
            let mut bar = console.progress("activations, prompts", prompts.len() as u64);
            let mut progress = || {
                bar.inc(1);
                go_on()
            };
            found.activations = Some(scan_activations(model, &prompts, formats, &mut progress)?);
            bar.finish();
        }
        if args.sensitivity {
            let arms = match args.noise {
                Some(scale) => vec![Arm::Noise(scale)],
                None => formats.iter().map(|&format| Arm::Weights(format)).collect(),
            };
            let layers = model.config.num_hidden_layers;
            if args.window > layers {
                bail_input!("--window: found {}, expected at most the model's {layers} layers", args.window);
            }
            let total = arms.len() * passes(layers, args.window, prompts.len());
            let mut bar = console.progress("sensitivity, passes", total as u64);
            for arm in arms {
                let mut progress = || {
                    bar.inc(1);
                    go_on()
                };
                let of_arm = scan_sensitivity(model, &prompts, (arm, args.window), &mut progress)?;
                found.sensitivity.push(of_arm);
            }
            bar.finish();
        }
    }
    Ok(found)
}

impl Found {
    /// The parts that were scanned; weights at the top, as `quantize --json` has them.
    fn json(&self, model: &str) -> Value {
        let mut all = Map::from_iter([("model".to_string(), json!(model))]);
        if let Some(Value::Object(weights)) = self.weights.as_ref().map(|weights| json!(weights)) {
            all.extend(weights);
        }
        all.extend(self.prompts.as_ref().map(|source| ("prompts".to_string(), json!(source))));
        all.extend(self.fault_prompts.as_ref().map(|source| ("fault_prompts".to_string(), json!(source))));
        all.extend(self.activations.as_ref().map(|scan| ("activations".to_string(), json!(scan))));
        all.extend(self.changes.as_ref().map(|changes| ("changes".to_string(), json!(changes))));
        if !self.faults.is_empty() {
            all.insert("faults".to_string(), json!(self.faults));
        }
        if !self.fault_table.is_empty() {
            all.insert("fault_table".to_string(), json!(self.fault_table));
        }
        if !self.sensitivity.is_empty() {
            all.insert("sensitivity".to_string(), json!(self.sensitivity));
        }
        Value::Object(all)
    }

    /// A score of each layer, in the first format, and what it is.
    fn scores(&self, wanted: Option<Score>) -> Result<(Vec<f64>, Value)> {
        let errors = || -> Option<(Vec<(f64, f64)>, &'static str)> {
            if let Some(scan) = &self.activations {
                let first = scan.layers.first()?.format;
                let own = scan.layers.iter().filter(|l| l.format == first).map(|l| &l.without_sinks);
                return Some((own.map(|e| (e.relative_error, e.sqnr_db)).collect(), "activations without sinks"));
            }
            let means = &self.weights.as_ref()?.formats.first()?.layers;
            Some((means.iter().map(|l| (l.mean.relative_error, l.mean.sqnr_db)).collect(), "weights"))
        };
        let score = wanted.unwrap_or(match self.sensitivity.is_empty() {
            true => Score::RelativeError,
            false => Score::OutputKl,
        });
        let (scores, of): (Vec<f64>, String) = match score {
            Score::OutputKl => match self.sensitivity.first() {
                Some(s) if s.window == 1 => (s.layers.iter().map(|l| l.shift.kl).collect(), s.arm.clone()),
                _ => {
                    bail_input!("--score output_kl: found no scan of single layers, expected --sensitivity --window 1")
                }
            },
            Score::RelativeError | Score::SqnrDeficit => {
                let Some((errors, of)) = errors() else {
                    bail_input!("--score: found no scan of it, expected --weights or --activations");
                };
                let best = errors.iter().map(|e| e.1).fold(f64::NEG_INFINITY, f64::max);
                let of_layer = |e: &(f64, f64)| if score == Score::RelativeError { e.0 } else { best - e.1 };
                (errors.iter().map(of_layer).collect(), of.to_string())
            }
        };
        if scores.is_empty() {
            bail_input!("--multipliers: found no tensor of a layer (model.layers.N...), expected a model's");
        }
        Ok((scores, json!({"score": score, "of": of})))
    }
}

fn formats(texts: &[String]) -> Result<Vec<Format>> {
    let mut found: Vec<Format> = Vec::new();
    for name in &common::format_names(texts) {
        let format: Format = name.parse()?;
        if found.contains(&format) {
            bail_input!("--format: found {format} twice");
        }
        found.push(format);
    }
    Ok(found)
}

/// File, rule and score of `--multipliers`, before anything is scanned.
fn multipliers_wanted(args: &Args) -> Result<Option<(&PathBuf, Choice, Option<Score>)>> {
    let Some(file) = &args.multipliers else { return Ok(None) };
    let rule: Rule = named("--rule", args.rule.as_deref().unwrap_or_default())?;
    let score: Option<Score> = args.score.as_deref().map(|name| named("--score", name)).transpose()?;
    if rule == Rule::Bands && !args.activations {
        bail_input!("--rule bands: its thresholds are relative errors of activations, expected --activations");
    }
    let thresholds: Vec<f64> = args.thresholds.split(',').filter_map(|t| t.trim().parse().ok()).collect();
    match thresholds[..] {
        [low, high] if low < high => Ok(Some((file, Choice { rule, top: args.top, thresholds: [low, high] }, score))),
        _ => bail_input!("--thresholds {}: expected two numbers, the lower first", args.thresholds),
    }
}
