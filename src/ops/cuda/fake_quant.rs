//! Fake quantization of a batch of matrices on a CUDA device, bit for bit numerics::block_format.
//!
//! Formats with a tensor scale read x twice: a launch finds the amaxes, the next one quantizes. What fits the GPU's L2 is
//! read from there the second time.
#![allow(unsafe_code)]

mod kernel;

use std::ffi::c_void;

use tch::{Kind, Tensor};

use super::batch::{Divider, tiles};
use super::launch::{Executor, Needs, Prepared};
use super::zeros::Zeros;
use crate::numerics::block_format::TensorScale;
use crate::numerics::format::{Family, Format};
use crate::numerics::tensor_error::TensorErrorSums;
use crate::ops::fake_quant::StochasticDraw;
use crate::{Error, Result};
use kernel::{Call, ERROR_SUMS, KernelTensor, TILE_OCTETS};

/// A matrix to quantize.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    pub x: &'a Tensor, // [rows, K] f32, bf16 or f16, contiguous
    pub scale: MatrixScale,
    /// Needed by `sr` and `sr8`, unused by the others.
    pub draw: Option<&'a StochasticDraw>,
}

/// What the tensor amax is taken from.
#[derive(Clone, Copy, PartialEq)]
pub enum MatrixScale {
    Own(TensorScale),
    /// All matrices of the batch with this number.
    Group(usize),
}

/// What a call should make.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Wanted {
    pub dequantized: bool,
    /// Codes and block scales, as a packed checkpoint stores them.
    pub codes: bool,
    pub error_sums: bool,
}

/// A quantized matrix; what was not wanted is None.
#[derive(Default)]
pub struct FakeQuant {
    pub dequantized: Option<Tensor>,  // [rows, K] in the dtype of x
    pub codes: Option<Tensor>,        // u8: E2M1 [rows, ceil(K / 2)], low nibble first; E4M3 [rows, K]
    pub block_scales: Option<Tensor>, // u8 [rows, blocks of a row]; fp8: f32 [rows]
    pub amax: Option<Tensor>,         // f32 [1], or [rows] with nvfp4's row scales; None without a tensor scale
}

/// What [`quantize`] made.
pub struct Batch {
    pub matrices: Vec<FakeQuant>,
    pub nonfinite_blocks: Tensor, // i64 [matrices]
    sums: Option<Tensor>,         // f64 [matrices, ERROR_SUMS]
}

impl Batch {
    /// The sums behind the error metrics of every matrix; reads the device once. Empty where they were not wanted.
    pub fn error_sums(&self) -> Result<Vec<TensorErrorSums>> {
        let Some(sums) = &self.sums else { return Ok(Vec::new()) };
        let values = Vec::<f64>::try_from(sums.f_flatten(0, -1)?)?;
        Ok(values.chunks_exact(ERROR_SUMS).map(kernel::error_sums).collect())
    }
}

/// Quantizes matrices of one dtype.
///
/// # Errors
/// `Runtime` naming the tensor of the wrong device, dtype, shape or strides, for a stochastic format without a draw (or
/// with other than one key per row) and for 2-D tiles with a tensor scale per row; `Unavailable` without kernels or driver.
pub fn quantize(executor: &dyn Executor, format: Format, matrices: &[Matrix], wanted: Wanted) -> Result<Batch> {
    let (launches, batch) = prepare(executor, format, matrices, wanted)?;
    launches.run(executor)?;
    Ok(batch)
}

/// The launches of [`quantize`], and what they fill.
///
/// # Errors
/// As [`quantize`].
pub fn prepare(
    executor: &dyn Executor,
    format: Format,
    matrices: &[Matrix],
    wanted: Wanted,
) -> Result<(Prepared, Batch)> {
    let device = executor.device();
    let seed = matrices.iter().find_map(|matrix| matrix.draw).map_or(0, |draw| draw.seed);
    let kind = matrices.first().map_or(Kind::Float, |matrix| matrix.x.kind());
    let call = Call { device, multiprocessors: executor.properties()?.multiprocessors, format, kind, seed };
    let count = matrices.len() as i64;
    let groups = matrices.iter().map(|m| if let MatrixScale::Group(n) = m.scale { n as i64 + 1 } else { 0 }).max();
    let groups = groups.unwrap_or(0);
    let sum_count = if wanted.error_sums { count * ERROR_SUMS as i64 } else { 0 };
    let own: i64 = matrices.iter().map(|m| Buffers::zero_words(&call, m)).sum();
    let mut zeros = Zeros::new(count + sum_count + Zeros::words(groups, Kind::Float) + own, device)?;
    let nonfinite_blocks = zeros.take(count, Kind::Int64)?;
    let sums = wanted.error_sums.then(|| zeros.take(sum_count, Kind::Double)).transpose()?;
    let sums = sums.map(|sums| sums.f_view([count, ERROR_SUMS as i64])).transpose()?;
    let group_amaxes = zeros.take(groups, Kind::Float)?;
    let buffers = matrices.iter().map(|m| Buffers::new(&call, m, &group_amaxes, &mut zeros, wanted));
    let buffers = buffers.collect::<Result<Vec<_>>>()?;
    let tensors = matrices.iter().zip(&buffers).map(|(m, b)| b.describe(&call, m)).collect::<Result<Vec<_>>>()?;
    let mut launches = call.find_amaxes(&unknown_amaxes(matrices, &tensors, format));
    launches.extend(call.quantize(&tensors, &nonfinite_blocks, sums.as_ref()));
    let mut memory = vec![nonfinite_blocks.shallow_clone()];
    memory.extend(sums.as_ref().map(Tensor::shallow_clone));
    for (matrix, buffers) in matrices.iter().zip(&buffers) {
        memory.push(matrix.x.shallow_clone());
        memory.extend(buffers.all().map(Tensor::shallow_clone));
        memory.extend(matrix.draw.map(|draw| draw.keys.if_on_device()).into_iter().flatten());
    }
    // SAFETY: the pointers are to x and keys, which `Needs` has checked, and to what was made for them; all in `memory`.
    let prepared = unsafe { Prepared::new(launches, device, memory) };
    Ok((prepared, Batch { matrices: buffers.into_iter().map(|b| b.made).collect(), nonfinite_blocks, sums }))
}

