//! Fake quantization as a Python user writes it: a chain of torch tensor operations, x [rows, K] -> y of its dtype.
//!
//! Same values as `numerics::block_format` on finite inputs, which the benchmark checks before it times them.

use tch::{Kind, Tensor};

use crate::Result;
use crate::numerics::format::{Family, Format, MxScaleRule, Rounding};

/// The chain of a format; None where none is written.
pub fn fake_quant(x: &Tensor, format: Format) -> Result<Option<Tensor>> {
    Ok(match (format.family, format.rounding, format.two_d) {
        (Family::Mxfp4 { rule }, Rounding::NearestEven, false) => Some(mxfp4(x, rule)?),
        (Family::Nvfp4 { four_over_six: false }, Rounding::NearestEven, false) => Some(nvfp4(x)?),
        _ => None,
    })
}

/// x as f32 [blocks, size]; K is a multiple of the size.
fn blocks(x: &Tensor, size: i64) -> Result<Tensor> {
    Ok(x.f_to_kind(Kind::Float)?.f_reshape([-1, size])?)
}

/// 2^k of every block from the exponent of its amax = f 2^e, 1/2 <= f < 1; then the E2M1 grid.
fn mxfp4(x: &Tensor, rule: MxScaleRule) -> Result<Tensor> {
    let blocks = blocks(x, 32)?; // [blocks, 32]
    let amax = blocks.f_abs()?.f_amax([-1], true)?; // [blocks, 1]
    let (fraction, exponent) = amax.f_frexp()?;
    let k = exponent.f_sub_scalar(3)?;
    let k = match rule {
        MxScaleRule::Floor => k,
        MxScaleRule::Even => k.f_add(&fraction.f_ge(0.875)?)?,
        MxScaleRule::Rceil => k.f_add(&fraction.f_gt(0.75)?)?,
    };
    let scale = amax.f_ones_like()?.f_ldexp(&k.f_clamp(-127, 127)?)?;
    let y = to_e2m1(&blocks.f_div(&scale)?)?.f_mul(&scale)?;
    Ok(y.f_reshape(x.size())?.f_to_kind(x.kind())?)
}

/// E4M3 block scales under one tensor scale G = 2688 / A.
fn nvfp4(x: &Tensor) -> Result<Tensor> {
    let blocks = blocks(x, 16)?; // [blocks, 16]
    let g = 2688.0 / f64::try_from(blocks.f_abs()?.f_max()?)? as f32;
    let amax = blocks.f_abs()?.f_amax([-1], true)?; // [blocks, 1]
    let scale = amax.f_mul_scalar(f64::from(g * (1.0 / 6.0)))?.f_clamp_max(448.0)?;
    let scale = scale.f_to_kind(Kind::Float8e4m3fn)?.f_to_kind(Kind::Float)?;
    let decode = scale.f_mul_scalar(f64::from(1.0 / g))?;
    let encode = decode.f_reciprocal()?.f_clamp_max(f64::from(f32::MAX))?;
    let encode = encode.f_masked_fill(&scale.f_eq(0.0)?, 0.0)?;
    let y = to_e2m1(&blocks.f_mul(&encode)?)?.f_mul(&decode)?;
    Ok(y.f_reshape(x.size())?.f_to_kind(x.kind())?)
}

/// The nearest E2M1 value, ties to the even code: `round` does so on multiples of the grid's step.
fn to_e2m1(scaled: &Tensor) -> Result<Tensor> {
    let a = scaled.f_abs()?.f_clamp_max(6.0)?;
    let step = a.f_ge(2.0)?.f_to_kind(Kind::Float)?.f_add(&a.f_ge(4.0)?)?.f_sub_scalar(1.0)?.f_exp2()?;
    Ok(a.f_div(&step)?.f_round()?.f_mul(&step)?.f_copysign(scaled)?)
}
