//! `temper quantize IN OUT --format F`: a copy of a model (or of one .safetensors file) with fake-quantized
//! weights, and how far each tensor moved.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::{Global, common};
use crate::model::checkpoint::quantize::{DEFAULT_EXCLUDED, QuantizedTensor, Quantizer, mean_error};
use crate::model::checkpoint::{
    Checkpoint, MAX_SHARD_BYTES, TensorSink, TensorSpec, atomic_directory, resolve_model_path, write_safetensors_with,
    write_weights,
};
use crate::model::config::Qwen2Config;
use crate::numerics::format::Format;
use crate::numerics::tensor_error::TensorError;
use crate::run::console::Progress;
use crate::run::signals::Interrupt;
use crate::{Error, Result, bail_input};

#[derive(clap::Args)]
pub struct Args {
    /// Model directory, hub id in the local cache, or a .safetensors file
    #[arg(value_name = "IN")]
    input: String,
    /// What to write: a directory for a model, a .safetensors file for a file; must not exist yet
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// Block format, such as mxfp4, mxfp4:even, nvfp4, nvfp4:sr, fp8
    #[arg(long, short)]
    format: String,
    /// Packed codes and scales in the compressed-tensors layout
    #[arg(long)]
    pack: bool,
}

pub fn run(args: &Args, global: &Global) -> Result<()> {
    if args.pack {
        bail_input!("--pack: not available yet; without it the quantized values are written in the stored dtype");
    }
    let format: Format = args.format.parse()?;
    let input = resolve_model_path(&args.input)?;
    check_output(&input, &args.output)?;
    let checkpoint = open(&input)?;
    let quantizer = Quantizer::new(&checkpoint, format, &DEFAULT_EXCLUDED)?;
    let mut report = if input.is_dir() {
        quantize_directory(&quantizer, &input, &args.output, global)?
    } else {
        let mut pass = Pass::new(&quantizer, global)?;
        write_safetensors_with(&args.output, &quantizer.specs, |index, sink| pass.fill(index, sink))?;
        pass.finish()
    };
    let order = |t: &QuantizedTensor| quantizer.specs.iter().position(|spec| spec.name == t.name);
    report.sort_by_key(order);
    print_report(&report, &quantizer, format, global)
}

/// Opens IN; the configuration of a model directory must be sound and agree with the weights.
fn open(input: &Path) -> Result<Checkpoint> {
    if !input.is_dir() {
        return Checkpoint::open(input);
    }
    let config = Qwen2Config::from_dir(input)?;
    let checkpoint = Checkpoint::open(input)?;
    checkpoint.check(&config)?;
    Ok(checkpoint)
}

fn check_output(input: &Path, output: &Path) -> Result<()> {
    let place = output.display();
    let parent = output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let parent = parent.canonicalize().map_err(|e| Error::io(parent, e))?;
    let input_place = input.canonicalize().map_err(|e| Error::io(input, e))?;
    if input.is_dir() && (parent.starts_with(&input_place) || output.canonicalize().is_ok_and(|o| o == input_place)) {
        bail_input!("{place}: found a place inside {}, expected OUT outside IN", input.display());
    }
    if output.file_name().is_none() {
        bail_input!("{place}: expected a name for OUT");
    }
    let Ok(existing) = output.symlink_metadata() else {
        return Ok(());
    };
    let empty_directory = existing.is_dir() && output.read_dir().map_err(|e| Error::io(output, e))?.next().is_none();
    match (input.is_dir(), empty_directory) {
        (true, true) => Ok(()),
        (true, false) => bail_input!("{place}: already exists, expected a new or empty directory"),
        (false, _) => {
            bail_input!("{place}: already exists, expected the name of a new .safetensors file")
        }
    }
}

fn quantize_directory(
    quantizer: &Quantizer,
    input: &Path,
    output: &Path,
    global: &Global,
) -> Result<Vec<QuantizedTensor>> {
    let mut pass = Pass::new(quantizer, global)?;
    atomic_directory(output, |temporary| {
        copy_other_files(input, temporary)?;
        write_weights(temporary, &quantizer.specs, MAX_SHARD_BYTES, |index, sink| pass.fill(index, sink))
    })?;
    Ok(pass.finish())
}

