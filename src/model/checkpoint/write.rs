//! Writing weights and model directories: beside, synced, renamed, the same bytes every time.
//!
//! Within a file tensors lie by element size (largest first, so that all are aligned), then by name: the
//! order depends on nothing else. Beyond `max_shard_bytes` the weights are split over
//! `model-00001-of-0000N.safetensors` with an index, as transformers does.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::{INDEX, SINGLE, StoredDtype, TensorView};
use crate::model::config::{Qwen2Config, quantization, read_json};
use crate::{Error, Result};

/// Where transformers begins a new shard.
pub const MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// Files beside the weights that make a directory usable as a tokenizer.
const TOKENIZER_FILES: [&str; 7] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
];

/// A tensor to be written: what the header says of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: String,
    pub dtype: StoredDtype,
    pub shape: Vec<usize>,
}

/// A tensor to be written, with its little-endian row-major bytes.
pub struct TensorBytes<'a> {
    pub spec: TensorSpec,
    pub data: Cow<'a, [u8]>,
}

impl TensorBytes<'_> {
    pub fn view(&self) -> TensorView<'_> {
        TensorView { dtype: self.spec.dtype, shape: &self.spec.shape, data: &self.data }
    }
}

impl TensorSpec {
    pub fn new(name: impl Into<String>, dtype: StoredDtype, shape: &[usize]) -> TensorSpec {
        TensorSpec { name: name.into(), dtype, shape: shape.to_vec() }
    }

    pub fn bytes(&self) -> u64 {
        let elements = self.shape.iter().map(|&d| d as u64).product::<u64>();
        (elements * self.dtype.bitsize() as u64).div_ceil(8)
    }
}

/// Takes the bytes of one tensor, in order.
pub struct TensorSink<'a> {
    path: &'a Path,
    out: &'a mut dyn Write,
    written: u64,
}

impl TensorSink<'_> {
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes).map_err(|e| Error::io(self.path, e))
    }
}

/// Writes one safetensors file at `path`, whole or not at all.
pub fn write_safetensors(path: &Path, tensors: &[TensorBytes]) -> Result<()> {
    let specs: Vec<TensorSpec> = tensors.iter().map(|t| t.spec.clone()).collect();
    write_safetensors_with(path, &specs, |index, sink| sink.write(&tensors[index].data))
}

/// As [`write_safetensors`], one tensor at a time: `fill(index, sink)` writes the bytes of `specs[index]`.
pub fn write_safetensors_with(
    path: &Path,
    specs: &[TensorSpec],
    mut fill: impl FnMut(usize, &mut TensorSink) -> Result<()>,
) -> Result<()> {
    write_file(path, specs, &file_order(specs), &mut fill)
}

/// Writes the weights of a model into the existing directory `dir`: `model.safetensors`, or shards and their
/// index beyond `max_shard_bytes`. `fill(index, sink)` writes the bytes of `specs[index]`, in pieces if it likes, so
/// that memory need not hold a tensor.
pub fn write_weights(
    dir: &Path,
    specs: &[TensorSpec],
    max_shard_bytes: u64,
    mut fill: impl FnMut(usize, &mut TensorSink) -> Result<()>,
) -> Result<()> {
    let shards = split_into_shards(specs, max_shard_bytes);
    if let [only] = &shards[..] {
        return write_file(&dir.join(SINGLE), specs, only, &mut fill);
    }
    let mut weight_map = Map::new();
    for (number, order) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{:05}.safetensors", number + 1, shards.len());
        write_file(&dir.join(&file), specs, order, &mut fill)?;
        weight_map.extend(order.iter().map(|&i| (specs[i].name.clone(), json!(file))));
    }
    weight_map.sort_keys();
    let total: u64 = specs.iter().map(TensorSpec::bytes).sum();
    write_json(&dir.join(INDEX), &json!({"metadata": {"total_size": total}, "weight_map": weight_map}))
}

/// Fills the existing directory `dir` with everything transformers and vLLM need: config.json,
/// generation_config.json (copied from `source` where it has one, else made), the tokenizer files of
/// `source`, and the weights through `fill` as in [`write_weights`].
pub fn write_model_dir(
    dir: &Path,
    config: &Qwen2Config,
    source: Option<&Path>,
    specs: &[TensorSpec],
    fill: impl FnMut(usize, &mut TensorSink) -> Result<()>,
) -> Result<()> {
    write_model_config(dir, config, source)?;
    write_weights(dir, specs, MAX_SHARD_BYTES, fill)
}

/// All of [`write_model_dir`] but the weights.
pub fn write_model_config(dir: &Path, config: &Qwen2Config, source: Option<&Path>) -> Result<()> {
    write_json(&dir.join("config.json"), &config.to_hf_json())?;
    let generation = "generation_config.json";
    match source.map(|s| s.join(generation)).filter(|path| path.exists()) {
        Some(from) => copy_file(&from, &dir.join(generation))?,
        None => write_json(&dir.join(generation), &config.to_generation_json())?,
    }
    source.map_or(Ok(()), |source| copy_tokenizer_files(source, dir))
}

