//! A checkpoint packed into 4 bits, in compressed-tensors' layout (numerics/packed.rs): for every quantized W [.., K]
//!
//! W_packed U8 [.., K/2] · W_scale [.., K/block], F8_E4M3 or U8 · NVFP4: W_global_scale F32 [1] = G
//!
//! and with `activations` in NVFP4 the module's input_global_scale F32 [1] = 2688 / A of its calibrated input. The codes
//! and scales are those of the quantizer, so that what was trained is what is packed. The metrics are those of the
//! values that a reader gets, rounded to the dtype that the tensor had.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use half::{bf16, f16};
use rayon::prelude::*;

use super::pieces::{BATCH_PIECES, Pieces, draw_keys};
use super::{QuantizedTensor, Quantizer, TensorSource, fused_group};
use crate::model::checkpoint::{StoredDtype, TensorSink, TensorSpec, TensorView};
use crate::numerics::block_format::{self, RoundingDraw, TensorScale};
use crate::numerics::block_scale::{tensor_encode_scale, tensor_scale};
use crate::numerics::packed::{PackedKind, StoredScale, dequantize, pack_codes};
use crate::numerics::tensor_error::TensorErrorSums;
use crate::ops::cpu::fake_quant::error_sums;
use crate::{Error, Result, bail_input, input_error};

/// The quantizer's tensors in their packed form.
pub struct Packer<'a> {
    quantizer: &'a Quantizer<'a>,
    pub kind: PackedKind,
    parts: Vec<Part>,
    specs: Vec<TensorSpec>,
    /// Block scales that were made with the codes and are not written yet: a file holds a weight's codes before them.
    block_scales: RefCell<BTreeMap<usize, Vec<u8>>>,
    amax: RefCell<BTreeMap<usize, f32>>,
}

/// What a written tensor is, with the quantizer's tensor that it comes from.
#[derive(Clone, Copy)]
enum Part {
    Copy(usize),
    Codes(usize),
    BlockScales(usize),
    EncodeScale(usize),
    InputEncodeScale(f32),
}

impl<'a> Packer<'a> {
    /// `input_amax`: the calibrated A of every module's input by its name, for NVFP4 weights with quantized activations.
    ///
    /// # Errors
    /// `Error::Input` for a format that the layout does not hold, a K that is no multiple of the block, a module without
    /// an A, and names that would be written twice.
    pub fn new(quantizer: &'a Quantizer<'a>, input_amax: Option<&BTreeMap<String, f32>>) -> Result<Packer<'a>> {
        let Some(kind) = PackedKind::of(quantizer.format) else {
            bail_input!(
                "--pack: found format {}, expected nvfp4 or mxfp4: the packed layout has no other",
                quantizer.format
            );
        };
        let input_scales = match input_amax {
            Some(amax) => input_encode_scales(quantizer, amax)?,
            None => BTreeMap::new(),
        };
        let (mut parts, mut specs) = (Vec::new(), Vec::new());
        let scale_dtype = match kind {
            PackedKind::Nvfp4 => StoredDtype::F8_E4M3,
            PackedKind::Mxfp4 => StoredDtype::U8,
        };
        for (index, spec) in quantizer.specs.iter().enumerate() {
            let mut add = |part, name: String, dtype, shape: &[usize]| {
                parts.push(part);
                specs.push(TensorSpec::new(name, dtype, shape));
            };
            let name = &spec.name;
            let (true, Some((&cols, leading))) = (quantizer.quantized[index], spec.shape.split_last()) else {
                add(Part::Copy(index), name.clone(), spec.dtype, &spec.shape);
                continue;
            };
            if !cols.is_multiple_of(kind.block_size()) {
                bail_input!(
                    "{}: tensor {name}: found {:?}, expected a last dimension that is a multiple of {} to pack it as {}",
                    quantizer.checkpoint.file_of(name).display(),
                    spec.shape,
                    kind.block_size(),
                    kind.name()
                );
            }
            let with_last = |last: usize| [leading, &[last]].concat();
            add(Part::Codes(index), format!("{name}_packed"), StoredDtype::U8, &with_last(cols / 2));
            let blocks = with_last(cols / kind.block_size());
            add(Part::BlockScales(index), format!("{name}_scale"), scale_dtype, &blocks);
            if kind == PackedKind::Nvfp4 {
                add(Part::EncodeScale(index), format!("{name}_global_scale"), StoredDtype::F32, &[1]);
            }
            if let Some(&scale) = input_scales.get(name) {
                let module = name.strip_suffix("weight").unwrap_or(name);
                add(Part::InputEncodeScale(scale), format!("{module}input_global_scale"), StoredDtype::F32, &[1]);
            }
        }
        let mut names = BTreeSet::new();
        if let Some(twice) = specs.iter().find(|spec| !names.insert(&spec.name)) {
            bail_input!(
                "{}: tensor {}: found already, expected no tensor of a name that packing gives",
                quantizer.checkpoint.file_of(&twice.name).display(),
                twice.name
            );
        }
        Ok(Packer { quantizer, kind, parts, specs, block_scales: RefCell::default(), amax: RefCell::default() })
    }

    /// Writes the codes and keeps the block scales.
    fn pack(
        &self,
        index: usize,
        sink: &mut TensorSink,
        progress: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<QuantizedTensor> {
        let pieces = self.quantizer.pieces(index)?;
        let amax = self.amax(index)?;
        let job = Job {
            format: pieces.format,
            dtype: pieces.tensor.dtype,
            cols: pieces.cols(),
            amax,
            scale: match self.kind {
                PackedKind::Nvfp4 => StoredScale::OverEncode(tensor_scale(pieces.format, amax)),
                PackedKind::Mxfp4 => StoredScale::PowerOfTwo,
            },
            kind: self.kind,
            stream: Pieces::stream(index as u32)?,
        };
        let (mut sums, mut nonfinite_blocks, mut first_row) = (TensorErrorSums::default(), 0, 0);
        let mut block_scales = Vec::new();
        for batch in pieces.tensor.data.chunks(BATCH_PIECES * pieces.piece_bytes()) {
            let rows = pieces.piece_rows();
            let parts = batch.par_chunks(pieces.piece_bytes()).enumerate();
            let done: Vec<Result<Done>> = parts.map(|(i, piece)| job.pack(piece, first_row + i * rows)).collect();
            for piece in done {
                let piece = piece?;
                sink.write(&piece.codes)?;
                block_scales.extend(piece.block_scales);
                sums.merge(&piece.sums);
                nonfinite_blocks += piece.nonfinite_blocks;
            }
            first_row += BATCH_PIECES * rows;
            self.quantizer.checkpoint.release(batch);
            progress(batch.len())?;
        }
        self.block_scales.borrow_mut().insert(index, block_scales);
        Ok(self.quantizer.found(index, &sums, nonfinite_blocks))
    }

    /// A of a weight in NVFP4, its group's where it has siblings; 0 in MXFP4, which has none.
    fn amax(&self, index: usize) -> Result<f32> {
        if let Some(&amax) = self.amax.borrow().get(&index) {
            return Ok(amax);
        }
        let amax = match self.quantizer.tensor_scale(index)? {
            TensorScale::Amax(amax) => amax,
            TensorScale::Tensor | TensorScale::Row => 0.0,
        };
        self.amax.borrow_mut().insert(index, amax);
        Ok(amax)
    }
}

