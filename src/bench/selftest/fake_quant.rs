//! fake_quant_*.cu and amax.cu: every format, dtype, shape and source of the tensor amax.

use tch::{Device, Kind, Tensor};

use super::{Check, Compared, HUGE_ELEMENTS, Sizes, enter, inputs};
use crate::Result;
use crate::numerics::block_format::{self, RoundingDraw, TensorScale};
use crate::numerics::format::{Family, Format, SPELLINGS};
use crate::numerics::tensor_error::TensorErrorSums;
use crate::ops::cuda::fake_quant::{FakeQuant, Matrix, MatrixScale, Wanted, amax, quantize};
use crate::ops::cuda::launch::Executor;
use crate::ops::fake_quant::{self as operation, StochasticDraw, Weight};
use crate::ops::matmul_error::RowKeys;

const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

pub fn checks(executor: &dyn Executor, sizes: &Sizes, checks: &mut Vec<Check>) -> Result<()> {
    let formats: Vec<Format> = SPELLINGS.iter().map(|name| name.parse()).collect::<Result<_>>()?;
    for &shape in sizes.small {
        for kind in KINDS {
            let case = Case::new(shape, kind, shape.0 * shape.1 > 64)?;
            for &format in &formats {
                let scales = [TensorScale::Tensor, TensorScale::Row, TensorScale::Amax(4.0)];
                for scale in scales.into_iter().filter(|scale| applies(format, *scale)) {
                    let name = format!("{format} {scale:?}");
                    let run = |compared: &mut Compared| case.everything(executor, format, scale, compared);
                    enter(checks, "fake_quant", name, kind, shape, run)?;
                }
                if format.has_tensor_scale() {
                    let run = |compared: &mut Compared| case.amax(executor, format, compared);
                    enter(checks, "amax", format.to_string(), kind, shape, run)?;
                }
            }
        }
    }
    for &shape in sizes.large {
        let is_huge = shape.0 * shape.1 >= HUGE_ELEMENTS;
        for kind in KINDS.into_iter().filter(|kind| !is_huge || *kind == Kind::BFloat16) {
            let case = Case::new(shape, kind, true)?;
            for &format in formats.iter().filter(|f| !is_huge || [Format::MXFP4, Format::NVFP4].contains(f)) {
                let run = |compared: &mut Compared| case.values(executor, format, compared);
                enter(checks, "fake_quant", format!("{format} Tensor"), kind, shape, run)?;
            }
        }
    }
    for name in ["mxfp4:sr", "nvfp4", "nvfp4:2d", "fp8:tensor"] {
        let (format, kind): (Format, Kind) = (name.parse()?, Kind::BFloat16);
        let run = |compared: &mut Compared| batch(executor, format, compared);
        enter(checks, "fake_quant", format!("{name} batch in groups"), kind, (8, 96), run)?;
        let run = |compared: &mut Compared| view(executor, format, compared);
        enter(checks, "fake_quant", format!("{name} view at an odd place"), kind, (6, 96), run)?;
    }
    Ok(())
}

/// More matrices than a launch takes; every two share their amax.
fn batch(executor: &dyn Executor, format: Format, compared: &mut Compared) -> Result<()> {
    let x =
        (0..61).map(|number| inputs((1 + number % 8, 96), Kind::BFloat16, false)).collect::<Result<Vec<Tensor>>>()?;
    let there = x.iter().map(|x| Ok(x.f_to_device(executor.device())?)).collect::<Result<Vec<Tensor>>>()?;
    let draw = |number: usize, x: &Tensor| {
        let keys = RowKeys::consecutive((number as u64) << 32, x.size()[0] as usize);
        Some(StochasticDraw { seed: 3, stream: number as u32, keys })
    };
    let draws: Vec<Option<StochasticDraw>> = x.iter().enumerate().map(|(number, x)| draw(number, x)).collect();
    let matrix =
        |(number, x): (usize, _)| Matrix { x, scale: MatrixScale::Group(number / 2), draw: draws[number].as_ref() };
    let matrices: Vec<Matrix> = there.iter().enumerate().map(matrix).collect();
    let wanted = Wanted { dequantized: true, ..Wanted::default() };
    let found = quantize(executor, format, &matrices, wanted)?;
    let weight = |(number, x): (usize, _)| Weight { x, scale_group: number / 2, draw: draws[number].clone() };
    let weights: Vec<Weight> = x.iter().enumerate().map(weight).collect();
    let expected = operation::fake_quant_weights(&weights, format, false)?;
    for (found, (expected, _)) in found.matrices.into_iter().zip(&expected) {
        compared.tensors(&found.dequantized.unwrap_or_default(), expected)?;
    }
    Ok(())
}

/// A matrix that begins at an odd element of its storage.
fn view(executor: &dyn Executor, format: Format, compared: &mut Compared) -> Result<()> {
    let of = |all: &Tensor| -> Result<Tensor> { Ok(all.f_narrow(1, 1, 6 * 96)?.f_view([6, 96])?) };
    let all = inputs((1, 6 * 96 + 1), Kind::BFloat16, false)?;
    let draw = StochasticDraw { seed: 3, stream: 1, keys: RowKeys::consecutive(0, 6) };
    let (x, scale) = (of(&all.f_to_device(executor.device())?)?, TensorScale::Tensor);
    let matrix = Matrix { x: &x, scale: MatrixScale::Own(scale), draw: Some(&draw) };
    let wanted = Wanted { dequantized: true, ..Wanted::default() };
    let mut found = quantize(executor, format, &[matrix], wanted)?.matrices;
    let expected = operation::fake_quant(&of(&all)?.f_contiguous()?, format, scale, Some(&draw))?;
    compared.tensors(&found.pop().and_then(|made| made.dequantized).unwrap_or_default(), &expected)
}

