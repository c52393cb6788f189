//! `temper eval --error-scales --formats`: what is left of the accuracy at each error of the products and in each format.

use std::path::Path;

use comfy_table::{Table, presets};
use serde_json::{Value, json};

use super::{common, eval};
use crate::analysis::compare::render::probability;
use crate::analysis::plot::{self, LineChart};
use crate::analysis::statistics::mcnemar::mcnemar;
use crate::config::{self, Config};
use crate::numerics::format::Format;
use crate::rl::evaluation::{Answer, Condition};
use crate::{Error, Result, bail_input};

/// What is injected: error of the products, format of weights and of activations.
pub type Injected = (f64, Option<Format>, Option<Format>);

/// One error scale in one format.
pub struct Cell {
    pub config: Config,
}

impl Cell {
    pub fn injected(&self) -> Injected {
        injected(&self.config, Condition::Deployed)
    }

    pub fn condition(&self) -> Condition {
        match self.injected() {
            (0.0, None, None) => Condition::Clean,
            (_, None, None) => Condition::Noisy,
            (0.0, ..) => Condition::Quantized,
            _ => Condition::Deployed,
        }
    }

    fn format(&self) -> String {
        let (_, weights, activations) = self.injected();
        match (weights, activations) {
            (None, None) => "none".to_string(),
            (Some(weights), None) => weights.to_string(),
            (Some(weights), Some(activations)) if weights == activations => format!("{weights} w+a"),
            (Some(weights), Some(activations)) => format!("{weights} w, {activations} a"),
            (None, Some(activations)) => format!("{activations} a"),
        }
    }

    /// What identifies the cell in JSON.
    pub fn labels(&self) -> Value {
        let (error_scale, weights, activations) = self.injected();
        json!({"error_scale": error_scale, "format": self.format(), "weights": weights, "activations": activations})
    }
}

/// What a configuration injects under a condition.
pub fn injected(config: &Config, condition: Condition) -> Injected {
    let noisy = matches!(condition, Condition::Noisy | Condition::Deployed) && config.noisy_ops.enabled;
    let quantized = matches!(condition, Condition::Quantized | Condition::Deployed) && config.fake_quant.enabled;
    let quant = &config.fake_quant;
    let scale = if noisy { config.noisy_ops.error_scale } else { 0.0 };
    (scale, quant.weights.filter(|_| quantized), quant.activations.filter(|_| quantized))
}

/// The cells that the options ask for, format by format; none where they ask for nothing. Each configuration is loaded and
/// checked like any other.
pub fn cells(args: &eval::Args, config: &Config) -> Result<Vec<Cell>> {
    let formats = formats(&args.formats)?;
    if let Some(twice) = twice(&args.error_scales) {
        bail_input!("--error-scales: found {twice} twice");
    }
    if args.error_scales.is_empty() && formats.is_empty() {
        if args.plot.is_some() {
            bail_input!("--plot: expected --error-scales or --formats with it: it draws what they ask for");
        }
        return Ok(Vec::new());
    }
    let noise = |scale: &f64| -> Vec<String> {
        let enabled = format!("noisy_ops.enabled={}", *scale != 0.0);
        vec![enabled, format!("noisy_ops.error_scale={scale}"), "noisy_ops.phases=[validation]".to_string()]
    };
    let (quant, own) = (&config.fake_quant, "fake_quant.phases=[validation]".to_string());
    let quantization = |format: &String| -> Vec<String> {
        if format == "none" {
            return vec!["fake_quant.enabled=false".to_string()];
        }
        let mut sets = vec!["fake_quant.enabled=true".to_string(), own.clone()];
        let replaced = [
            ("weights", quant.weights.is_some() || !quant.enabled),
            ("activations", quant.activations.is_some() && quant.enabled),
        ];
        for (key, replaced) in replaced {
            sets.push(if replaced {
                format!("fake_quant.{key}=\"{format}\"")
            } else {
                format!("fake_quant.{key}=null")
            });
        }
        sets
    };
    let mut noises: Vec<Vec<String>> = args.error_scales.iter().map(noise).collect();
    if noises.is_empty() {
        noises.push(vec!["noisy_ops.phases=[validation]".to_string()]);
    }
    let mut quantizations: Vec<Vec<String>> = formats.iter().map(quantization).collect();
    if quantizations.is_empty() {
        quantizations.push(vec![own.clone()]);
    }
    let mut cells = Vec::new();
    for quantization in &quantizations {
        for noise in &noises {
            let sets = [&args.overrides[..], quantization, noise].concat();
            let mut config = config::load(&args.config, &sets).map_err(as_asked)?;
            config.model.path = Some(args.model.clone());
            cells.push(Cell { config });
        }
    }
    Ok(cells)
}

