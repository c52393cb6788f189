//! `temper validate MODEL REFERENCE`: which rule made a packed checkpoint from MODEL's weights, and how far ours is from
//! it; `--original`: the original system's comparison of formats over MODEL's linears.
//!
//! Exit code 0 where a rule reproduces every code and scale (and for `--original` alone), 1 where none does, which
//! includes a reference that is not packed at all: nothing was validated.

use std::path::Path;

use comfy_table::Table;
use serde_json::{Value, json};

use super::{Global, common, quantize};
use crate::model::checkpoint::validate::formats::{FORMATS, FormatTable, format_table};
use crate::model::checkpoint::validate::{Comparison, Reference, TensorScaleOutcome, compare};
use crate::model::checkpoint::{Checkpoint, resolve_model_path};
use crate::numerics::packed::PackedKind;
use crate::run::signals::Interrupt;
use crate::{Error, Result, bail_input};

#[derive(clap::Args)]
pub struct Args {
    /// The weights that REFERENCE was made from: a model directory, hub id in the local cache, or .safetensors file
    #[arg(value_name = "MODEL")]
    model: String,
    /// A directory with packed weights
    #[arg(value_name = "REFERENCE", required_unless_present = "original")]
    reference: Option<String>,
    /// Metrics of nvfp4, mxfp4 and nvfp4_single_level over MODEL's linears, as the original system showed them
    #[arg(long)]
    original: bool,
}

const UNMODIFIED: &str = "weights unmodified: this checkpoint quantizes lazily";

pub fn run(args: &Args, global: &Global) -> Result<()> {
    let model = quantize::open(&resolve_model_path(&args.model)?)?;
    let reference = args.reference.as_deref().map(|name| resolve_model_path(name).and_then(|path| open(&path)));
    let reference = reference.transpose()?;
    let interrupt = Interrupt::install()?;
    // A tensor is measured in all formats at once.
    let steps = model.names().count() * (usize::from(reference.is_some()) + usize::from(args.original));
    let mut bar = common::console(global).progress("validate, tensors", steps as u64);
    let mut progress = |name: &str| {
        bar.set_message(name);
        bar.inc(1);
        interrupt.check()
    };
    let found = reference.map(|reference| compare(&model, &reference, &mut progress)).transpose()?;
    let formats = args.original.then(|| format_table(&model, &mut progress)).transpose()?;
    bar.finish();
    if global.json {
        let mut value = found.as_ref().map_or(json!({}), comparison_json);
        if let Some(formats) = &formats {
            value["original"] = json!(formats);
        }
        super::print(value)?;
    } else {
        let texts = [found.as_ref().map(comparison_text), formats.as_ref().map(formats_text)];
        super::print(texts.into_iter().flatten().collect::<Vec<_>>().join("\n\n"))?;
    }
    match found {
        None => Ok(()),
        Some(Reference::Unmodified) => Err(Error::Runtime(format!("validate: found nothing to compare: {UNMODIFIED}"))),
        Some(Reference::Packed(comparison)) if comparison.reproducing().is_empty() => {
            Err(Error::Runtime(format!("validate: {}", verdict(&comparison))))
        }
        Some(Reference::Packed(_)) => Ok(()),
    }
}

fn open(path: &Path) -> Result<Checkpoint> {
    let checkpoint = Checkpoint::open(path)?;
    let packed_in_a_file = checkpoint.names().any(|name| name.ends_with("weight_packed")) && path.is_file();
    if packed_in_a_file {
        bail_input!("{}: found a file, expected a directory: config.json says how weights are packed", path.display());
    }
    Ok(checkpoint)
}

fn verdict(comparison: &Comparison) -> String {
    let (all, exact) = (comparison.tensors.len(), comparison.reproducing());
    if !exact.is_empty() {
        let what = match comparison.layout.kind {
            PackedKind::Nvfp4 => "codes, block scales and tensor scales",
            PackedKind::Mxfp4 => "codes and block scales",
        };
        return format!("{} reproduces all {what} of {all} tensors", exact.join(" and "));
    }
    match comparison.summaries().first() {
        Some(nearest) => format!(
            "no rule reproduces all {all} tensors; nearest: {} ({} tensors; {} of codes, {} of block scales and {} tensor \
             scales differ)",
            nearest.rule,
            nearest.tensors_reproduced,
            percent(nearest.codes_differing_ratio),
            percent(nearest.scales_differing_ratio),
            nearest.tensor_scales_differing
        ),
        None => "no rule applies to all tensors".into(),
    }
}

