//! `temper quantize IN OUT --format F [--pack [--activations]]`: a copy of a model (or of one .safetensors file) with
//! fake-quantized weights, or with codes and scales as vLLM loads them, and how far each tensor moved.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{Global, common};
use crate::model::calibration;
use crate::model::checkpoint::quantize::pack::Packer;
use crate::model::checkpoint::quantize::{DEFAULT_EXCLUDED, QuantizedTensor, Quantizer, TensorSource, mean_error};
use crate::model::checkpoint::{
    Checkpoint, MAX_SHARD_BYTES, TensorSink, TensorSpec, atomic_directory, resolve_model_path,
    write_quantization_config, write_safetensors_with, write_weights,
};
use crate::model::config::{Qwen2Config, quantization};
use crate::numerics::format::Format;
use crate::numerics::packed::PackedKind;
use crate::numerics::tensor_error::TensorError;
use crate::run::console::{Progress, to_stderr};
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
    /// Packed for quantized activations too (W4A4); nvfp4 stores the scales that training calibrated
    #[arg(long, requires = "pack")]
    activations: bool,
}

pub fn run(args: &Args, global: &Global) -> Result<()> {
    let format: Format = args.format.parse()?;
    let input = resolve_model_path(&args.input)?;
    check_output(&input, &args.output)?;
    let checkpoint = open(&input)?;
    let quantizer = Quantizer::new(&checkpoint, format, &DEFAULT_EXCLUDED)?;
    let (packer, config);
    let (source, config): (&dyn TensorSource, Option<&Value>) = if args.pack {
        packer = packer_of(&quantizer, &input, args)?;
        config = quantization::to_json(packer.kind, args.activations);
        (&packer, Some(&config))
    } else {
        (&quantizer, None)
    };
    let mut pass = Pass::new(source, &quantizer, global)?;
    if input.is_dir() {
        quantize_directory(&mut pass, &input, &args.output, config)?;
    } else {
        write_safetensors_with(&args.output, source.specs(), |index, sink| pass.fill(index, sink))?;
    }
    let mut report = pass.finish();
    let order = |t: &QuantizedTensor| quantizer.specs.iter().position(|spec| spec.name == t.name);
    report.sort_by_key(order);
    print_report(&report, &quantizer, args.pack, format, global)
}

/// The packer; with `--activations` in nvfp4 it stores the scales of the calibration that lies in the model directory.
fn packer_of<'a>(quantizer: &'a Quantizer<'a>, input: &Path, args: &Args) -> Result<Packer<'a>> {
    let plain = Packer::new(quantizer, None)?;
    if !args.activations {
        return Ok(plain);
    }
    if !input.is_dir() {
        bail_input!("--activations: found a file ({}), expected a model directory", input.display());
    }
    if plain.kind == PackedKind::Mxfp4 {
        return Ok(plain); // whoever runs the model finds the scales of its activations, block by block
    }
    let path = input.join(calibration::FILE);
    if !path.exists() {
        bail_input!(
            "{}: no such file, expected the calibrated activation scales that nvfp4 activations need; a run with \
             fake_quant.activation_scale: static writes them into its checkpoints",
            path.display()
        );
    }
    Packer::new(quantizer, Some(&calibration::read_all(input)?)).map_err(|e| e.at(path.display()))
}

/// Opens IN; the configuration of a model directory must be sound and agree with the weights.
pub(super) fn open(input: &Path) -> Result<Checkpoint> {
    if !input.is_dir() {
        return Checkpoint::open(input);
    }
    let config = Qwen2Config::from_dir(input)?;
    let checkpoint = Checkpoint::open(input)?;
    checkpoint.check(&config)?;
    Ok(checkpoint)
}

pub(super) fn check_output(input: &Path, output: &Path) -> Result<()> {
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

fn quantize_directory(pass: &mut Pass, input: &Path, output: &Path, config: Option<&Value>) -> Result<()> {
    let source = pass.source;
    atomic_directory(output, |temporary| {
        copy_other_files(input, temporary)?;
        if let Some(config) = config {
            write_quantization_config(temporary, config)?;
        }
        write_weights(temporary, source.specs(), MAX_SHARD_BYTES, |index, sink| pass.fill(index, sink))
    })
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
    source: &'a dyn TensorSource,
    bar: Progress,
    bytes_done: u64,
    interrupt: Interrupt,
    report: Vec<QuantizedTensor>,
}

impl<'a> Pass<'a> {
    fn new(source: &'a dyn TensorSource, quantizer: &Quantizer, global: &Global) -> Result<Pass<'a>> {
        let total_bytes: u64 = quantizer.specs.iter().map(TensorSpec::bytes).sum();
        let bar = common::console(global).progress("quantize, MiB", total_bytes >> 20);
        Ok(Pass { source, bar, bytes_done: 0, interrupt: Interrupt::install()?, report: Vec::new() })
    }

    fn fill(&mut self, index: usize, sink: &mut TensorSink) -> Result<()> {
        self.bar.set_message(self.source.specs()[index].name.clone());
        let found = self.source.fill(index, sink, &mut |bytes| {
            let before = self.bytes_done >> 20;
            self.bytes_done += bytes as u64;
            self.bar.inc((self.bytes_done >> 20) - before);
            self.interrupt.check()
        })?;
        self.report.extend(found);
        Ok(())
    }

    fn finish(self) -> Vec<QuantizedTensor> {
        self.bar.finish();
        self.report
    }
}

fn print_report(
    report: &[QuantizedTensor],
    quantizer: &Quantizer,
    packed: bool,
    format: Format,
    global: &Global,
) -> Result<()> {
    let mean = mean_error(report);
    let nonfinite: usize = report.iter().map(|t| t.nonfinite_blocks).sum();
    let copied = quantizer.specs.len() - report.len();
    for tensor in report.iter().filter(|t| t.nonfinite_blocks > 0) {
        to_stderr(format_args!(
            "warning: tensor {}: {} blocks hold NaN or infinity and became NaN",
            tensor.name, tensor.nonfinite_blocks
        ));
    }
    let text = if global.json {
        let value = json!({
            "format": format,
            "packed": packed,
            "tensors": report,
            "mean": mean,
            "copied_tensors": copied,
            "nonfinite_blocks": nonfinite,
        });
        value.to_string()
    } else {
        let quantized = report.len();
        let done = if packed { "packed as" } else { "quantized to" };
        format!("{}\n{quantized} tensors {done} {format}, {copied} copied", table(report, &mean))
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
