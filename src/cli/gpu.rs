//! `temper gpu`: every GPU of this machine now, a row each. Always exits 0: absence is an answer.

use serde_json::json;

use super::{Global, common};
use crate::Result;
use crate::device::gpu::processes::gib;
use crate::device::gpu::{self, Gpu};

#[derive(clap::Args)]
pub struct Args {}

pub fn run(_args: &Args, global: &Global) -> Result<()> {
    let found = gpu::probe();
    if global.json {
        let gpus = found.as_ref().map_or(&[][..], |found| &found.gpus);
        return super::print(json!({"gpus": gpus, "problem": found.as_ref().err()}));
    }
    match found {
        Ok(found) if found.gpus.is_empty() => super::print("no GPU"),
        Ok(found) => super::print(table(&found.gpus)),
        Err(reason) => super::print(format!("no GPU ({reason})")),
    }
}

fn table(gpus: &[Gpu]) -> String {
    let mut table = common::plain_table(&[
        "GPU",
        "name",
        "busy",
        "memory, GiB",
        "power, W",
        "°C",
        "SM, MHz",
        "memory, MHz",
        "clocks limited by",
        "ECC errors (not corrected)",
        "processes",
    ]);
    for gpu in gpus {
        let now = &gpu.now;
        // What the card does not tell is a dash.
        let shown = |value: Option<String>| value.unwrap_or_else(|| "-".into());
        let size = |bytes: Option<u64>| shown(bytes.map(|bytes| format!("{:.1}", gib(bytes))));
        let clock = |mhz: Option<u32>| shown(mhz.map(|mhz| mhz.to_string()));
        let ecc = now.ecc_corrected.zip(now.ecc_uncorrected).map(|(yes, no)| format!("{} ({no})", yes + no));
        let processes =
            now.processes.as_ref().map(|all| all.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "));
        table.add_row([
            gpu.index.to_string(),
            gpu.name.clone(),
            shown(now.utilization_ratio.map(|ratio| format!("{:.0} %", 100.0 * ratio))),
            format!("{} of {}", size(now.memory_used_bytes), size(gpu.memory_total_bytes)),
            format!("{} of {}", watts(now.power_w), watts(gpu.power_limit_w)),
            clock(now.temperature_c),
            clock(now.sm_clock_mhz),
            clock(now.memory_clock_mhz),
            shown(now.throttle_reasons.as_ref().map(|reasons| reasons.join(", "))),
            shown(ecc),
            shown(processes),
        ]);
    }
    common::lines(&table)
}

fn watts(power: Option<f64>) -> String {
    power.map_or_else(|| "-".into(), |watts| format!("{watts:.0}"))
}