/// The tensor amax A of x [rows, K], over blocks without NaN or infinity; f32 [1] on the device.
///
/// # Errors
/// As [`quantize`], and `Runtime` for a format without a tensor scale.
pub fn amax(executor: &dyn Executor, x: &Tensor, format: Format) -> Result<Tensor> {
    let (launches, amax) = prepare_amax(executor, x, format)?;
    launches.run(executor)?;
    Ok(amax)
}

/// The launches of [`amax`], and what they fill.
///
/// # Errors
/// As [`amax`].
pub fn prepare_amax(executor: &dyn Executor, x: &Tensor, format: Format) -> Result<(Prepared, Tensor)> {
    let (device, multiprocessors) = (executor.device(), executor.properties()?.multiprocessors);
    let call = Call { device, multiprocessors, format, kind: x.kind(), seed: 0 };
    let matrix = Matrix { x, scale: MatrixScale::Own(TensorScale::Tensor), draw: None };
    let mut zeros = Zeros::new(Buffers::zero_words(&call, &matrix), device)?;
    let no_groups = zeros.take(0, Kind::Float)?;
    let buffers = Buffers::new(&call, &matrix, &no_groups, &mut zeros, Wanted::default())?;
    let tensor = buffers.describe_unkeyed(&call, &matrix)?;
    let launches = call.find_amaxes(&unknown_amaxes(&[matrix], &[tensor], format));
    let memory = buffers.all().chain([x]).map(Tensor::shallow_clone).collect();
    // SAFETY: as in `prepare`.
    let prepared = unsafe { Prepared::new(launches, device, memory) };
    let amax = buffers.made.amax;
    Ok((prepared, amax.ok_or_else(|| Error::Runtime(format!("fake_quant: {format} has no tensor amax")))?))
}

/// Those whose amax (in fp8: their rows' amaxes) must be found first, and whether that of the tensor is wanted.
fn unknown_amaxes(matrices: &[Matrix], tensors: &[KernelTensor], format: Format) -> Vec<(KernelTensor, bool)> {
    let is_fp8 = matches!(format.family, Family::Fp8 { .. });
    let of = |(matrix, tensor): (&Matrix, &KernelTensor)| {
        let given = matches!(matrix.scale, MatrixScale::Own(TensorScale::Amax(_)));
        let by_row = is_fp8 && matrix.scale == MatrixScale::Own(TensorScale::Row);
        let of_tensor = format.has_tensor_scale() && !given && !by_row;
        (of_tensor || is_fp8).then_some((*tensor, of_tensor))
    };
    matrices.iter().zip(tensors).filter_map(of).collect()
}

/// The device memory of one matrix.
struct Buffers {
    made: FakeQuant,
    of_rows: Option<Tensor>, // fp8: f32 [rows], the amax of each
}

impl Buffers {
    /// How much `new` takes of the call's zeros: an amax of its own, and in fp8 one of every row.
    fn zero_words(call: &Call, matrix: &Matrix) -> i64 {
        let rows = matrix.x.size().first().copied().unwrap_or(0);
        let own = if matrix.scale == MatrixScale::Own(TensorScale::Row) { rows } else { 1 };
        let of_rows = if matches!(call.format.family, Family::Fp8 { .. }) { rows } else { 0 };
        Zeros::words(own, Kind::Float) + Zeros::words(of_rows, Kind::Float)
    }

