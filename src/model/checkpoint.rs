//! Weights on disk: safetensors files, single or sharded with an index, memory-mapped and checked.
//!
//! A file is `u64 header length | JSON header | data`; the header gives every tensor's dtype, shape and byte
//! range. Everything that can be wrong with it is found when it is opened, so that reading a tensor later is
//! a slice of the map. Writing (write.rs) is atomic and deterministic; names of the hub resolve to the local
//! cache (resolve.rs); quantize.rs replaces weights by their fake-quantized values; packed.rs reads 4-bit weights.

#![allow(unsafe_code)] // the memory map

mod packed;
pub mod quantize;
mod resolve;
pub mod validate;
mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
pub use safetensors::Dtype as StoredDtype;
use safetensors::SafeTensorError;
use safetensors::tensor::{Metadata, SafeTensors};
use serde_json::Value;

use super::config::{Qwen2Config, read_json};
use super::lora::ADAPTER_CONFIG;
use crate::error::one_line;
use crate::{Error, Result, bail_input, input_error};

pub use packed::PackedView;
use packed::PackedWeights;
pub use resolve::resolve_model_path;
pub use write::{
    MAX_SHARD_BYTES, TensorBytes, TensorSink, TensorSpec, atomic_directory, atomic_file, copy_tokenizer_files,
    write_json, write_model_config, write_model_dir, write_quantization_config, write_safetensors,
    write_safetensors_with, write_weights,
};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Tensors of one model or one file, by name.
pub struct Checkpoint {
    files: Vec<MappedFile>,
    tensors: BTreeMap<String, Location>,
    packed: Option<PackedWeights>,
}

/// One tensor as stored: little-endian, row-major.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    pub dtype: StoredDtype,
    pub shape: &'a [usize],
    pub data: &'a [u8],
}

struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

struct Location {
    file: usize,
    dtype: StoredDtype,
    shape: Vec<usize>,
    /// Byte range in the file.
    range: std::ops::Range<usize>,
}