/// Everything at the top of a model directory but weights and hidden files: configuration, tokenizer, licence.
fn copy_other_files(input: &Path, output: &Path) -> Result<()> {
    const WEIGHTS: [&str; 7] = ["safetensors", "bin", "pt", "pth", "gguf", "h5", "msgpack"];
    for entry in input.read_dir().map_err(|e| Error::io(input, e))? {
        let path = entry.map_err(|e| Error::io(input, e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let extension = path.extension().unwrap_or_default().to_string_lossy().into_owned();
        let weights = WEIGHTS.contains(&extension.as_str()) || name.ends_with(".index.json");
        if path.is_file() && !weights && !name.starts_with('.') {
            std::fs::copy(&path, output.join(&name)).map_err(|e| Error::io(&path, e))?;
        }
    }
    Ok(())
}

/// One pass over the tensors with its progress and what it found. A signal ends it; nothing is left behind.
struct Pass<'a> {
    quantizer: &'a Quantizer<'a>,
    bar: Progress,
    bytes_done: u64,
    interrupt: Interrupt,
    report: Vec<QuantizedTensor>,
}

impl<'a> Pass<'a> {
    fn new(quantizer: &'a Quantizer<'a>, global: &Global) -> Result<Pass<'a>> {
        let total_bytes: u64 = quantizer.specs.iter().map(TensorSpec::bytes).sum();
        let bar = common::console(global).progress("quantize, MiB", total_bytes >> 20);
        Ok(Pass { quantizer, bar, bytes_done: 0, interrupt: Interrupt::install()?, report: Vec::new() })
    }

    fn fill(&mut self, index: usize, sink: &mut TensorSink) -> Result<()> {
        self.bar.set_message(self.quantizer.specs[index].name.clone());
        let found = self.quantizer.fill(index, sink, &mut |bytes| {
            let before = self.bytes_done >> 20;
            self.bytes_done += bytes as u64;
            self.bar.inc((self.bytes_done >> 20) - before);
            match self.interrupt.requested() {
                true => Err(Error::Interrupted("nothing was written".into())),
                false => Ok(()),
            }
        })?;
        self.report.extend(found);
        Ok(())
    }

    fn finish(self) -> Vec<QuantizedTensor> {
        self.bar.finish();
        self.report
    }
}

fn print_report(report: &[QuantizedTensor], quantizer: &Quantizer, format: Format, global: &Global) -> Result<()> {
    let mean = mean_error(report);
    let nonfinite: usize = report.iter().map(|t| t.nonfinite_blocks).sum();
    let copied = quantizer.specs.len() - report.len();
    for tensor in report.iter().filter(|t| t.nonfinite_blocks > 0) {
        eprintln!(
            "warning: tensor {}: {} blocks hold NaN or infinity and became NaN",
            tensor.name, tensor.nonfinite_blocks
        );
    }
    let text = if global.json {
        let value = json!({
            "format": format,
            "tensors": report,
            "mean": mean,
            "copied_tensors": copied,
            "nonfinite_blocks": nonfinite,
        });
        value.to_string()
    } else {
        let quantized = report.len();
        format!("{}\n{quantized} tensors quantized to {format}, {copied} copied", table(report, &mean))
    };
    super::print(text)
}

fn table(report: &[QuantizedTensor], mean: &TensorError) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["tensor", "SQNR dB", "relative error", "cosine", "deadzone", "saturated"]);
    let row = |name: &str, e: &TensorError| {
        [
            name.to_string(),
            format!("{:.2}", e.sqnr_db),
            format!("{:.2} %", 100.0 * e.relative_error),
            format!("{:.5}", e.cosine),
            format!("{:.2} %", 100.0 * e.deadzone_ratio),
            format!("{:.2} %", 100.0 * e.saturation_ratio),
        ]
    };
    for tensor in report {
        table.add_row(row(&tensor.name, &tensor.error));
    }
    if report.len() > 1 {
        table.add_row(row("mean", mean));
    }
    table
}
