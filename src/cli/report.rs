//! `temper report`: one self-contained HTML page about runs.

use std::path::PathBuf;

use serde_json::json;

use super::Global;
use crate::analysis::report::{self, Report, arms};
use crate::{Result, input_error};

#[derive(clap::Args)]
pub struct Args {
    /// Run directories, and directories of run directories; the first arm is what others are compared with
    #[arg(required = true, value_name = "RUN")]
    pub runs: Vec<PathBuf>,
    /// The page
    #[arg(short, long, default_value = "report.html", value_name = "FILE")]
    pub output: PathBuf,
    /// Also write every figure as SVG and PNG
    #[arg(long, value_name = "DIR")]
    pub plots: Option<PathBuf>,
}

pub fn run(args: &Args, global: &Global) -> Result<()> {
    let report = Report::new(arms::read(&args.runs)?)?;
    let html = report.html()?;
    // What cannot be written is said before anything is.
    if let Some(directory) = &args.plots {
        std::fs::create_dir_all(directory).map_err(|e| input_error!("--plots {}: {e}", directory.display()))?;
    }
    report::write(&html, &args.output)?;
    if let Some(directory) = &args.plots {
        report.write_plots(directory)?;
    }
    let arms = report.arms();
    let runs: usize = arms.iter().map(|arm| arm.runs.len()).sum();
    let figures = report.figures();
    if global.json {
        return super::print(json!({
            "report": args.output, "bytes": html.len(), "runs": runs,
            "arms": arms.iter().map(|arm| json!({"name": arm.label, "seeds": arm.runs.len()})).collect::<Vec<_>>(),
            "figures": figures, "plots": args.plots,
        }));
    }
    super::print(format!(
        "{}: arms {}, runs {runs}, figures {}, {:.1} MB",
        args.output.display(),
        arms.len(),
        figures.len(),
        html.len() as f64 / 1e6
    ))
}
