//! `temper eval MODEL --config CONFIG`: accuracy in every condition that the configuration has, and over error scales and
//! formats.

use std::cell::Cell;
use std::path::{Path, PathBuf};

use comfy_table::{Table, presets};
use serde_json::{Value, json};

use super::eval_robustness::{self as robustness, Injected, injected};
use super::{Global, common, results};
use crate::config::Config;
use crate::model::load::{ModelSource, kind_of};
use crate::rl::evaluation::{Answer, Condition, Evaluation};
use crate::rl::microbatch::Halving;
use crate::rl::reward::scorer::Scorer;
use crate::rl::trainer::check_lengths;
use crate::run::jsonl::JsonlWriter;
use crate::{Error, Result, bail_input};

#[derive(clap::Args)]
pub struct Args {
    /// A model directory (or a hub id in the local cache)
    pub model: String,
    /// The base model of an adapter, where it lies elsewhere than adapter_config.json says
    #[arg(long, value_name = "DIR")]
    pub base: Option<String>,
    /// Data, reward, noise and quantization come from this configuration
    #[arg(long)]
    pub config: PathBuf,
    /// Override one key of the configuration (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Also with these errors of every product, such as 0,0.05,0.1 (left out with --formats: the configuration's own)
    #[arg(long, value_name = "SCALES", value_delimiter = ',')]
    pub error_scales: Vec<f64>,
    /// Also in these formats, such as none,mxfp4,nvfp4, of the weights and, where the configuration quantizes them, the
    /// activations (left out with --error-scales: the configuration's own)
    #[arg(long, value_name = "FORMATS")]
    pub formats: Vec<String>,
    /// Draw accuracy over error scale, a line per format, to STEM.svg and STEM.png
    #[arg(long, value_name = "STEM")]
    pub plot: Option<PathBuf>,
    /// Write one line per question and condition to this file (.jsonl)
    #[arg(long, value_name = "FILE")]
    pub answers: Option<PathBuf>,
}

pub fn run(args: &Args, global: &Global) -> Result<()> {
    let mut config = crate::config::load(&args.config, &args.overrides)?;
    let source = ModelSource::of(&args.model, args.base.as_deref())?;
    let home = |file: &str| Some(source.home_of(file).display().to_string());
    config.model.path = home("config.json");
    config.model.tokenizer = config.model.tokenizer.or_else(|| home("tokenizer.json"));
    let cells = robustness::cells(args, &config)?;
    if let Some(parent) = args.plot.as_deref().and_then(std::path::Path::parent).filter(|p| !p.as_os_str().is_empty()) {
        std::fs::read_dir(parent).map_err(|e| Error::io(parent, e).at("--plot"))?;
    }
    let device = common::device(global, config.trainer.threads)?;
    let console = common::console(global);
    let workload = common::workload(&config, false)?;
    // Formats on top of weights that are rounded already would be read as formats.
    if args.formats.iter().any(|format| format != "none")
        && crate::model::config::quantization::PackedLayout::of_dir(source.weights())?.is_some()
    {
        bail_input!("--formats: {}: its weights are packed; expected the model that it was made from", args.model);
    }
    let model = source.load(device, Some(kind_of(config.model.dtype)))?;
    let recipe = common::recipe(&config);
    check_lengths(&recipe, &workload, &model.config)?;
    let scorer = Scorer::new(&recipe.reward)?;
    let evaluation = Evaluation {
        model: &model,
        tokenizer: &workload.tokenizer,
        questions: &workload.val,
        scorer: &scorer,
        max_new_tokens: recipe.data.max_response_tokens,
        batching: recipe.validation_batching(),
        halving: Halving { count: &Cell::new(0), warn: &|line| console.warn(line) },
    };
    let injector_of = |config: &Config| {
        // Quantized weights of another format may lie beside the clean ones.
        model.invalidate();
        let mut injector = common::recipe(config).injector(&model.module_specs())?;
        common::set_activation_amax(&mut injector, &model, &source.dir, config, &workload, &console)?;
        Ok::<_, Error>(injector)
    };
    let n = workload.val.len() as u64;
    let answers_of = |injector: &_, condition: Condition, label: &str| {
        let mut bar = console.progress(label, n);
        let answers = evaluation.run(&condition.pass(injector), |done| bar.inc(done as u64))?;
        bar.finish();
        scorer.take_warnings().iter().for_each(|warning| console.warn(warning));
        Ok::<_, Error>(answers)
    };
    let mut writer = args.answers.as_deref().map(AnswersFile::begin).transpose()?;
    let mut write = |answers: &[Answer], labels: &Value| match &mut writer {
        Some(answers_file) => {
            answers_file.writer.write_rows(&answers.iter().map(|a| labelled(json!(a), labels)).collect::<Vec<_>>())
        }
        None => Ok(()),
    };

    // A cell that is one of the conditions is not computed again.
    let mut known: Vec<(Injected, Vec<Answer>)> = Vec::new();
    let mut conditions = Vec::new();
    let injector = injector_of(&config)?;
    for condition in Condition::applying(&injector) {
        let answers = answers_of(&injector, condition, condition.name())?;
        conditions.push(labelled(measured(&answers), &json!({"name": condition.name()})));
        write(&answers, &json!({"condition": condition.name()}))?;
        known.push((injected(&config, condition), answers));
    }
    let mut rows = Vec::new();
    for cell in &cells {
        let labels = cell.labels();
        if !known.iter().any(|(injected, _)| *injected == cell.injected()) {
            let label = format!("error {}, {}", labels["error_scale"], labels["format"]);
            let answers = answers_of(&injector_of(&cell.config)?, cell.condition(), &label)?;
            known.push((cell.injected(), answers));
        }
        let Some((_, answers)) = known.iter().find(|(injected, _)| *injected == cell.injected()) else { continue };
        write(answers, &labelled(json!({"condition": "robustness"}), &labels))?;
        rows.push(robustness::row(cell, answers, &known[0].1));
    }
    if let Some(answers_file) = writer {
        answers_file.finish()?;
    }
    if let Some(stem) = &args.plot {
        robustness::plot(&rows, stem)?;
    }
    if global.json {
        let mut result = json!({"n": n, "conditions": conditions});
        if !cells.is_empty() {
            result["robustness"] = json!(rows);
        }
        return super::print(result);
    }
    let mut text = table(&conditions).to_string();
    if !cells.is_empty() {
        text += &format!(
            "\n{}\np: McNemar's mid-p against the clean answers, question by question; lost and gained: questions",
            robustness::table(&rows)
        );
    }
    super::print(text)
}

