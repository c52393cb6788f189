//! Fake quantization of a tensor: the values that `Format` can hold, in the input's dtype.
//!
//! Blocks lie along the last dimension. The definition is numerics::block_format; cpu/ and cuda/ equal it bit for bit.
//! Shapes: x [rows, K] f32, bf16 or f16, contiguous; the result has the same shape and dtype and no
//! gradient: callers pass it straight through.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use super::cpu::fake_quant::{Task, error_sums as cpu_error_sums, tensor_amax};
use super::cpu::tensor::{bf16_slice, bf16_slice_mut, f16_slice, f16_slice_mut, f32_slice, f32_slice_mut};
use super::cuda::fake_quant::{self as on_device, Matrix, MatrixScale, Wanted};
use super::cuda::place::Place;
use super::matmul_error::RowKeys;
use crate::numerics::block_format::{RoundingDraw, TensorScale};
use crate::numerics::format::Format;
use crate::numerics::tensor_error::TensorErrorSums;
use crate::{Error, Result};

/// What stochastic rounding draws from: the keys of numerics::stochastic_rounding.
#[derive(Clone)]
pub struct StochasticDraw {
    pub seed: u64,
    pub stream: u32,
    pub keys: RowKeys, // [rows]
}

/// `scale`: what the tensor amax of nvfp4 and fp8:tensor is taken over. `draw`: needed by `sr` and `sr8`, unused by the
/// others.
///
/// # Errors
/// `Runtime` for another dtype, a stochastic format without a draw (or with other than one key per row) and 2-D tiles
/// with a tensor scale per row.
pub fn fake_quant(x: &Tensor, format: Format, scale: TensorScale, draw: Option<&StochasticDraw>) -> Result<Tensor> {
    let Some(place) = Place::of(x) else { return Ok(on_cpu(x, format, scale, draw, false)?.0) };
    let matrix = Matrix { x, scale: MatrixScale::Own(scale), draw };
    let made = on_device::quantize(&place, format, &[matrix], DEQUANTIZED)?;
    made.matrices.into_iter().find_map(|matrix| matrix.dequantized).ok_or_else(nothing_made)
}

/// As [`fake_quant`], with the sums behind the error metrics.
///
/// # Errors
/// As [`fake_quant`].
pub fn fake_quant_with_errors(
    x: &Tensor,
    format: Format,
    scale: TensorScale,
    draw: Option<&StochasticDraw>,
) -> Result<(Tensor, TensorErrorSums)> {
    let Some(place) = Place::of(x) else { return on_cpu(x, format, scale, draw, true) };
    let matrix = Matrix { x, scale: MatrixScale::Own(scale), draw };
    let wanted = Wanted { error_sums: true, ..DEQUANTIZED };
    let made = on_device::quantize(&place, format, &[matrix], wanted)?;
    let sums = made.error_sums()?.into_iter().next().ok_or_else(nothing_made)?;
    let dequantized = made.matrices.into_iter().find_map(|matrix| matrix.dequantized);
    Ok((dequantized.ok_or_else(nothing_made)?, sums))
}

/// A weight of a model.
pub struct Weight<'a> {
    pub x: &'a Tensor,
    /// Weights of one number share their tensor amax, as fused siblings do.
    pub scale_group: usize,
    pub draw: Option<StochasticDraw>,
}

/// Q(x) of weights, in a few launches on CUDA; with `with_errors` also the sums behind their error metrics.
///
/// # Errors
/// As `fake_quant`.
pub fn fake_quant_weights(
    weights: &[Weight],
    format: Format,
    with_errors: bool,
) -> Result<Vec<(Tensor, Option<TensorErrorSums>)>> {
    let Some(first) = weights.first() else { return Ok(Vec::new()) };
    let Some(place) = Place::of(first.x) else { return weights_on_cpu(weights, format, with_errors) };
    let matrices = weights.iter().map(|weight| {
        let Weight { x, scale_group, draw } = weight;
        Matrix { x, scale: MatrixScale::Group(*scale_group), draw: draw.as_ref() }
    });
    let matrices: Vec<Matrix> = matrices.collect();
    let wanted = Wanted { error_sums: with_errors, ..DEQUANTIZED };
    let made = on_device::quantize(&place, format, &matrices, wanted)?;
    let mut sums = made.error_sums()?.into_iter();
    let result = made.matrices.into_iter().map(|m| Ok((m.dequantized.ok_or_else(nothing_made)?, sums.next())));
    result.collect()
}

const DEQUANTIZED: Wanted = Wanted { dequantized: true, codes: false, error_sums: false };

fn nothing_made() -> Error {
    Error::Runtime("fake_quant: the batch is empty".into())
}

