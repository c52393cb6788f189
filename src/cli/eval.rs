//! `temper eval MODEL --config CONFIG`: accuracy in every condition that the configuration has.

use std::path::PathBuf;

use comfy_table::{Table, presets};
use serde_json::{Value, json};

use super::{Global, common, results};
use crate::Result;
use crate::model::load::{kind_of, load_model};
use crate::rl::evaluation::{Condition, Evaluation};
use crate::rl::trainer::check_lengths;
use crate::run::jsonl::JsonlWriter;

#[derive(clap::Args)]
pub struct Args {
    /// A model directory (or a hub id in the local cache)
    pub model: String,
    /// Data, reward, noise and quantization come from this configuration
    #[arg(long)]
    pub config: PathBuf,
    /// Override one key of the configuration (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Write one line per question and condition to this file (.jsonl)
    #[arg(long, value_name = "FILE")]
    pub answers: Option<PathBuf>,
}

pub fn run(args: &Args, global: &Global) -> Result<()> {
    let mut config = crate::config::load(&args.config, &args.overrides)?;
    config.model.path = Some(args.model.clone());
    let device = common::device(global, config.trainer.threads)?;
    let console = common::console(global);
    let workload = common::workload(&config, false)?;
    let dir = crate::model::checkpoint::resolve_model_path(&args.model)?;
    let model = load_model(&dir, device, Some(kind_of(config.model.dtype)))?;
    let recipe = common::recipe(&config);
    check_lengths(&recipe, &workload, &model.config)?;
    let mut injector = recipe.injector(&model.config)?;
    common::set_activation_amax(&mut injector, &model, &dir, &config, &workload, &console)?;
    let evaluation = Evaluation {
        model: &model,
        tokenizer: &workload.tokenizer,
        questions: &workload.val,
        mode: recipe.reward.mode,
        max_new_tokens: recipe.data.max_response_tokens,
        batch_size: recipe.trainer.val_batch_size,
    };
    let mut writer = args.answers.as_deref().map(JsonlWriter::open).transpose()?;
    let n = workload.val.len() as u64;
    let mut conditions = Vec::new();
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_header(["condition", "correct", "accuracy", "95 % interval", "well-formed", "n"]);
    for condition in Condition::applying(&injector) {
        let mut bar = console.progress(condition.name(), n);
        let answers = evaluation.run(&condition.pass(&injector), |done| bar.inc(done as u64))?;
        bar.finish();
        let correct = answers.iter().filter(|a| a.correct).count() as u64;
        let well_formed = answers.iter().filter(|a| a.well_formed).count() as f64 / n.max(1) as f64;
        let mut entry = results::accuracy(correct, n);
        entry["name"] = json!(condition.name());
        entry["well_formed_ratio"] = json!(well_formed);
        table.add_row([
            condition.name().to_string(),
            correct.to_string(),
            format!("{:.2} %", 100.0 * correct as f64 / n.max(1) as f64),
            interval(&entry),
            format!("{:.1} %", 100.0 * well_formed),
            n.to_string(),
        ]);
        conditions.push(entry);
        if let Some(writer) = &mut writer {
            let rows: Vec<Value> = answers
                .iter()
                .map(|a| {
                    let mut row = json!(a);
                    row["condition"] = json!(condition.name());
                    row
                })
                .collect();
            writer.write_rows(&rows)?;
        }
    }
    if global.json { super::print(json!({"n": n, "conditions": conditions})) } else { super::print(table) }
}

fn interval(entry: &Value) -> String {
    let bound = |i: usize| 100.0 * entry["ci95"][i].as_f64().unwrap_or(f64::NAN);
    format!("[{:.2}, {:.2}]", bound(0), bound(1))
}
