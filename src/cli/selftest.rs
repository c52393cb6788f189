//! `temper selftest`: every kernel on this machine's GPU against the CPU operation. Exit code 1 on any difference, and where
//! a check could not run.

use std::collections::BTreeMap;

use serde_json::json;

use super::Global;
use crate::bench::selftest::{Check, GPU, Sizes, run as run_checks};
use crate::device::{self, Device};
use crate::ops::cuda::launch::Gpu;
use crate::run::console::to_stderr;
use crate::{Error, Result, bail_input};

#[derive(clap::Args)]
pub struct Args {
    /// Small matrices alone: seconds, also under compute-sanitizer
    #[arg(long)]
    quick: bool,
}

pub fn run(args: &Args, global: &Global) -> Result<()> {
    let device = device::parse(global.device.as_deref())?;
    let Device::Cuda(index) = device else {
        if global.device.is_some() {
            bail_input!("selftest: --device cpu: expected cuda or cuda:N; the tests run the kernels without a GPU");
        }
        let reason = device::cuda_devices().err().unwrap_or_default();
        return Err(Error::Unavailable(format!("selftest: nothing was run: {reason}")));
    };
    let progress = |kernel: &str| {
        if !global.quiet {
            to_stderr(format_args!("selftest: {kernel}"));
        }
    };
    let sizes = if args.quick { Sizes { large: &[], ..GPU } } else { GPU };
    let checks = run_checks(&Gpu::number(index), &sizes, &progress)?;
    let failed = checks.iter().filter(|check| check.not_run.is_none() && !check.passed()).count();
    let not_run = checks.iter().filter(|check| check.not_run.is_some()).count();
    let passed = checks.len() - failed - not_run;
    if global.json {
        let name = device::name(device);
        super::print(
            json!({"device": name, "passed": passed, "failed": failed, "not_run": not_run, "checks": checks}),
        )?;
    } else {
        super::print(table(&checks))?;
        super::print(format!(
            "{passed} equal, {failed} differ, {not_run} could not be run, on {}",
            device::name(device)
        ))?;
    }
    match failed + not_run {
        0 => Ok(()),
        _ => Err(Error::Runtime(format!("selftest: {failed} checks differ and {not_run} could not be run"))),
    }
}

/// A line for each kernel, case and dtype over its shapes.
pub fn table(checks: &[Check]) -> String {
    let mut groups: BTreeMap<(&str, &str, &str), Vec<&Check>> = BTreeMap::new();
    for check in checks {
        groups.entry((check.kernel, &check.case, check.dtype)).or_default().push(check);
    }
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(["kernel", "case", "dtype", "shapes", "compared", "differ", "result"]);
    for ((kernel, case, dtype), checks) in groups {
        let sum = |of: fn(&Check) -> u64| checks.iter().map(|check| of(check)).sum::<u64>().to_string();
        let result = match checks.iter().find(|check| !check.passed()) {
            None => "equal".to_string(),
            Some(Check { shape, not_run: Some(reason), .. }) => format!("not run at {shape:?}: {reason}"),
            Some(Check { shape, .. }) => format!("differs at {shape:?}"),
        };
        let shapes = checks.len().to_string();
        table.add_row([kernel, case, dtype, &shapes, &sum(|c| c.compared), &sum(|c| c.differing), &result]);
    }
    table.to_string().lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}