fn comparison_json(found: &Reference) -> Value {
    match found {
        Reference::Unmodified => json!({"reference": "unmodified", "reproduced": false, "verdict": UNMODIFIED}),
        Reference::Packed(comparison) => json!({
            "reference": comparison.layout.to_string(),
            "tensors": comparison.tensors.iter().map(|tensor| {
                let mut value = json!(tensor);
                value["best_rule"] = json!(comparison.best(tensor).map(|outcome| outcome.rule));
                value
            }).collect::<Vec<_>>(),
            "rules": comparison.summaries(),
            "best_rule": comparison.summaries().first().map(|summary| summary.rule),
            "reproduced": !comparison.reproducing().is_empty(),
            "unpacked": comparison.unpacked,
            "verdict": verdict(comparison),
        }),
    }
}

fn comparison_text(found: &Reference) -> String {
    let comparison = match found {
        Reference::Unmodified => return UNMODIFIED.into(),
        Reference::Packed(comparison) => comparison,
    };
    let mut tensors =
        table(&["tensor", "best rule", "codes differ", "scales differ", "tensor scale", "SQNR dB", "reference's"]);
    for tensor in &comparison.tensors {
        let Some(best) = comparison.best(tensor) else { continue };
        tensors.add_row([
            tensor.name.clone(),
            best.rule.to_string(),
            percent(best.codes_differing as f64 / best.codes as f64),
            percent(best.scales_differing as f64 / best.scales as f64),
            match best.tensor_scale {
                TensorScaleOutcome::None => "none",
                TensorScaleOutcome::Equal => "equal",
                TensorScaleOutcome::EqualUnshared => "equal, not shared",
                TensorScaleOutcome::Differs => "differs",
            }
            .to_string(),
            format!("{:.3}", best.sqnr_db),
            format!("{:.3}", tensor.reference_sqnr_db),
        ]);
    }
    let mut rules =
        table(&["rule", "tensors reproduced", "codes differ", "scales differ", "tensor scales", "mean SQNR dB"]);
    for summary in comparison.summaries() {
        rules.add_row([
            summary.rule.to_string(),
            format!("{} of {}", summary.tensors_reproduced, comparison.tensors.len()),
            percent(summary.codes_differing_ratio),
            percent(summary.scales_differing_ratio),
            match summary.tensor_scales_differing {
                0 => "equal".to_string(),
                differing => format!("{differing} differ"),
            },
            format!("{:.3}", summary.mean_sqnr_db),
        ]);
    }
    let mut text = format!("{tensors}\n\n{rules}\n");
    if !comparison.unpacked.is_empty() {
        text += &format!("not packed in REFERENCE: {}\n", comparison.unpacked.join(", "));
    }
    text + &format!("{}: {}", comparison.layout, verdict(comparison))
}

fn formats_text(found: &FormatTable) -> String {
    let names: Vec<String> = FORMATS.iter().map(|format| format.to_string()).collect();
    let mut columns = vec!["metric"];
    columns.extend(names.iter().map(String::as_str));
    columns.extend(["winner", "in linears"]);
    let mut table = table(&columns);
    for metric in &found.metrics {
        let mut row = vec![metric.metric.to_string()];
        row.extend(metric.means.iter().map(|mean| match metric.metric {
            "sqnr_db" => format!("{mean:.2}"),
            "cosine" => format!("{mean:.5}"),
            "relative_error" | "deadzone_ratio" => format!("{:.2} %", 100.0 * mean),
            _ => format!("{mean:.3e}"),
        }));
        let wins = FORMATS.iter().position(|format| *format == metric.winner).map_or(0, |i| metric.wins[i]);
        row.extend([metric.winner.to_string(), format!("{wins} of {}", metric.linears)]);
        table.add_row(row);
    }
    table.to_string()
}

fn percent(ratio: f64) -> String {
    match ratio {
        0.0 => "0 %".into(),
        ratio if ratio < 1e-4 => format!("{:.1e} %", 100.0 * ratio),
        ratio => format!("{:.3} %", 100.0 * ratio),
    }
}

fn table(columns: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(columns);
    table
}
