//! Fake quantization as a Python user writes it: a chain of torch tensor operations, x [rows, K] -> y of its dtype.
//!
//! Same values as `numerics::block_format` on finite inputs, which the benchmark checks before it times them; stochastic
//! rounding draws from torch, so there the two agree in law only.

use tch::{Kind, Tensor};

use crate::Result;
use crate::numerics::format::{Family, Format, MxScaleRule, Rounding};

/// The chain of a format; None for the one that nobody should use.
pub fn fake_quant(x: &Tensor, format: Format) -> Result<Option<Tensor>> {
    if format.family == Family::Nvfp4SingleLevel {
        return Ok(None);
    }
    // [blocks, elements of a block]
    let (size, wide) = (format.block_size(0) as i64, x.f_to_kind(Kind::Float)?);
    let (rows, cols) = x.size2()?;
    let blocks = match (format.family, format.two_d) {
        (Family::Fp8 { .. }, _) => wide,
        (_, false) => wide.f_reshape([-1, size])?,
        (_, true) => {
            let tiles = wide.f_reshape([rows / size, size, cols / size, size])?.f_permute([0, 2, 1, 3])?;
            tiles.f_reshape([-1, size * size])?
        }
    };
    let y = quantized(&blocks, format)?;
    let y = match format.two_d {
        true => y.f_reshape([rows / size, cols / size, size, size])?.f_permute([0, 2, 1, 3])?,
        false => y,
    };
    Ok(Some(y.f_reshape([rows, cols])?.f_to_kind(x.kind())?))
}

/// y of f32 [blocks, elements].
fn quantized(x: &Tensor, format: Format) -> Result<Tensor> {
    let amax = x.f_abs()?.f_amax([-1], true)?; // [blocks, 1]
    match format.family {
        Family::Mxfp4 { rule } => {
            let scale = mx_scale(&amax, rule, 2, 0.75)?;
            Ok(to_e2m1(&x.f_div(&scale)?, format.rounding)?.f_mul(&scale)?)
        }
        Family::Mxfp8 { rule } => {
            let scale = mx_scale(&amax, rule, 8, 0.875)?;
            Ok(to_e4m3(&x.f_div(&scale)?, format.rounding)?.f_mul(&scale)?)
        }
        Family::Fp8 { per_tensor } => {
            let amax = if per_tensor { amax.f_max()? } else { amax };
            let scale = amax.f_div_scalar(448.0)?;
            Ok(to_e4m3(&x.f_div(&scale)?, format.rounding)?.f_mul(&scale)?)
        }
        Family::Nvfp4 { four_over_six: true } => {
            let g = encode_scale(1536.0, &amax)?;
            let target = amax.f_mul(&g.f_div_scalar(6.0)?)?;
            let six = nvfp4(x, &target, &g, format.rounding)?;
            let four = nvfp4(x, &target.f_mul_scalar(1.5)?, &g, format.rounding)?;
            let error = |y: &Tensor| -> Result<Tensor> {
                Ok(y.f_sub(x)?.f_to_kind(Kind::Double)?.f_square()?.f_sum_dim_intlist(
                    [-1i64].as_slice(),
                    true,
                    None,
                )?)
            };
            Ok(four.f_where_self(&error(&four)?.f_lt_tensor(&error(&six)?)?, &six)?)
        }
        _ => {
            let (range, sixth): (f32, f32) = match format.rounding.is_stochastic() {
                true => (43_008.0 / 17.0, 17.0 / 96.0),
                false => (2688.0, 1.0 / 6.0),
            };
            let g = encode_scale(range, &amax)?;
            nvfp4(x, &amax.f_mul(&g.f_mul_scalar(f64::from(sixth))?)?, &g, format.rounding)
        }
    }
}

/// G, f32 [] on the device: to read it back would stop the chain.
fn encode_scale(range: f32, amax: &Tensor) -> Result<Tensor> {
    let largest = amax.f_max()?;
    Ok(largest.f_full_like(f64::from(range))?.f_div(&largest)?)
}

/// 2^k from amax = f 2^e, 1/2 <= f < 1: k = e - 1 - emax, one more by rule; `largest` is f of the element's maximum.
fn mx_scale(amax: &Tensor, rule: MxScaleRule, emax: i64, largest: f64) -> Result<Tensor> {
    let (fraction, exponent) = amax.f_frexp()?;
    let k = exponent.f_sub_scalar(1 + emax)?;
    let k = match rule {
        MxScaleRule::Floor => k,
        MxScaleRule::Even => k.f_add(&fraction.f_ge(0.875)?)?,
        MxScaleRule::Rceil => k.f_add(&fraction.f_gt(largest)?)?,
    };
    Ok(amax.f_ones_like()?.f_ldexp(&k.f_clamp(-127, 127)?)?)
}

/// Under G, with E4M3 block scales near `target` [blocks, 1].
fn nvfp4(x: &Tensor, target: &Tensor, g: &Tensor, rounding: Rounding) -> Result<Tensor> {
    let scale = target.f_clamp_max(448.0)?.f_to_kind(Kind::Float8e4m3fn)?.f_to_kind(Kind::Float)?;
    let decode = scale.f_mul(&g.f_reciprocal()?)?;
    let encode = decode.f_reciprocal()?.f_clamp_max(f64::from(f32::MAX))?;
    let encode = encode.f_masked_fill(&scale.f_eq(0.0)?, 0.0)?;
    Ok(to_e2m1(&x.f_mul(&encode)?, rounding)?.f_mul(&decode)?)
}

/// To the E2M1 grid: multiples of a step, on which torch's `round` takes ties to even.
fn to_e2m1(scaled: &Tensor, rounding: Rounding) -> Result<Tensor> {
    let a = scaled.f_abs()?.f_clamp_max(6.0)?;
    let step = a.f_ge(2.0)?.f_to_kind(Kind::Float)?.f_add(&a.f_ge(4.0)?)?.f_sub_scalar(1.0)?.f_exp2()?;
    Ok(to_steps(&a, &step, rounding)?.f_clamp_max(6.0)?.f_copysign(scaled)?)
}

/// To the E4M3 grid: torch's cast, which takes ties to even.
fn to_e4m3(scaled: &Tensor, rounding: Rounding) -> Result<Tensor> {
    if !rounding.is_stochastic() {
        return Ok(scaled.f_clamp(-448.0, 448.0)?.f_to_kind(Kind::Float8e4m3fn)?.f_to_kind(Kind::Float)?);
    }
    let a = scaled.f_abs()?.f_clamp_max(448.0)?;
    let (_, exponent) = a.f_frexp()?;
    let step = a.f_ones_like()?.f_ldexp(&exponent.f_clamp_min(-5)?.f_sub_scalar(4)?)?;
    Ok(to_steps(&a, &step, rounding)?.f_clamp_max(448.0)?.f_copysign(scaled)?)
}

/// A multiple of the step of every element.
fn to_steps(a: &Tensor, step: &Tensor, rounding: Rounding) -> Result<Tensor> {
    let steps = a.f_div(step)?;
    let rounded = match rounding {
        Rounding::NearestEven => steps.f_round()?,
        Rounding::HalfAway => {
            let floor = steps.f_floor()?;
            floor.f_add(&steps.f_sub(&floor)?.f_ge(0.5)?)?
        }
        Rounding::Stochastic16 | Rounding::Stochastic8 => steps.f_add(&steps.f_rand_like()?)?.f_floor()?,
    };
    Ok(rounded.f_mul(step)?)
}