/// Says in `dir`'s config.json how its weights are packed; every other key stays.
pub fn write_quantization_config(dir: &Path, quantization: &Value) -> Result<()> {
    let path = dir.join("config.json");
    let mut config = read_json(&path)?;
    config[quantization::KEY] = quantization.clone();
    write_json(&path, &config)
}

/// Copies the tokenizer files that `source` has into `dir`.
pub fn copy_tokenizer_files(source: &Path, dir: &Path) -> Result<()> {
    for name in TOKENIZER_FILES {
        let from = source.join(name);
        if from.exists() {
            copy_file(&from, &dir.join(name))?;
        }
    }
    Ok(())
}

/// Writes `path` through a file beside it that is synced and renamed: a reader sees the old file or the new
/// one, and a failure leaves nothing behind.
pub fn atomic_file(path: &Path, write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let temporary = beside(path);
    let result = File::create(&temporary).map_err(|e| Error::io(path, e)).and_then(|file| {
        let mut out = BufWriter::with_capacity(1 << 20, file);
        write(&mut out)?;
        out.flush().and_then(|()| out.get_ref().sync_all()).map_err(|e| Error::io(path, e))
    });
    let result = result.and_then(|()| std::fs::rename(&temporary, path).map_err(|e| Error::io(path, e)));
    if result.is_err() {
        // The first error is the one to report; the temporary file may not even exist.
        let _ = std::fs::remove_file(&temporary);
        return result;
    }
    sync_parent(path)
}

/// Makes the directory `path` through one beside it that `fill` fills and that is then renamed. `path` may be
/// absent or an empty directory.
pub fn atomic_directory(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let temporary = beside(path);
    let result = std::fs::create_dir(&temporary)
        .map_err(|e| Error::io(&temporary, e))
        .and_then(|()| fill(&temporary))
        .and_then(|()| std::fs::rename(&temporary, path).map_err(|e| Error::io(path, e)));
    if result.is_err() {
        // As above: the first error counts.
        let _ = std::fs::remove_dir_all(&temporary);
        return result;
    }
    sync_parent(path)
}

/// Element size descending, then name: every tensor is aligned to its element.
fn file_order(specs: &[TensorSpec]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..specs.len()).collect();
    order.sort_by(|&a, &b| {
        let key = |i: usize| (std::cmp::Reverse(specs[i].dtype.bitsize()), &specs[i].name);
        key(a).cmp(&key(b))
    });
    order
}

/// Fills shards in the order given by the caller; a tensor larger than a shard has one of its own.
fn split_into_shards(specs: &[TensorSpec], max_shard_bytes: u64) -> Vec<Vec<usize>> {
    let mut shards: Vec<Vec<usize>> = vec![vec![]];
    let mut used = 0;
    for (index, spec) in specs.iter().enumerate() {
        if used > 0 && used + spec.bytes() > max_shard_bytes {
            shards.push(vec![]);
            used = 0;
        }
        used += spec.bytes();
        if let Some(shard) = shards.last_mut() {
            shard.push(index);
        }
    }
    for shard in &mut shards {
        let chosen: Vec<TensorSpec> = shard.iter().map(|&i| specs[i].clone()).collect();
        *shard = file_order(&chosen).into_iter().map(|i| shard[i]).collect();
    }
    shards
}

fn write_file(
    path: &Path,
    specs: &[TensorSpec],
    order: &[usize],
    fill: &mut dyn FnMut(usize, &mut TensorSink) -> Result<()>,
) -> Result<()> {
    let header = header_bytes(specs, order)?;
    atomic_file(path, |out| {
        let io = |e| Error::io(path, e);
        out.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
        out.write_all(&header).map_err(io)?;
        for &index in order {
            let mut sink = TensorSink { path, out: &mut *out, written: 0 };
            fill(index, &mut sink)?;
            let (name, found, expected) = (&specs[index].name, sink.written, specs[index].bytes());
            if found != expected {
                return Err(Error::Runtime(format!("tensor {name}: found {found} bytes, expected {expected}")));
            }
        }
        Ok(())
    })
}

/// The JSON header, padded with spaces to a multiple of 8 bytes.
fn header_bytes(specs: &[TensorSpec], order: &[usize]) -> Result<Vec<u8>> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut start = 0;
    for &index in order {
        let spec = &specs[index];
        let end = start + spec.bytes();
        let entry = json!({"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [start, end]});
        if header.insert(spec.name.clone(), entry).is_some() {
            return Err(Error::Runtime(format!("tensor {}: written twice", spec.name)));
        }
        start = end;
    }
    let mut bytes = Value::Object(header).to_string().into_bytes();
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    Ok(bytes)
}

/// Pretty, with a line end.
pub fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = format!("{value:#}\n");
    atomic_file(path, |out| out.write_all(text.as_bytes()).map_err(|e| Error::io(path, e)))
}

fn copy_file(from: &Path, to: &Path) -> Result<()> {
    let bytes = std::fs::read(from).map_err(|e| Error::io(from, e))?;
    atomic_file(to, |out| out.write_all(&bytes).map_err(|e| Error::io(to, e)))
}

/// A hidden name in the same directory, and so on the same file system.
fn beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}.tmp", std::process::id()))
}

/// A rename is durable once the directory that holds the name is.
fn sync_parent(path: &Path) -> Result<()> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(|e| Error::io(parent, e))
}