    fn new(call: &Call, matrix: &Matrix, group_amaxes: &Tensor, zeros: &mut Zeros, wanted: Wanted) -> Result<Buffers> {
        let format = call.format;
        let [rows, cols] = matrix.x.size()[..] else {
            return Err(Error::Runtime(format!(
                "fake_quant: x: found shape {:?}, expected [rows, K]",
                matrix.x.size()
            )));
        };
        let per_row = matrix.scale == MatrixScale::Own(TensorScale::Row);
        if per_row && format.two_d && format.has_tensor_scale() {
            return Err(Error::Runtime(format!("fake_quant: {format} has one tensor scale, not one per row")));
        }
        let is_fp8 = matches!(format.family, Family::Fp8 { .. });
        let mut made = FakeQuant::default();
        if wanted.dequantized {
            made.dequantized = Some(matrix.x.f_empty_like()?);
        }
        if wanted.codes {
            let code_bytes = if format.has_e4m3_elements() { cols } else { (cols + 1) / 2 };
            made.codes = Some(call.empty(&[rows, code_bytes], Kind::Uint8)?);
            let blocks = format.blocks_per_row(cols as usize) as i64;
            made.block_scales = Some(match is_fp8 {
                true => call.empty(&[rows], Kind::Float)?,
                false => call.empty(&[rows, blocks], Kind::Uint8)?,
            });
        }
        made.amax = match matrix.scale {
            _ if !format.has_tensor_scale() => None,
            MatrixScale::Own(TensorScale::Amax(amax)) => Some(call.filled(amax)?),
            MatrixScale::Own(TensorScale::Tensor) => Some(zeros.take(1, Kind::Float)?),
            // An fp8 row's amax stands in `of_rows` in any case.
            MatrixScale::Own(TensorScale::Row) if is_fp8 => None,
            MatrixScale::Own(TensorScale::Row) => Some(zeros.take(rows, Kind::Float)?),
            MatrixScale::Group(number) => Some(group_amaxes.f_narrow(0, number as i64, 1)?),
        };
        let of_rows = is_fp8.then(|| zeros.take(rows, Kind::Float)).transpose()?;
        Ok(Buffers { made, of_rows })
    }

    fn all(&self) -> impl Iterator<Item = &Tensor> {
        let FakeQuant { dequantized, codes, block_scales, amax } = &self.made;
        [dequantized, codes, block_scales, amax, &self.of_rows].into_iter().flatten()
    }

    fn describe(&self, call: &Call, matrix: &Matrix) -> Result<KernelTensor> {
        let mut tensor = self.describe_unkeyed(call, matrix)?;
        if !call.format.rounding.is_stochastic() {
            return Ok(tensor);
        }
        let keys = matrix.draw.map_or(0, |draw| draw.keys.len());
        let Some(draw) = matrix.draw.filter(|_| keys == tensor.rows as usize) else {
            return Err(Error::Runtime(format!(
                "fake_quant: {}: {keys} row keys for {} rows",
                call.format, tensor.rows
            )));
        };
        tensor.stream = draw.stream;
        match draw.keys.first_of_consecutive() {
            Some(first) => tensor.first_key = first,
            None => {
                let (keys, kind) = (draw.keys.on_device(call.device)?, [Kind::Int64]);
                let needs =
                    Needs { name: "fake_quant: keys", kinds: &kind, shape: &keys.size(), device: keys.device() };
                tensor.of_rows = needs.check(&keys)?;
            }
        }
        Ok(tensor)
    }

    fn describe_unkeyed(&self, call: &Call, matrix: &Matrix) -> Result<KernelTensor> {
        let kinds = [Kind::Float, Kind::BFloat16, Kind::Half];
        let kinds = if kinds.contains(&call.kind) { std::slice::from_ref(&call.kind) } else { &kinds };
        let shape = matrix.x.size();
        let x = Needs { name: "fake_quant: x", kinds, shape: &shape, device: call.device }.check(matrix.x)?;
        let (rows, cols) = (shape[0] as usize, shape[1] as usize);
        let octets_of_row = kernel::octets_of_row(call.format, cols);
        tiles("fake_quant: x", rows, octets_of_row, TILE_OCTETS)?;
        let pointer = |tensor: &Option<Tensor>| tensor.as_ref().map_or(std::ptr::null_mut(), Tensor::data_ptr);
        let (y, codes) = (pointer(&self.made.dequantized), pointer(&self.made.codes));
        let aligned = |pointer: *const c_void| (pointer as usize).is_multiple_of(16);
        let whole = octets_of_row * 8 == cols && aligned(x) && aligned(y) && aligned(codes);
        let per_row = matrix.scale == MatrixScale::Own(TensorScale::Row);
        Ok(KernelTensor {
            x,
            y,
            codes,
            scales: pointer(&self.made.block_scales),
            amax: pointer(&self.made.amax),
            of_rows: pointer(&self.of_rows),
            rows: rows as u32,
            cols: cols as u32,
            octets_of_row: octets_of_row as u32,
            by_row: Divider::new(octets_of_row as u32),
            flags: if whole { kernel::WHOLE } else { 0 } | if per_row { kernel::AMAX_PER_ROW } else { 0 },
            ..KernelTensor::default()
        })
    }
}
