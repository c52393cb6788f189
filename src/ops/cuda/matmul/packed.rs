//! A weight held as codes and scales, half a byte an element and a scale a block: what a decoding step reads.

use tch::{Kind, Tensor};

use super::{Layout, PackedScales};
use crate::numerics::block_format::TensorScale;
use crate::numerics::format::{Family, Format, Rounding};
use crate::ops::cuda::fake_quant::{Matrix, MatrixScale, Wanted, quantize};
use crate::ops::cuda::launch::Executor;
use crate::{Error, Result};

/// The second operand of [`Layout::NtMxfp4`] or [`Layout::NtNvfp4`].
pub struct PackedWeight {
    pub layout: Layout,
    pub codes: Tensor,        // u8 [n, k / 2], low nibble first
    pub block_scales: Tensor, // u8 [n, blocks of k]
    pub amax: Option<Tensor>, // f32 [1], in NVFP4
}

impl PackedWeight {
    /// The layout of a product with a weight in `format`; None where there is none: other formats, and stochastic ones.
    pub fn layout_of(format: Format) -> Option<Layout> {
        match format {
            Format { family: Family::Mxfp4 { .. }, rounding: Rounding::NearestEven, .. } => Some(Layout::NtMxfp4),
            Format { family: Family::Nvfp4 { four_over_six: false }, rounding: Rounding::NearestEven, .. } => {
                Some(Layout::NtNvfp4)
            }
            _ => None,
        }
    }

    /// Of a weight [n, k] on the executor's device. A block with NaN or infinity has no codes: numerics.md, section 2.
    ///
    /// # Errors
    /// As [`quantize`]; `Runtime` for a format that is not mxfp4 or nvfp4 with nearest rounding.
    pub fn quantize(executor: &dyn Executor, weight: &Tensor, format: Format) -> Result<PackedWeight> {
        let matrix = Matrix { x: weight, scale: MatrixScale::Own(TensorScale::Tensor), draw: None };
        let nothing = || Error::Runtime("packed weight: nothing was made".into());
        PackedWeight::quantize_all(executor, &[matrix], format)?.pop().ok_or_else(nothing)
    }

    /// As [`PackedWeight::quantize`], of several that may share tensor amaxes.
    ///
    /// # Errors
    /// As [`PackedWeight::quantize`].
    pub fn quantize_all(executor: &dyn Executor, matrices: &[Matrix], format: Format) -> Result<Vec<PackedWeight>> {
        let Some(layout) = PackedWeight::layout_of(format) else {
            return Err(Error::Runtime(format!("packed weight: found {format}, expected mxfp4 or nvfp4")));
        };
        let wanted = Wanted { codes: true, ..Wanted::default() };
        let made = quantize(executor, format, matrices, wanted)?.matrices.into_iter();
        let packed = made.map(|made| match (made.codes, made.block_scales, made.amax) {
            (Some(codes), Some(block_scales), amax) => Ok(PackedWeight { layout, codes, block_scales, amax }),
            _ => Err(Error::Runtime("packed weight: nothing was made".into())),
        });
        packed.collect()
    }

    pub fn scales(&self) -> PackedScales<'_> {
        PackedScales { of_blocks: &self.block_scales, amax: self.amax.as_ref() }
    }

    /// Bytes that a product reads of it.
    pub fn bytes(&self) -> usize {
        let tensors = [Some(&self.codes), Some(&self.block_scales), self.amax.as_ref()];
        tensors.into_iter().flatten().map(|t| t.numel() * if t.kind() == Kind::Float { 4 } else { 1 }).sum()
    }
}