impl Checkpoint {
    /// Opens a model directory (`model.safetensors`, or shards and their index) or one `.safetensors` file.
    ///
    /// # Errors
    /// `Error::Input`, one line, for a missing shard, a truncated file, a header that lies, an index that
    /// disagrees with its shards.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        if path.is_file() {
            return Checkpoint::of_files(&[path.to_path_buf()]);
        }
        if !path.is_dir() {
            bail_input!("{}: no such file or directory", path.display());
        }
        let (single, index) = (path.join(SINGLE), path.join(INDEX));
        let mut checkpoint = if single.exists() {
            Checkpoint::of_files(&[single])?
        } else if index.exists() {
            Checkpoint::of_index(path, &index)?
        } else if path.join(ADAPTER_CONFIG).exists() {
            bail_input!(
                "{}: found an adapter ({ADAPTER_CONFIG}), expected a model; make one with: temper merge {} DIR",
                path.display(),
                path.display()
            )
        } else {
            bail_input!("{}: found no weights, expected {SINGLE} or {INDEX}", path.display())
        };
        checkpoint.find_packed(path)?;
        Ok(checkpoint)
    }

    /// Names of the stored tensors in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor's dtype, shape and bytes.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        let Some(at) = self.tensors.get(name) else {
            bail_input!("{}: tensor {name}: missing", self.path().display());
        };
        let data = &self.files[at.file].map[at.range.clone()];
        Ok(TensorView { dtype: at.dtype, shape: &at.shape, data })
    }

    /// The tensor as f32 values, exact for f32, bf16 and f16.
    ///
    /// # Errors
    /// `Error::Input` when it is missing or of another dtype.
    pub fn tensor_f32(&self, name: &str) -> Result<Vec<f32>> {
        self.tensor(name)?.to_f32().map_err(|e| e.at(format!("{}: tensor {name}", self.path().display())))
    }

    /// Lets go of the memory that holds `data`, a part of a tensor's bytes, until it is read again: a process that
    /// reads weights larger than its memory stays small.
    pub fn release(&self, data: &[u8]) {
        let start = data.as_ptr() as usize;
        for file in &self.files {
            let offset = start.wrapping_sub(file.map.as_ptr() as usize);
            if offset < file.map.len() {
                // SAFETY: the pages of a read-only map of a file come back from the file with the same bytes.
                let advised =
                    unsafe { file.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, data.len()) };
                // Advice: where it is not taken, memory use is all that suffers.
                let _ = advised;
            }
        }
    }

    /// The file that holds `name`, for messages.
    pub fn file_of(&self, name: &str) -> &Path {
        self.tensors.get(name).map_or(self.path(), |at| &self.files[at.file].path)
    }

    /// Checks that exactly the parameters of `config` are there, with their shapes, in f32, bf16 or f16, or packed.
    ///
    /// An `lm_head.weight` beside a tied embedding is accepted (and unused), as are the `inv_freq` buffers
    /// that old exports carry.
    pub fn check(&self, config: &Qwen2Config) -> Result<()> {
        let expected: BTreeMap<String, Vec<usize>> = config.parameter_shapes().into_iter().collect();
        for (name, shape) in &expected {
            self.check_tensor(name, shape)?;
        }
        let unused = |name: &str| {
            name.ends_with("rotary_emb.inv_freq") || (config.tie_word_embeddings && name == "lm_head.weight")
        };
        let known = |name: &str| expected.contains_key(name) || unused(name) || self.is_packed_part(name);
        // A packed weight that is no parameter: its parts are known, it is not.
        let mut packed = self.packed_names().filter(|name| !expected.contains_key(*name) && !unused(name));
        match self.names().find(|name| !known(name)).or(packed.next()) {
            Some(name) => bail_input!(
                "{}: tensor {name}: unexpected, the configuration has no such parameter",
                self.file_of(name).display()
            ),
            None => Ok(()),
        }
    }

    fn check_tensor(&self, name: &str, shape: &[usize]) -> Result<()> {
        let tensor = self.parameter_spec(name)?;
        let file = self.file_of(name).display();
        if tensor.shape != shape {
            bail_input!("{file}: tensor {name}: found {:?}, expected {shape:?}", tensor.shape);
        }
        if !is_readable_float(tensor.dtype) {
            bail_input!("{file}: tensor {name}: found dtype {}, expected F32, BF16 or F16", tensor.dtype);
        }
        Ok(())
    }

    /// The first file: a place for messages about the whole.
    pub(super) fn path(&self) -> &Path {
        self.files.first().map_or(Path::new(SINGLE), |file| &file.path)
    }

    fn of_files(paths: &[PathBuf]) -> Result<Checkpoint> {
        let mut checkpoint = Checkpoint { files: vec![], tensors: BTreeMap::new(), packed: None };
        for path in paths {
            checkpoint.add_file(path)?;
        }
        Ok(checkpoint)
    }

    fn of_index(dir: &Path, index: &Path) -> Result<Checkpoint> {
        let shards = read_weight_map(index)?;
        let files: BTreeSet<&String> = shards.values().collect();
        let paths: Vec<PathBuf> = files.iter().map(|name| dir.join(name)).collect();
        if let Some(missing) = paths.iter().find(|path| !path.exists()) {
            bail_input!("{}: no such file, expected a shard that {INDEX} names", missing.display());
        }
        let checkpoint = Checkpoint::of_files(&paths)?;
        for (name, file) in &shards {
            if !checkpoint.contains(name) || checkpoint.file_of(name) != dir.join(file) {
                bail_input!("{}: tensor {name}: missing, {INDEX} says it is in this shard", dir.join(file).display());
            }
        }
        if let Some(name) = checkpoint.names().find(|name| !shards.contains_key(*name)) {
            let file = checkpoint.file_of(name).display();
            bail_input!("{file}: tensor {name}: unexpected, {INDEX} does not name it");
        }
        Ok(checkpoint)
    }

    fn add_file(&mut self, path: &Path) -> Result<()> {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        let length = file.metadata().map_err(|e| Error::io(path, e))?.len();
        if length < 8 {
            bail_input!("{}: found {length} bytes, expected a safetensors file (at least 8)", path.display());
        }
        // SAFETY: the map is read-only and private to this struct. A file that another program cuts while it
        // is open could still raise SIGBUS; weights are written beside and renamed, never in place.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        let (data_start, header) = read_header(&map).map_err(|e| e.at(path.display()))?;
        for (name, info) in header.tensors() {
            let (start, end) = info.data_offsets;
            let location = Location {
                file: self.files.len(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                range: data_start + start..data_start + end,
            };
            if let Some(other) = self.tensors.insert(name.clone(), location) {
                let other = self.files.get(other.file).map_or(path, |f| &f.path).display();
                bail_input!("{}: tensor {name}: found twice, first in {other}", path.display());
            }
        }
        self.files.push(MappedFile { path: path.to_path_buf(), map });
        Ok(())
    }
}