/// Whether a source of the tensor amax means something of its own in a format.
fn applies(format: Format, scale: TensorScale) -> bool {
    scale == TensorScale::Tensor || format.has_tensor_scale() && !(format.two_d && scale == TensorScale::Row)
}

struct Case {
    x: Tensor, // [rows, cols] on the CPU
    draw: StochasticDraw,
}

impl Case {
    fn new(shape: (usize, usize), kind: Kind, nonfinite: bool) -> Result<Case> {
        let draw = StochasticDraw { seed: 3, stream: 5 << 28, keys: RowKeys::consecutive(7 << 32, shape.0) };
        Ok(Case { x: inputs(shape, kind, nonfinite)?, draw })
    }

    fn quantized(
        &self,
        executor: &dyn Executor,
        format: Format,
        scale: TensorScale,
        wanted: Wanted,
    ) -> Result<(FakeQuant, TensorErrorSums, i64)> {
        let x = self.x.f_to_device(executor.device())?;
        let matrix = Matrix { x: &x, scale: MatrixScale::Own(scale), draw: Some(&self.draw) };
        let mut batch = quantize(executor, format, &[matrix], wanted)?;
        let sums = batch.error_sums()?.pop().unwrap_or_default();
        let nonfinite = i64::try_from(batch.nonfinite_blocks.f_to_device(Device::Cpu)?)?;
        Ok((batch.matrices.pop().unwrap_or_default(), sums, nonfinite))
    }

    /// Values, codes, scales, counts and sums, against the definition.
    fn everything(
        &self,
        executor: &dyn Executor,
        format: Format,
        scale: TensorScale,
        compared: &mut Compared,
    ) -> Result<()> {
        let wanted = Wanted { dequantized: true, codes: true, error_sums: true };
        let (found, sums, nonfinite) = self.quantized(executor, format, scale, wanted)?;
        let (rows, cols) = self.x.size2()?;
        let wide = Vec::<f32>::try_from(self.x.f_to_kind(Kind::Float)?.f_flatten(0, -1)?)?;
        let StochasticDraw { seed, stream, keys } = &self.draw;
        let draw = RoundingDraw { seed: *seed, stream: *stream, row_keys: keys.host() };
        let expected = block_format::quantize(&wide, rows as usize, cols as usize, format, scale, Some(&draw));
        let y = Tensor::f_from_slice(&expected.dequantized)?.f_view([rows, cols])?.f_to_kind(self.x.kind())?;
        let codes: Vec<u8> = match format.has_e4m3_elements() {
            true => expected.codes,
            false => packed(&expected.codes, cols as usize),
        };
        let scales = match format.family {
            Family::Fp8 { .. } => Tensor::f_from_slice(&expected.fp8_scales)?,
            _ => Tensor::f_from_slice(&expected.block_scales)?,
        };
        for (found, expected) in [
            (found.dequantized, y.f_flatten(0, -1)?),
            (found.codes, Tensor::f_from_slice(&codes)?),
            (found.block_scales, scales),
        ] {
            compared.tensors(&found.unwrap_or_default().f_flatten(0, -1)?, &expected)?;
        }
        compared.counts(nonfinite as u64, expected.nonfinite_blocks as u64);
        let y = Vec::<f32>::try_from(y.f_to_kind(Kind::Float)?.f_flatten(0, -1)?)?;
        compare_sums(compared, &sums, &TensorErrorSums::of(&wide, &y, expected.saturated as u64));
        Ok(())
    }

    /// Values alone, against the CPU operation.
    fn values(&self, executor: &dyn Executor, format: Format, compared: &mut Compared) -> Result<()> {
        let wanted = Wanted { dequantized: true, ..Wanted::default() };
        let (found, ..) = self.quantized(executor, format, TensorScale::Tensor, wanted)?;
        let expected = operation::fake_quant(&self.x, format, TensorScale::Tensor, Some(&self.draw))?;
        compared.tensors(&found.dequantized.unwrap_or_default(), &expected)
    }

    fn amax(&self, executor: &dyn Executor, format: Format, compared: &mut Compared) -> Result<()> {
        let found = amax(executor, &self.x.f_to_device(executor.device())?, format)?;
        compared.tensors(&found, &Tensor::f_from_slice(&[operation::amax(&self.x, format)?])?)
    }
}

/// Two codes a byte, low nibble first.
fn packed(codes: &[u8], cols: usize) -> Vec<u8> {
    let pack = |pair: &[u8]| pair[0] | pair.get(1).copied().unwrap_or(0) << 4;
    codes.chunks(cols.max(1)).flat_map(|row| row.chunks(2).map(pack)).collect()
}

fn compare_sums(compared: &mut Compared, found: &TensorErrorSums, expected: &TensorErrorSums) {
    let counts = |s: &TensorErrorSums| [s.elements, s.nonzero, s.deadzone, s.saturated, s.nonfinite];
    for (found, expected) in counts(found).into_iter().zip(counts(expected)) {
        compared.counts(found, expected);
    }
    // The terms of the relative error are taken in f32; the others' order of addition is free.
    let sums = |s: &TensorErrorSums| [s.x_sq, s.q_sq, s.x_q, s.error_sq, s.max_abs_error, s.relative];
    let tolerances = [1e-10, 1e-10, 1e-10, 1e-10, 0.0, 1e-6];
    for ((found, expected), tolerance) in sums(found).into_iter().zip(sums(expected)).zip(tolerances) {
        compared.near(found, expected, tolerance);
    }
}
