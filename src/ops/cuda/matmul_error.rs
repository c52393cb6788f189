//! The error of a matrix product on a CUDA device: kernels/matmul_error.cu, outputs bit for bit the definition in
//! numerics::error_law and numerics::generator.
#![allow(unsafe_code)]

use tch::{Device, Kind, Tensor};

use super::launch::{Arg, Needs, cuda_matrix, launch};
use crate::numerics::error_law::ErrorLaw;
use crate::{Error, Result};

/// round(law(y, scale, z) + bias) in `out_kind` (f32 or bf16).
///
/// y [rows, cols] f32, the clean product · tokens [rows] i64, the noise key of each row · bias [cols] f32 · sums [4]
/// f64, to which error^2, y^2, y^4 and the number of elements are added on the device. All on one CUDA device and
/// contiguous.
///
/// # Errors
/// `Runtime` naming the tensor that is not so; `Unavailable` without kernels or driver.
pub fn matmul_error(
    y: &Tensor,
    tokens: &Tensor,
    law: ErrorLaw,
    scale: f32,
    seed: u64,
    stream: u32,
    bias: Option<&Tensor>,
    out_kind: Kind,
    sums: &Tensor,
) -> Result<Tensor> {
    let (device, rows, cols) = cuda_matrix("matmul_error: y", y)?;
    let needs = |name, kind: &Kind, shape: &[i64], tensor: &Tensor| {
        Needs { name, kinds: std::slice::from_ref(kind), shape, device }.check(tensor)
    };
    let y_arg = needs("matmul_error: y", &Kind::Float, &[rows, cols], y)?;
    let tokens_arg = needs("matmul_error: tokens", &Kind::Int64, &[rows], tokens)?;
    let sums_arg = needs("matmul_error: sums", &Kind::Double, &[4], sums)?;
    let bias_arg = match bias {
        Some(bias) => needs("matmul_error: bias", &Kind::Float, &[cols], bias)?,
        None => Arg::Pointer(std::ptr::null_mut()),
    };
    let kernel = match out_kind {
        Kind::Float => "matmul_error_f32",
        Kind::BFloat16 => "matmul_error_bf16",
        other => {
            return Err(Error::Runtime(format!("matmul_error: output dtype {other:?}, expected Float or BFloat16")));
        }
    };
    let out = Tensor::f_empty([rows, cols], (out_kind, Device::Cuda(device)))?;
    if rows * cols == 0 {
        return Ok(out);
    }
    let args = [
        y_arg,
        tokens_arg,
        bias_arg,
        Arg::Pointer(out.data_ptr()),
        sums_arg,
        Arg::U64(rows as u64),
        Arg::U64(cols as u64),
        Arg::U32(kernel_law(law)),
        Arg::F32(scale),
        Arg::U64(seed),
        Arg::U32(stream),
    ];
    // SAFETY: shapes, dtypes and device of every pointer were checked above; out was just made.
    unsafe { launch("matmul_error", kernel, device, noise_threads(rows, cols), &args) }?;
    Ok(out)
}

/// A thread makes one Philox call: 16 columns of a 64-column block of one row.
pub(super) fn noise_threads(rows: i64, cols: i64) -> u64 {
    rows as u64 * (cols as u64).div_ceil(64) * 4
}

/// The law's number in kernels/include/error_law.cuh.
fn kernel_law(law: ErrorLaw) -> u32 {
    match law {
        ErrorLaw::RelativeGaussian => 0,
        ErrorLaw::AbsoluteGaussian => 1,
        ErrorLaw::SystematicBias => 2,
    }
}