impl TensorView<'_> {
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Values as f32: exact for F32, BF16 and F16, an error for every other dtype.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let pairs = || self.data.chunks_exact(2).map(|b| [b[0], b[1]]);
        Ok(match self.dtype {
            StoredDtype::F32 => {
                self.data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
            StoredDtype::BF16 => pairs().map(|b| half::bf16::from_le_bytes(b).to_f32()).collect(),
            StoredDtype::F16 => pairs().map(|b| half::f16::from_le_bytes(b).to_f32()).collect(),
            other => bail_input!("found dtype {other}, expected F32, BF16 or F16"),
        })
    }
}

/// Whether values of this dtype can be read into f32 exactly and written back.
pub fn is_readable_float(dtype: StoredDtype) -> bool {
    matches!(dtype, StoredDtype::F32 | StoredDtype::BF16 | StoredDtype::F16)
}

/// `weight_map` of an index: tensor name to file name in the same directory.
fn read_weight_map(index: &Path) -> Result<BTreeMap<String, String>> {
    let place = index.display();
    let value = read_json(index)?;
    let Some(map) = value.get("weight_map").and_then(Value::as_object) else {
        bail_input!("{place}: weight_map: missing, expected an object from tensor to file name");
    };
    if map.is_empty() {
        bail_input!("{place}: weight_map: found no tensors, expected at least one");
    }
    let plain = |file: &&str| Path::new(file).file_name().is_some_and(|f| f == *file);
    map.iter()
        .map(|(name, file)| match file.as_str().filter(plain) {
            Some(file) => Ok((name.clone(), file.to_string())),
            None => bail_input!("{place}: weight_map.{name}: found {file}, expected a file name in this directory"),
        })
        .collect()
}

/// Where the data begins, and the checked header.
fn read_header(bytes: &[u8]) -> Result<(usize, Metadata)> {
    let prefix: [u8; 8] = match bytes.first_chunk() {
        Some(prefix) => *prefix,
        None => bail_input!("found {} bytes, expected a safetensors file (at least 8)", bytes.len()),
    };
    let (claimed, available) = (u64::from_le_bytes(prefix), bytes.len() as u64 - 8);
    if claimed > available {
        bail_input!(
            "found a header length of {claimed} bytes with {available} left, expected a complete safetensors file"
        );
    }
    match SafeTensors::read_metadata(bytes) {
        Ok((length, metadata)) => Ok((8 + length, metadata)),
        Err(SafeTensorError::MetadataIncompleteBuffer) => Err(describe_length(bytes, claimed as usize)),
        Err(SafeTensorError::InvalidOffset(name)) => Err(input_error!(
            "tensor {name}: found data_offsets that overlap or leave a gap, expected each tensor to begin where the one before ends"
        )),
        Err(SafeTensorError::TensorInvalidInfo) => Err(input_error!(
            "found a tensor whose data_offsets do not match its shape and dtype, expected both to agree"
        )),
        Err(other) => Err(input_error!("not a safetensors file: {}", one_line(other))),
    }
}

/// The header is sound but the data after it has another length than it says.
fn describe_length(bytes: &[u8], header_length: usize) -> Error {
    let found = bytes.len() - 8 - header_length;
    let header: Value = serde_json::from_slice(&bytes[8..8 + header_length]).unwrap_or_default();
    let end = |tensor: &Value| tensor.get("data_offsets").and_then(|o| o.get(1)).and_then(Value::as_u64);
    let tensors = header.as_object().into_iter().flat_map(|map| map.values());
    let expected = tensors.filter_map(end).max().unwrap_or(0);
    let state = if (found as u64) < expected { "truncated" } else { "trailing bytes" };
    input_error!("{state}: found {found} bytes of data, expected {expected}")
}