/// The file of `--answers`: under its name only when all of it is there.
struct AnswersFile {
    path: PathBuf,
    partial: tempfile::TempPath,
    writer: JsonlWriter,
}

impl AnswersFile {
    fn begin(path: &Path) -> Result<AnswersFile> {
        if path.exists() {
            bail_input!("--answers {}: exists; choose another name", path.display());
        }
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let partial = tempfile::NamedTempFile::new_in(parent).map_err(|e| Error::io(path, e).at("--answers"))?;
        let partial = partial.into_temp_path();
        Ok(AnswersFile { path: path.to_path_buf(), writer: JsonlWriter::open(&partial)?, partial })
    }

    fn finish(self) -> Result<()> {
        self.partial.persist(&self.path).map_err(|e| Error::io(&self.path, e.error))
    }
}

/// Of one list of answers.
pub fn measured(answers: &[Answer]) -> Value {
    let (n, count) = (answers.len() as u64, |of: fn(&Answer) -> bool| answers.iter().filter(|a| of(a)).count() as u64);
    let mut measured = results::accuracy(count(|a| a.correct), n);
    measured["well_formed_ratio"] = json!(count(|a| a.well_formed) as f64 / n.max(1) as f64);
    measured["n"] = json!(n);
    measured
}

/// The cells of a table that show it.
pub fn measured_cells(measured: &Value) -> [String; 4] {
    let percent = |value: &Value| 100.0 * value.as_f64().unwrap_or(f64::NAN);
    [
        format!("{} / {}", measured["correct"], measured["n"]),
        format!("{:.2} %", percent(&measured["accuracy"])),
        format!("[{:.2}, {:.2}]", percent(&measured["ci95"][0]), percent(&measured["ci95"][1])),
        format!("{:.1} %", percent(&measured["well_formed_ratio"])),
    ]
}

fn table(conditions: &[Value]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_header(["condition", "correct", "accuracy", "95 % interval", "well-formed"]);
    for condition in conditions {
        let name = condition["name"].as_str().unwrap_or("").to_string();
        table.add_row(std::iter::once(name).chain(measured_cells(condition)));
    }
    table
}

/// `row` with the keys of `labels`.
pub fn labelled(mut row: Value, labels: &Value) -> Value {
    for (key, value) in labels.as_object().into_iter().flatten() {
        row[key] = value.clone();
    }
    row
}