/// An error in the words of the option that was given.
fn as_asked(error: Error) -> Error {
    match error {
        Error::Input(text) => Error::Input(text.replace("--set noisy_ops.error_scale=", "--error-scales ")),
        other => other,
    }
}

/// Each in its one spelling, or `none`.
fn formats(texts: &[String]) -> Result<Vec<String>> {
    let spelled = |name: String| match name.as_str() {
        "none" => Ok(name),
        _ => Ok(name.parse::<Format>().map_err(|e| e.at("--formats"))?.to_string()),
    };
    let formats = common::format_names(texts).into_iter().map(spelled).collect::<Result<Vec<String>>>()?;
    match twice(&formats) {
        Some(twice) => bail_input!("--formats: found {twice} twice"),
        None => Ok(formats),
    }
}

fn twice<T: PartialEq>(values: &[T]) -> Option<&T> {
    values.iter().enumerate().find(|(i, value)| values[..*i].contains(value)).map(|(_, value)| value)
}

/// A cell's answers beside the clean ones.
pub fn row(cell: &Cell, answers: &[Answer], clean: &[Answer]) -> Value {
    let marks = |answers: &[Answer]| answers.iter().map(|answer| answer.correct).collect::<Vec<bool>>();
    let test = mcnemar(&marks(clean), &marks(answers));
    let change = (test.second_only as f64 - test.first_only as f64) / answers.len().max(1) as f64;
    let tested = json!({
        "difference_from_clean": change, "lost": test.first_only, "gained": test.second_only, "p_mid": test.p_mid,
    });
    eval::labelled(eval::labelled(cell.labels(), &eval::measured(answers)), &tested)
}

pub fn table(rows: &[Value]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_header([
        "error, %",
        "format",
        "correct",
        "accuracy",
        "95 % interval",
        "well-formed",
        "from clean, points",
        "lost",
        "gained",
        "p",
    ]);
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    for row in rows {
        let mut cells = vec![
            format!("{}", rounded(100.0 * number(&row["error_scale"]))),
            row["format"].as_str().unwrap_or("").to_string(),
        ];
        cells.extend(eval::measured_cells(row));
        cells.push(format!("{:+.2}", 100.0 * number(&row["difference_from_clean"])));
        cells.extend([row["lost"].to_string(), row["gained"].to_string(), probability(row["p_mid"].as_f64())]);
        table.add_row(cells);
    }
    table
}

/// Accuracy over the error scale, a line per format.
pub fn plot(rows: &[Value], stem: &Path) -> Result<()> {
    let mut lines: Vec<(String, Vec<(f64, f64)>)> = Vec::new();
    let percent = |value: &Value| rounded(100.0 * value.as_f64().unwrap_or(f64::NAN));
    for row in rows {
        let (format, point) =
            (row["format"].as_str().unwrap_or(""), (percent(&row["error_scale"]), percent(&row["accuracy"])));
        match lines.iter_mut().find(|(name, _)| name == format) {
            Some((_, points)) => points.push(point),
            None => lines.push((format.to_string(), vec![point])),
        }
    }
    lines.iter_mut().for_each(|(_, points)| points.sort_by(|a, b| a.0.total_cmp(&b.0)));
    let n = rows.first().map_or(Value::Null, |row| row["n"].clone());
    let title = format!("accuracy under error, n = {n}");
    let chart = LineChart::of_lines(title, "relative error of every product, %", "accuracy, %", lines);
    plot::write(&chart, stem)
}

/// 100 * 0.07 is 7.000000000000001.
fn rounded(percent: f64) -> f64 {
    (percent * 1e9).round() / 1e9
}
