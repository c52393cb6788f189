//! `temper scan --faults` and `--fault-table`: which device is searched, and what is printed.

use comfy_table::Table;

use super::common;
use super::scan::Args;
use crate::inject::injector::Injector;
use crate::model::qwen2::Qwen2;
use crate::numerics::format::Format;
use crate::run::console::Console;
use crate::run::signals::Interrupt;
use crate::srdd::device::Device;
use crate::srdd::fault_table::{FaultRow, fault_table};
use crate::srdd::faults::{FaultScan, scan_faults};
use crate::srdd::planted::{FaultKind, Planted};
use crate::srdd::prompts::Laid;
use crate::srdd::sensitivity::{Arm, injecting_all};
use crate::{Result, bail_input, input_error};

/// `KIND@LAYER`, then `:SEVERITY` and `:sparse` in any order.
pub fn planted(text: &str, layers: usize) -> Result<Planted> {
    let bad = || {
        let kinds = FaultKind::ALL.map(|kind| format!("{kind:?}").to_lowercase()).join(", ");
        input_error!("--plant {text}: expected KIND@LAYER[:SEVERITY][:sparse] with KIND one of {kinds}")
    };
    let mut parts = text.split(':');
    let (name, layer) = parts.next().and_then(|first| first.split_once('@')).ok_or_else(bad)?;
    let kind = FaultKind::ALL.into_iter().find(|kind| format!("{kind:?}").to_lowercase() == name).ok_or_else(bad)?;
    let layer: usize = layer.parse().map_err(|_| bad())?;
    if layer >= layers {
        bail_input!("--plant {text}: found layer {layer}, expected one below {layers}");
    }
    let mut planted = Planted { kind, severity: kind.severity(), layer, sparse: false, seed: 0 };
    for part in parts {
        match (part, part.parse::<f64>()) {
            ("sparse", _) => planted.sparse = true,
            (_, Ok(severity)) if severity > 0.0 && severity.is_finite() => planted.severity = severity,
            _ => return Err(bad()),
        }
    }
    Ok(planted)
}

/// A scan of each arm; of exact arithmetic where a fault is planted and nothing else asked for.
pub fn faults(
    args: &Args,
    model: &Qwen2,
    formats: &[Format],
    prompts: &[Vec<u32>],
    interrupt: &Interrupt,
    console: &Console,
) -> Result<Vec<FaultScan>> {
    let layers = model.config.num_hidden_layers;
    let planted = args.plant.as_deref().map(|text| planted(text, layers)).transpose()?;
    let arms: Vec<Option<Arm>> = match (args.noise, &planted) {
        (Some(scale), _) => vec![Some(Arm::Noise(scale))],
        (None, Some(_)) if args.format.is_empty() => vec![None],
        _ => formats.iter().map(|&format| Some(Arm::Weights(format))).collect(),
    };
    let laid = laid(model, prompts)?;
    let mut bar = console.progress("faults, layers", (arms.len() * layers) as u64);
    let mut found = Vec::new();
    for arm in arms {
        let plan = arm.map(|arm| injecting_all(&model.module_specs(), arm)).transpose()?;
        let injector = plan.map(|plan| Injector::applying(plan.clone(), plan, 1));
        model.invalidate();
        let (clean, device) = (Device::new(model, None, None)?, Device::new(model, injector.as_ref(), planted)?);
        let name = arm.map_or_else(|| "exact arithmetic".to_string(), Arm::name);
        let name = args.plant.as_ref().map_or(name.clone(), |plant| format!("{name}, {plant} planted"));
        let mut progress = || {
            bar.inc(1);
            interrupt.check()
        };
        found.push(scan_faults(&clean, &device, &name, &laid, &mut progress)?);
        model.invalidate();
    }
    bar.finish();
    Ok(found)
}

pub fn table_of_faults(
    args: &Args,
    model: &Qwen2,
    prompts: &[Vec<u32>],
    interrupt: &Interrupt,
    console: &Console,
) -> Result<Vec<FaultRow>> {
    let mut bar = console.progress("fault table, layers", model.config.num_hidden_layers as u64);
    let mut progress = || {
        bar.inc(1);
        interrupt.check()
    };
    let rows = fault_table(&Device::new(model, None, None)?, &laid(model, prompts)?, args.draws, &mut progress)?;
    bar.finish();
    Ok(rows)
}

fn laid(model: &Qwen2, prompts: &[Vec<u32>]) -> Result<Vec<Laid>> {
    prompts.iter().enumerate().map(|(number, ids)| Laid::new(ids, number, model)).collect()
}

pub fn text(scan: &FaultScan) -> String {
    let mut table = common::plain_table(&[
        "layer",
        "gain",
        "x clean",
        "kurtosis",
        "x clean",
        "instability",
        "min gain",
        "max gain",
        "unresponsive",
        "pile-up",
    ]);
    for p in &scan.probes {
        let mut row = vec![p.layer.to_string()];
        row.extend([p.gain, p.gain_ratio, p.kurtosis, p.kurtosis_ratio].map(|v| format!("{v:.3}")));
        row.push(format!("{:.2e}", p.instability));
        row.extend([p.min_gain, p.max_gain].map(|v| format!("{v:.2}")));
        row.extend([p.unresponsive_ratio, p.pile_up_ratio].map(|v| format!("{:.3} %", 100.0 * v)));
        table.add_row(row);
    }
    let mut text = format!("faults, {} against the clean model\n{}\nsuspects: ", scan.arm, common::lines(&table));
    if scan.suspects.is_empty() {
        text += "none";
    }
    for suspect in &scan.suspects {
        let kind = format!("{:?}", suspect.kind).to_lowercase();
        text += &format!(
            "\n  layer {}: {kind}, {:.1} x the limit: {}",
            suspect.layer,
            suspect.score,
            suspect.reasons.join("; ")
        );
    }
    if scan.probes.len() == 1 {
        text += "\none layer: nothing to compare it with, only absolute signs of a fault count";
    }
    text
}

pub fn table_text(rows: &[FaultRow]) -> String {
    let mut table: Table = common::plain_table(&[
        "fault",
        "channels",
        "cases",
        "inert",
        "first suspect",
        "and kind right",
        "others accused",
        "found from",
    ]);
    for row in rows {
        let share = |count: usize| format!("{:.1} %", 100.0 * count as f64 / row.cases.max(1) as f64);
        table.add_row([
            format!("{:?}", row.kind).to_lowercase(),
            if row.sparse { "10 %" } else { "all" }.to_string(),
            row.cases.to_string(),
            row.inert.to_string(),
            share(row.first),
            share(row.kind_right),
            share(row.others_accused),
            row.least_severity.map_or("-".to_string(), |s| format!("{s:.1e}")),
        ]);
    }
    format!("planted faults, one at a time, exact arithmetic otherwise\n{}", common::lines(&table))
}
