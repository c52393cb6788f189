//! `temper sweep FILE`: arms x seeds of one configuration, one run after the other. A run that has ended is not repeated, one that was
//! stopped goes on: the same command again finishes the sweep.

use std::path::PathBuf;

use serde_json::json;

use super::{Global, common, results, train};
use crate::Result;
use crate::analysis::statistics::mean_and_standard_error;
use crate::config::sweep::{Job, jobs};
use crate::rl::evaluation::Condition;
use crate::run::directory::run_path;
use crate::run::signals::Interrupt;

#[derive(clap::Args)]
pub struct Args {
    /// A sweep, e.g. configs/sweeps/srdd_compare.yaml
    pub file: PathBuf,
    /// Override one key of every arm (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Where run directories are made
    #[arg(long, default_value = "runs", value_name = "DIR")]
    pub out: PathBuf,
    /// Check every arm's configuration and inputs, and list the runs
    #[arg(long)]
    pub dry_run: bool,
}

pub fn run(args: &Args, global: &Global) -> Result<()> {
    let jobs = jobs(&args.file, &args.overrides)?;
    let directory = |job: &Job| run_path(&args.out, &job.config.name, &job.config.hash(), job.seed);
    if args.dry_run {
        let mut lines = Vec::new();
        for job in &jobs {
            common::check_inputs(&job.config).map_err(|e| e.at(format!("arm {}", job.arm)))?;
            lines.push(directory(job)?.display().to_string());
        }
        return super::print(lines.join("\n"));
    }
    let (interrupt, console) = (Interrupt::install()?, common::console(global));
    for (number, job) in jobs.iter().enumerate() {
        console.note(&format!("run {} of {}: {}, seed {}", number + 1, jobs.len(), job.arm, job.seed));
        train::train(&job.config, &args.out, true, global, &interrupt)?;
    }
    let mut arms: Vec<&str> = Vec::new();
    jobs.iter().for_each(|job| {
        if !arms.contains(&job.arm.as_str()) {
            arms.push(&job.arm);
        }
    });
    let mut table = common::plain_table(&["arm", "condition", "mean, %", "standard error", "seeds", "each, %"]);
    let mut rows = Vec::new();
    for arm in arms {
        for condition in Condition::ALL {
            let mut each = Vec::new();
            for job in jobs.iter().filter(|job| job.arm == arm) {
                each.extend(results::last_accuracy(&directory(job)?, condition)?);
            }
            let Some(mean) = mean_and_standard_error(&each) else { continue };
            let percent = |ratio: f64| format!("{:.1}", 100.0 * ratio);
            table.add_row([
                arm.to_string(),
                condition.name().to_string(),
                percent(mean.mean),
                percent(mean.standard_error),
                each.len().to_string(),
                each.iter().map(|a| percent(*a)).collect::<Vec<_>>().join(" "),
            ]);
            rows.push(json!({
                "arm": arm, "condition": condition.name(), "mean": mean.mean,
                "standard_error": mean.standard_error, "accuracies": each,
            }));
        }
    }
    if global.json { super::print(json!({"arms": rows})) } else { super::print(common::lines(&table)) }
}
