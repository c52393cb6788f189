//! AQN on a CUDA device: kernels/perturb.cu, w' = w + RN(scale * z) in f32.
#![allow(unsafe_code)]

use tch::{Kind, Tensor};

use super::launch::{Arg, Needs, cuda_matrix, launch};
use super::matmul_error::noise_threads;
use crate::Result;

/// w' of w [rows, cols] f32 and tokens [rows] i64, the noise key of each row; a norm's weight is one row. w stays.
///
/// # Errors
/// `Runtime` naming the tensor of the wrong device, dtype, shape or strides; `Unavailable` without kernels or driver.
pub fn perturb(w: &Tensor, tokens: &Tensor, scale: f32, seed: u64, stream: u32) -> Result<Tensor> {
    let (device, rows, cols) = cuda_matrix("perturb: w", w)?;
    let w_arg = Needs { name: "perturb: w", kinds: &[Kind::Float], shape: &[rows, cols], device }.check(w)?;
    let tokens_arg = Needs { name: "perturb: tokens", kinds: &[Kind::Int64], shape: &[rows], device }.check(tokens)?;
    let out = w.f_empty_like()?;
    if rows * cols == 0 {
        return Ok(out);
    }
    let args = [
        w_arg,
        tokens_arg,
        Arg::Pointer(out.data_ptr()),
        Arg::U64(rows as u64),
        Arg::U64(cols as u64),
        Arg::F32(scale),
        Arg::U64(seed),
        Arg::U32(stream),
    ];
    // SAFETY: shapes, dtypes and device of w and tokens were checked above; out has w's.
    unsafe { launch("perturb", "perturb_f32", device, noise_threads(rows, cols), &args) }?;
    Ok(out)
}
