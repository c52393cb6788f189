//! Fake quantization on a CUDA device: kernels/fake_quant.cu, bit for bit numerics::block_format.
#![allow(unsafe_code)]

use tch::{Device, Kind, Tensor};

use super::launch::{Arg, Needs, cuda_matrix, launch};
use crate::numerics::block_format::TensorScale;
use crate::numerics::format::{Family, Format, MxScaleRule, Rounding};
use crate::{Error, Result};

/// A fake-quantized tensor and what was counted on the way.
pub struct FakeQuant {
    /// y, of the shape and dtype of x.
    pub dequantized: Tensor,
    /// [2] i64 on the device: blocks that held NaN or infinity, elements whose scaled magnitude exceeded 6.
    pub counts: Tensor,
}

/// y of x [rows, K] f32 or bf16, contiguous, with one tensor amax.
///
/// # Errors
/// `Runtime` where x is not such a tensor (device, dtype, shape, strides); `Unavailable` without kernels or driver, and
/// for a format that has no kernel.
pub fn fake_quant(x: &Tensor, format: Format) -> Result<Tensor> {
    Ok(fake_quant_scaled(x, format, TensorScale::Tensor)?.dequantized)
}

/// [`fake_quant`] with a choice of what nvfp4's amax is taken over, and the counts.
pub fn fake_quant_scaled(x: &Tensor, format: Format, scale: TensorScale) -> Result<FakeQuant> {
    let kernel_format = kernel_format(format)?;
    let (device, rows, cols) = cuda_matrix("fake_quant: x", x)?;
    let kinds = [Kind::Float, Kind::BFloat16];
    let x_arg = Needs { name: "fake_quant: x", kinds: &kinds, shape: &[rows, cols], device }.check(x)?;
    let bf16 = x.kind() == Kind::BFloat16;
    let on_device = |kind| (kind, Device::Cuda(device));
    let dequantized = x.f_empty_like()?;
    let counts = Tensor::f_zeros([2], on_device(Kind::Int64))?;
    if rows * cols == 0 {
        return Ok(FakeQuant { dequantized, counts });
    }
    let block_size = format.block_size(cols as usize) as u32;
    // A warp has 32 lanes and a lane an element, also where a block is ragged.
    let threads = rows as u64 * format.blocks_per_row(cols as usize) as u64 * u64::from(block_size);
    let (amax, amax_stride) = match scale {
        TensorScale::Amax(given) => (Tensor::f_full([1], f64::from(given), on_device(Kind::Float))?, 0),
        TensorScale::Tensor => (Tensor::f_zeros([1], on_device(Kind::Float))?, 0),
        TensorScale::Row => (Tensor::f_zeros([rows], on_device(Kind::Float))?, 1),
    };
    let shape = [Arg::U64(rows as u64), Arg::U64(cols as u64)];
    let amax_arg = Arg::Pointer(amax.data_ptr());
    if format.has_tensor_scale() && !matches!(scale, TensorScale::Amax(_)) {
        let kernel = if bf16 { "amax_bf16" } else { "amax_f32" };
        let args = [x_arg, amax_arg, shape[0], shape[1], Arg::U32(block_size), Arg::U32(amax_stride)];
        // SAFETY: x is [rows, cols] contiguous on `device` (checked), amax [1] with stride 0 or [rows] with stride 1.
        unsafe { launch("fake_quant", kernel, device, threads, &args) }?;
    }
    let kernel = if bf16 { "fake_quant_bf16" } else { "fake_quant_f32" };
    let out =
        Needs { name: "fake_quant: out", kinds: &[x.kind()], shape: &[rows, cols], device }.check(&dequantized)?;
    let counts_arg = Arg::Pointer(counts.data_ptr());
    let format_arg = Arg::U32(kernel_format);
    let args = [x_arg, out, amax_arg, counts_arg, shape[0], shape[1], format_arg, Arg::U32(amax_stride)];
    // SAFETY: as above; out has the shape and dtype of x, counts two 64-bit words.
    unsafe { launch("fake_quant", kernel, device, threads, &args) }?;
    Ok(FakeQuant { dequantized, counts })
}

/// The format's number in kernels/include/block_scale.cuh.
fn kernel_format(format: Format) -> Result<u32> {
    match (format.family, format.rounding, format.two_d) {
        (Family::Mxfp4 { rule: MxScaleRule::Floor }, Rounding::NearestEven, false) => Ok(0),
        (Family::Mxfp4 { rule: MxScaleRule::Even }, Rounding::NearestEven, false) => Ok(1),
        (Family::Mxfp4 { rule: MxScaleRule::Rceil }, Rounding::NearestEven, false) => Ok(2),
        (Family::Nvfp4 { four_over_six: false }, Rounding::NearestEven, false) => Ok(3),
        (Family::Nvfp4SingleLevel, ..) => Ok(4),
        _ => Err(Error::Unavailable(format!("format {format} has no CUDA kernel yet; --device cpu has it"))),
    }
}