fn weights_on_cpu(
    weights: &[Weight],
    format: Format,
    with_errors: bool,
) -> Result<Vec<(Tensor, Option<TensorErrorSums>)>> {
    // Of groups of several; a weight that stands alone finds its amax in the same call.
    let mut shared: BTreeMap<usize, f32> = BTreeMap::new();
    if format.has_tensor_scale() {
        let count = |group: usize| weights.iter().filter(|weight| weight.scale_group == group).count();
        for weight in weights.iter().filter(|weight| count(weight.scale_group) > 1) {
            let largest = shared.entry(weight.scale_group).or_insert(0.0);
            *largest = largest.max(amax(weight.x, format)?);
        }
    }
    let quantize = |weight: &Weight| {
        let scale = shared.get(&weight.scale_group).map_or(TensorScale::Tensor, |amax| TensorScale::Amax(*amax));
        let (quantized, sums) = on_cpu(weight.x, format, scale, weight.draw.as_ref(), with_errors)?;
        Ok((quantized, with_errors.then_some(sums)))
    };
    weights.iter().map(quantize).collect()
}

fn on_cpu(
    x: &Tensor,
    format: Format,
    scale: TensorScale,
    draw: Option<&StochasticDraw>,
    with_errors: bool,
) -> Result<(Tensor, TensorErrorSums)> {
    let (rows, cols) = x.size2()?;
    let (rows, cols) = (rows as usize, cols as usize);
    if format.two_d && format.has_tensor_scale() && scale == TensorScale::Row {
        return Err(Error::Runtime(format!("fake_quant: {format} has one tensor scale, not one per row")));
    }
    let draw = draw.filter(|_| format.rounding.is_stochastic());
    let keys = draw.map_or(0, |draw| draw.keys.len());
    if format.rounding.is_stochastic() && keys != rows {
        return Err(Error::Runtime(format!("fake_quant: {format}: {keys} row keys for {rows} rows")));
    }
    let draw = draw.map(|draw| RoundingDraw { seed: draw.seed, stream: draw.stream, row_keys: draw.keys.host() });
    let task = Task { with_errors, ..Task::new(format, scale, draw.as_ref()) };
    let mut out = x.f_empty_like()?;
    let (_, sums) = match x.kind() {
        Kind::Float => task.run(f32_slice(x)?, rows, cols, f32_slice_mut(&mut out)?),
        Kind::BFloat16 => task.run(bf16_slice(x)?, rows, cols, bf16_slice_mut(&mut out)?),
        Kind::Half => task.run(f16_slice(x)?, rows, cols, f16_slice_mut(&mut out)?),
        other => return Err(Error::Runtime(format!("fake_quant: dtype {other:?}, expected f32, bf16 or f16"))),
    };
    Ok((out, sums))
}

/// The tensor amax A of x: over blocks without NaN or infinity.
pub fn amax(x: &Tensor, format: Format) -> Result<f32> {
    let (_, cols) = x.size2()?;
    if let Some(place) = Place::of(x) {
        let found = on_device::amax(&place, &x.f_contiguous()?, format)?;
        return Ok(f64::try_from(found)? as f32);
    }
    let (host, cols) = (x.f_contiguous()?, cols as usize);
    Ok(match host.kind() {
        Kind::BFloat16 => tensor_amax(bf16_slice(&host)?, cols, format),
        Kind::Half => tensor_amax(f16_slice(&host)?, cols, format),
        _ => tensor_amax(f32_slice(&host)?, cols, format),
    })
}

/// The sums behind the error metrics of `quantized` against `x`, saturation aside.
pub fn error_sums(x: &Tensor, quantized: &Tensor) -> Result<TensorErrorSums> {
    if Place::of(x).is_none() {
        let (x, q) = (x.f_contiguous()?, quantized.f_contiguous()?);
        return Ok(match x.kind() {
            Kind::BFloat16 => cpu_error_sums(bf16_slice(&x)?, bf16_slice(&q)?),
            Kind::Half => cpu_error_sums(f16_slice(&x)?, f16_slice(&q)?),
            _ => cpu_error_sums(f32_slice(&x)?, f32_slice(&q)?),
        });
    }
    let (x, q) = (x.f_to_kind(Kind::Float)?, quantized.f_to_kind(Kind::Float)?);
    let finite = x.f_isfinite()?.f_logical_and(&q.f_isfinite()?)?;
    let nonfinite = finite.f_logical_not()?;
    let (x, q) = (x.f_masked_fill(&nonfinite, 0.0)?, q.f_masked_fill(&nonfinite, 0.0)?);
    let error = q.f_sub(&x)?.f_abs()?;
    let sum = |t: Tensor| -> Result<f64> { Ok(f64::try_from(t.f_sum(Kind::Double)?)?) };
    let (nonzero, to_zero) = (x.f_ne(0.0)?, q.f_eq(0.0)?);
    Ok(TensorErrorSums {
        elements: sum(finite)? as u64,
        x_sq: sum(x.f_square()?)?,
        q_sq: sum(q.f_square()?)?,
        x_q: sum(x.f_mul(&q)?)?,
        error_sq: sum(error.f_square()?)?,
        relative: sum(error.f_div(&x.f_abs()?.f_add_scalar(1e-10)?)?)?,
        max_abs_error: f64::try_from(error.f_max()?)?,
        deadzone: sum(nonzero.f_logical_and(&to_zero)?)? as u64,
        nonzero: sum(nonzero)? as u64,
        saturated: 0,
        nonfinite: sum(nonfinite)? as u64,
    })
}
