//! Packed weights of a model directory: found, checked, and dequantized when they are read (numerics/packed.rs).
//!
//! A linear W [N, K] lies in compressed-tensors' names as W_packed U8 [N, K/2], W_scale [N, K/block] and, in NVFP4,
//! W_global_scale F32 [1]; in ModelOpt's as W U8 [N, K/2], W_scale and W_scale_2 F32. Which linears are packed is what
//! the tensors say, not the patterns of `targets` and `ignore`. The values are rounded once, to the dtype that
//! config.json names.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use rayon::prelude::*;

use super::{Checkpoint, StoredDtype, TensorBytes, TensorSpec, TensorView};
use crate::model::config::quantization::{Naming, PackedLayout};
use crate::model::config::read_json;
use crate::numerics::packed::{PackedKind, StoredScale, dequantize};
use crate::{Result, bail_input};

/// What lies beside a packed weight and is for whoever serves the model.
const SERVING_SCALES: [&str; 6] = ["input_global_scale", "input_scale", "k_scale", "v_scale", "q_scale", "kv_scale"];

/// Elements that one thread dequantizes at a time.
const PIECE_ELEMENTS: usize = 1 << 18;

/// The packed weights of a checkpoint.
pub(super) struct PackedWeights {
    layout: PackedLayout,
    /// What the values are rounded to.
    dtype: StoredDtype,
    /// By the name of the weight they stand for.
    weights: BTreeMap<String, PackedWeight>,
}

/// Where the parts of one weight lie, checked.
struct PackedWeight {
    shape: [usize; 2], // [N, K]
    codes: String,
    block_scales: String,
    scale: StoredScale,
}

/// One packed weight as stored.
pub struct PackedView<'a> {
    pub kind: PackedKind,
    pub shape: [usize; 2],
    pub codes: &'a [u8],        // [N, K/2]
    pub block_scales: &'a [u8], // [N, K/block]
    pub scale: StoredScale,
}

impl Checkpoint {
    /// How the weights of this directory are packed; None where they are not.
    pub fn packed_layout(&self) -> Option<PackedLayout> {
        self.packed.as_ref().map(|packed| packed.layout)
    }

    /// The names of the weights that are packed, as config.json's parameters are called.
    pub fn packed_names(&self) -> impl Iterator<Item = &str> {
        self.packed.iter().flat_map(|packed| packed.weights.keys().map(String::as_str))
    }

