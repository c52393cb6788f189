//! What `temper scan` prints: a table a part.

use super::common::{lines, plain_table as table};
use super::scan::Found;
use super::scan_faults;
use crate::numerics::tensor_error::TensorError;
use crate::srdd::summary::FormatSummary;

pub fn text(found: &Found) -> String {
    let mut parts = Vec::new();
    if let Some(scan) = &found.weights {
        parts.push(format!("weights, means over each layer's linears\n{}", of_formats(&scan.formats)));
        parts.extend(won(&scan.wins));
        if scan.nonfinite_blocks > 0 {
            parts.push(format!("{} blocks hold NaN or infinity and enter no metric", scan.nonfinite_blocks));
        }
    }
    if let Some(scan) = &found.activations {
        parts.push(format!(
            "output of each layer over {} tokens, per token\n{}",
            scan.tokens,
            of_formats(&scan.formats)
        ));
        let sinks: u64 = scan.layers.iter().map(|layer| layer.sink_tokens).max().unwrap_or(0);
        if sinks > 0 {
            let mut table = table(&["layer", "format", "sinks", "SQNR dB", "without sinks"]);
            for layer in scan.layers.iter().filter(|layer| layer.sink_tokens > 0) {
                table.add_row([
                    layer.layer.to_string(),
                    layer.format.to_string(),
                    layer.sink_tokens.to_string(),
                    format!("{:.2}", layer.error.sqnr_db),
                    format!("{:.2}", layer.without_sinks.sqnr_db),
                ]);
            }
            parts.push(format!("layers with attention sinks\n{}", lines(&table)));
        }
    }
    for arm in &found.sensitivity {
        let mut table = table(&["layer", "KL, nats", "top-1 changed"]);
        let row =
            |name: String, kl: f64, changed: f64| [name, format!("{kl:.3e}"), format!("{:.2} %", 100.0 * changed)];
        for layer in &arm.layers {
            let name = match arm.window {
                1 => layer.layer.to_string(),
                window => format!("{}-{}", layer.layer, layer.layer + window - 1),
            };
            table.add_row(row(name, layer.shift.kl, layer.shift.top1_changed_ratio));
        }
        table.add_row(row("all".into(), arm.all_layers.kl, arm.all_layers.top1_changed_ratio));
        parts.push(format!("output, {} in these layers alone\n{}", arm.arm, lines(&table)));
    }
    parts.extend(found.faults.iter().map(scan_faults::text));
    if !found.fault_table.is_empty() {
        parts.push(scan_faults::table_text(&found.fault_table));
    }
    if let Some(changes) = &found.changes {
        let mut table = table(&["layer", "|after - before| / |before|", "elements changed"]);
        let inside = changes.layers.iter().map(|layer| (layer.layer.to_string(), layer.change));
        let rest = [("outside".to_string(), changes.outside_layers), ("all".to_string(), changes.all)];
        for (name, change) in inside.chain(rest) {
            let changed = format!("{:.2} %", 100.0 * change.changed_elements_ratio);
            table.add_row([name, format!("{:.3e}", change.relative_change), changed]);
        }
        parts.push(format!("changes\n{}", lines(&table)));
    }
    parts.join("\n\n")
}

fn of_formats(formats: &[FormatSummary]) -> String {
    let header = formats
        .iter()
        .flat_map(|f| [format!("{} SQNR dB", f.format), "relative error".to_string(), "deadzone".to_string()]);
    let mut table = table(&[]);
    table.set_header(std::iter::once("layer".to_string()).chain(header));
    let cells = |e: &TensorError| {
        let percent = |ratio: f64| format!("{:.2} %", 100.0 * ratio);
        [format!("{:.2}", e.sqnr_db), percent(e.relative_error), percent(e.deadzone_ratio)]
    };
    for place in 0..formats.first().map_or(0, |f| f.layers.len()) {
        let name = formats[0].layers[place].layer.to_string();
        table.add_row(std::iter::once(name).chain(formats.iter().flat_map(|f| cells(&f.layers[place].mean))));
    }
    table.add_row(std::iter::once("mean".to_string()).chain(formats.iter().flat_map(|f| cells(&f.mean))));
    lines(&table)
}

/// In how many layers each format wins.
fn won(wins: &std::collections::BTreeMap<&'static str, std::collections::BTreeMap<String, usize>>) -> Option<String> {
    let formats: Vec<&String> = wins.values().next()?.keys().collect();
    let mut table = table(&[]);
    table.set_header(std::iter::once("best in so many layers").chain(formats.iter().map(|f| f.as_str())));
    for (metric, of_formats) in wins {
        table.add_row(std::iter::once((*metric).to_string()).chain(of_formats.values().map(usize::to_string)));
    }
    Some(lines(&table))
}
