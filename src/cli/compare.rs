//! `temper compare RUN...`: what runs reached, arm against arm, with intervals and paired tests.

use std::path::PathBuf;

use super::{Global, common};
use crate::analysis::compare::{Comparison, render};
use crate::analysis::run_files::read_all;
use crate::model::checkpoint::atomic_file;
use crate::{Error, Result};

#[derive(clap::Args)]
pub struct Args {
    /// Run directories, or directories of them such as runs/; runs of one name and configuration are the seeds of an arm
    #[arg(required = true, value_name = "RUN")]
    pub runs: Vec<PathBuf>,
    /// The arm that the others are compared with (default: that of the first run)
    #[arg(long, value_name = "ARM")]
    pub baseline: Option<String>,
    /// How the result is written (--json: everything, as JSON)
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    /// Write the result to this file
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    Text,
    Markdown,
    Csv,
}

pub fn run(args: &Args, global: &Global) -> Result<()> {
    let runs = read_all(&args.runs)?;
    let comparison = Comparison::of(&runs.iter().collect::<Vec<_>>(), args.baseline.as_deref())?;
    let text = match args.format {
        _ if global.json => {
            serde_json::to_string(&comparison).map_err(|e| Error::Runtime(format!("the comparison as JSON: {e}")))?
        }
        Format::Text => render::text(&comparison),
        Format::Markdown => render::markdown(&comparison),
        Format::Csv => {
            // A table has no place for them.
            let console = common::console(global);
            comparison.warnings.iter().for_each(|warning| console.warn(warning));
            render::csv(&comparison)
        }
    };
    match &args.output {
        Some(file) => atomic_file(file, |to| writeln!(to, "{text}").map_err(|e| Error::io(file, e))),
        None => super::print(text),
    }
}
