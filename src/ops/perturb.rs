//! Adaptive Quantization Noise on a weight: w' = w + scale * z, in f32 (numerics.md section 5).
//!
//! `w` f32 [rows, cols] (a norm is one row); z keyed by (seed, stream, row token, column). `w` itself is never changed.

use tch::{Device, Tensor};

use super::cpu;
use super::cuda;
use super::matmul_error::RowKeys;
use crate::Result;

pub fn perturb(w: &Tensor, scale: f32, seed: u64, stream: u32, rows: &RowKeys) -> Result<Tensor> {
    let (n, cols) = (rows.len(), w.numel() / rows.len().max(1));
    if w.device() != Device::Cpu {
        // A norm's weight is one row to the kernel.
        let matrix = w.f_contiguous()?.f_view([n as i64, cols as i64])?;
        let tokens = rows.on_device(w.device())?;
        return Ok(cuda::perturb::perturb(&matrix, &tokens, scale, seed, stream)?.f_view_as(w)?);
    }
    let mut out = w.f_empty_like()?;
    let values = cpu::tensor::f32_slice(w)?;
    cpu::matmul_error::perturb_f32(
        values,
        n,
        cols,
        scale,
        seed,
        stream,
        rows.host(),
        cpu::tensor::f32_slice_mut(&mut out)?,
    );
    Ok(out)
}