    /// A packed weight as stored; None where `name` is not packed.
    pub fn packed_weight(&self, name: &str) -> Result<Option<PackedView<'_>>> {
        let Some((packed, weight)) = self.packed_entry(name) else {
            return Ok(None);
        };
        Ok(Some(PackedView {
            kind: packed.layout.kind,
            shape: weight.shape,
            codes: self.tensor(&weight.codes)?.data,
            block_scales: self.tensor(&weight.block_scales)?.data,
            scale: weight.scale,
        }))
    }

    /// A parameter by its name, whichever way it is stored: packed weights dequantized into the dtype of config.json.
    pub fn parameter(&self, name: &str) -> Result<TensorBytes<'_>> {
        let Some(((packed, _), view)) = self.packed_entry(name).zip(self.packed_weight(name)?) else {
            let TensorView { dtype, shape, data } = self.tensor(name)?;
            return Ok(TensorBytes { spec: TensorSpec::new(name, dtype, shape), data: Cow::Borrowed(data) });
        };
        let spec = TensorSpec::new(name, packed.dtype, &view.shape);
        Ok(TensorBytes { spec, data: Cow::Owned(view.bytes(packed.dtype)) })
    }

    /// The shape and dtype of a parameter by its name, without its values.
    pub(super) fn parameter_spec(&self, name: &str) -> Result<TensorSpec> {
        match self.packed_entry(name) {
            Some((packed, weight)) => Ok(TensorSpec::new(name, packed.dtype, &weight.shape)),
            None => self.tensor(name).map(|tensor| TensorSpec::new(name, tensor.dtype, tensor.shape)),
        }
    }

    /// Whether a stored tensor is a part of a packed weight, or a scale beside one.
    pub(super) fn is_packed_part(&self, name: &str) -> bool {
        let of_weight = ["_packed", "_scale", "_global_scale", "_scale_2"];
        self.packed.iter().any(|packed| {
            let mut weights = of_weight.iter().filter_map(|suffix| name.strip_suffix(suffix));
            weights.any(|weight| packed.weights.contains_key(weight))
                || SERVING_SCALES.iter().any(|scale| name.rsplit('.').next() == Some(scale))
        })
    }

    fn packed_entry(&self, name: &str) -> Option<(&PackedWeights, &PackedWeight)> {
        self.packed.as_ref().and_then(|packed| Some((packed, packed.weights.get(name)?)))
    }

    /// Finds the packed weights that `dir`'s configuration announces.
    pub(super) fn find_packed(&mut self, dir: &Path) -> Result<()> {
        let Some(layout) = PackedLayout::of_dir(dir)? else {
            return Ok(());
        };
        let mut weights = BTreeMap::new();
        for stored in self.names().map(str::to_string).collect::<Vec<_>>() {
            let name = match layout.naming {
                Naming::CompressedTensors => {
                    stored.strip_suffix("_packed").filter(|name| name.ends_with(".weight")).map(str::to_string)
                }
                Naming::ModelOpt => {
                    let codes = stored.ends_with(".weight") && self.tensor(&stored)?.dtype == StoredDtype::U8;
                    codes.then(|| stored.clone())
                }
            };
            if let Some(name) = name {
                weights.insert(name.clone(), self.packed_parts(&name, &stored, layout)?);
            }
        }
        if weights.is_empty() {
            let suffix = match layout.naming {
                Naming::CompressedTensors => "weight_packed",
                Naming::ModelOpt => "weight of dtype U8",
            };
            bail_input!(
                "{}: found no {suffix}, config.json says the weights are packed ({layout})",
                self.path().display()
            );
        }
        let dtype = model_dtype(dir)?;
        self.packed = Some(PackedWeights { layout, dtype, weights });
        Ok(())
    }

    fn packed_parts(&self, name: &str, codes: &str, layout: PackedLayout) -> Result<PackedWeight> {
        let view = self.tensor(codes)?;
        let block = layout.kind.block_size();
        let &[rows, half] = view.shape else {
            bail_input!("{}: tensor {codes}: found {:?}, expected [N, K/2]", self.file_of(codes).display(), view.shape);
        };
        if rows == 0 || half == 0 || !(2 * half).is_multiple_of(block) {
            let file = self.file_of(codes).display();
            bail_input!("{file}: tensor {codes}: found {:?}, expected [N, K/2], K a multiple of {block}", view.shape);
        }
        self.expect_part(codes, &[StoredDtype::U8], &[&[rows, half]])?;
        let block_scales = format!("{name}_scale");
        let scale_dtypes: &[StoredDtype] = match layout.kind {
            PackedKind::Nvfp4 => &[StoredDtype::F8_E4M3],
            PackedKind::Mxfp4 => &[StoredDtype::U8, StoredDtype::F8_E8M0],
        };
        self.expect_part(&block_scales, scale_dtypes, &[&[rows, 2 * half / block]])?;
        let scale = match (layout.kind, layout.naming) {
            (PackedKind::Mxfp4, _) => StoredScale::PowerOfTwo,
            (PackedKind::Nvfp4, Naming::CompressedTensors) => {
                StoredScale::OverEncode(self.tensor_scale(&format!("{name}_global_scale"))?)
            }
            (PackedKind::Nvfp4, Naming::ModelOpt) => {
                StoredScale::TimesDecode(self.tensor_scale(&format!("{name}_scale_2"))?)
            }
        };
        Ok(PackedWeight { shape: [rows, 2 * half], codes: codes.to_string(), block_scales, scale })
    }

    /// The one f32 over all block scales: positive, or the weight would be nothing but NaN or zero.
    fn tensor_scale(&self, name: &str) -> Result<f32> {
        self.expect_part(name, &[StoredDtype::F32], &[&[1], &[]])?;
        let value = self.tensor_f32(name)?[0];
        if !value.is_finite() || value <= 0.0 {
            bail_input!(
                "{}: tensor {name}: found {value}, expected a positive finite number",
                self.file_of(name).display()
            );
        }
        Ok(value)
    }

    fn expect_part(&self, name: &str, dtypes: &[StoredDtype], shapes: &[&[usize]]) -> Result<()> {
        let tensor = self.tensor(name)?;
        let file = self.file_of(name).display();
        if !shapes.contains(&tensor.shape) {
            bail_input!("{file}: tensor {name}: found {:?}, expected {:?}", tensor.shape, shapes[0]);
        }
        if !dtypes.contains(&tensor.dtype) {
            bail_input!("{file}: tensor {name}: found dtype {}, expected {}", tensor.dtype, dtypes[0]);
        }
        Ok(())
    }
}

impl PackedView<'_> {
    /// The values [N, K] in f32, before they are rounded.
    pub fn values(&self) -> Vec<f32> {
        let ([rows, cols], block) = (self.shape, self.kind.block_size());
        let mut values = vec![0.0; rows * cols];
        // Some rows at a time, so that what a piece looks up is made once for many elements.
        let piece = PIECE_ELEMENTS.div_ceil(cols);
        let codes = self.codes.par_chunks(piece * cols / 2).zip(self.block_scales.par_chunks(piece * (cols / block)));
        values
            .par_chunks_mut(piece * cols)
            .zip(codes)
            .for_each(|(values, (codes, scales))| dequantize(codes, scales, self.scale, block, values));
        values
    }

    fn bytes(&self, dtype: StoredDtype) -> Vec<u8> {
        let values = self.values();
        match dtype {
            StoredDtype::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
            StoredDtype::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }
}

fn model_dtype(dir: &Path) -> Result<StoredDtype> {
    let config = read_json(&dir.join("config.json"))?;
    let dtype = ["dtype", "torch_dtype"].iter().find_map(|key| config.get(key)?.as_str());
    Ok(match dtype {
        Some("bfloat16") => StoredDtype::BF16,
        Some("float16") => StoredDtype::F16,
        _ => StoredDtype::F32,
    })
}