impl TensorSource for Packer<'_> {
    fn specs(&self) -> &[TensorSpec] {
        &self.specs
    }

    fn fill(
        &self,
        index: usize,
        sink: &mut TensorSink,
        progress: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Option<QuantizedTensor>> {
        match self.parts[index] {
            Part::Copy(index) => return self.quantizer.fill(index, sink, progress),
            Part::Codes(index) => return self.pack(index, sink, progress).map(Some),
            Part::BlockScales(index) => match self.block_scales.borrow_mut().remove(&index) {
                Some(scales) => sink.write(&scales)?,
                None => return Err(Error::Runtime(format!("{}: written before its codes", self.specs[index].name))),
            },
            Part::EncodeScale(index) => {
                sink.write(&tensor_scale(self.quantizer.format, self.amax(index)?).to_le_bytes())?;
            }
            Part::InputEncodeScale(scale) => sink.write(&scale.to_le_bytes())?,
        }
        Ok(None)
    }
}

/// G of every quantized weight's input, one for siblings, which read the same.
fn input_encode_scales(quantizer: &Quantizer, amax: &BTreeMap<String, f32>) -> Result<BTreeMap<String, f32>> {
    let quantized = quantizer.specs.iter().zip(&quantizer.quantized).filter(|(_, quantized)| **quantized);
    let mut by_group: BTreeMap<String, f32> = BTreeMap::new();
    let mut groups = Vec::new();
    for (spec, _) in quantized {
        let module = spec.name.strip_suffix(".weight").unwrap_or(&spec.name);
        let Some(&found) = amax.get(module) else {
            return Err(input_error!("module {module}: missing, expected the largest magnitude of its input"));
        };
        let group = fused_group(&spec.name).unwrap_or_else(|| spec.name.clone());
        let largest = by_group.entry(group.clone()).or_insert(0.0);
        *largest = largest.max(found);
        groups.push((spec.name.clone(), group));
    }
    Ok(groups.into_iter().map(|(name, group)| (name, tensor_encode_scale(by_group[&group]))).collect())
}

/// What all pieces of a tensor share.
struct Job {
    format: crate::numerics::format::Format,
    dtype: StoredDtype,
    cols: usize,
    amax: f32,
    scale: StoredScale,
    kind: PackedKind,
    stream: u32,
}

struct Done {
    codes: Vec<u8>,
    block_scales: Vec<u8>,
    sums: TensorErrorSums,
    nonfinite_blocks: usize,
}

impl Job {
    fn pack(&self, piece: &[u8], first_row: usize) -> Result<Done> {
        let x = TensorView { dtype: self.dtype, shape: &[], data: piece }.to_f32()?;
        let rows = x.len() / self.cols;
        let keys = draw_keys(self.format, first_row, rows);
        let draw = RoundingDraw { seed: 0, stream: self.stream, row_keys: &keys };
        let scale = TensorScale::Amax(self.amax);
        let quantized = block_format::quantize(&x, rows, self.cols, self.format, scale, Some(&draw));
        let codes = pack_codes(&quantized.codes);
        let mut y = quantized.dequantized;
        dequantize(&codes, &quantized.block_scales, self.scale, self.kind.block_size(), &mut y);
        match self.dtype {
            StoredDtype::BF16 => y.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32()),
            StoredDtype::F16 => y.iter_mut().for_each(|v| *v = f16::from_f32(*v).to_f32()),
            _ => {}
        }
        Ok(Done {
            codes,
            block_scales: quantized.block_scales,
            sums: TensorErrorSums { saturated: quantized.saturated as u64, ..error_sums(&x, &y) },
            nonfinite_blocks: quantized.nonfinite_blocks,
        })
    }
}
