//! The small operations of a model against the chains of torch's operations on the CPU: rms_norm.cu, swiglu.cu, rotary.cu.
//! Where CPU and GPU add in another order or have another exponential, to the last place of the dtype.

use tch::{Device, Kind, Tensor};

use super::{Check, Compared, HUGE_ELEMENTS, Sizes, enter, inputs};
use crate::Result;
use crate::ops::cuda::launch::Executor;
use crate::ops::cuda::rms_norm::{Norm, NormBackward, backward, forward, is_supported};
use crate::ops::cuda::rotary::{Append, Rotation, rotate, rotate_and_append};
use crate::ops::cuda::swiglu;
use crate::ops::{rms_norm, rotary};

const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];
const EPS: f64 = 1e-6;
/// (tokens, heads, kv_heads, dim).
const HEADS: [(usize, usize, usize, usize); 4] = [(1, 1, 1, 2), (5, 3, 1, 10), (257, 14, 2, 64), (70, 12, 2, 128)];

pub fn checks(executor: &dyn Executor, sizes: &Sizes, checks: &mut Vec<Check>) -> Result<()> {
    let shapes = sizes.small.iter().chain(sizes.large).filter(|shape| shape.0 * shape.1 < HUGE_ELEMENTS);
    for &shape in shapes {
        for kind in KINDS {
            if is_supported(shape.1 as i64) {
                let run = |compared: &mut Compared| norm(executor, shape, kind, compared);
                enter(checks, "rms_norm", "of a sum".into(), kind, shape, run)?;
                let run = |compared: &mut Compared| norm_backward(executor, shape, kind, compared);
                enter(checks, "rms_norm", "of a sum, backward".into(), kind, shape, run)?;
            }
            let run = |compared: &mut Compared| gate(executor, shape, kind, compared);
            enter(checks, "swiglu", "forward and backward".into(), kind, shape, run)?;
        }
    }
    for heads in HEADS {
        for kind in KINDS {
            let shape = (heads.0 * (heads.1 + heads.2), heads.3);
            let run = |compared: &mut Compared| rotation(executor, heads, kind, compared);
            enter(checks, "rotary", "forth and back".into(), kind, shape, run)?;
            let run = |compared: &mut Compared| append(executor, heads, kind, compared);
            enter(checks, "rotary", "into a cache".into(), kind, shape, run)?;
        }
    }
    Ok(())
}

/// Twice the dtype's last place over the value, where bits may differ before the rounding.
fn two_places(kind: Kind) -> f64 {
    match kind {
        Kind::BFloat16 => 2.0 / 128.0,
        Kind::Half => 2.0 / 1024.0,
        _ => 1e-5,
    }
}

/// f16 values below this are subnormal, others hold it for exact zero.
fn smallest(kind: Kind) -> f64 {
    if kind == Kind::Half { 2e-7 } else { 1e-37 }
}

/// Matrices [rows, cols] that differ from each other.
fn matrices<const N: usize>((rows, cols): (usize, usize), kind: Kind) -> Result<[Tensor; N]> {
    let all = inputs((N * rows, cols), kind, false)?;
    let mut parts = [(); N].map(|()| Tensor::new());
    for (number, part) in parts.iter_mut().enumerate() {
        *part = all.f_narrow(0, (number * rows) as i64, rows as i64)?.f_contiguous()?;
    }
    Ok(parts)
}

fn weight(cols: usize) -> Result<Tensor> {
    Ok(inputs((1, cols), Kind::Float, false)?.f_view([cols as i64])?.f_add_scalar(1.0)?)
}

fn norm(executor: &dyn Executor, shape: (usize, usize), kind: Kind, compared: &mut Compared) -> Result<()> {
    let ([x, delta], w) = (matrices::<2>(shape, kind)?, weight(shape.1)?);
    let clean = w.f_add_scalar(1e-3)?;
    let there = |t: &Tensor| t.f_to_device(executor.device());
    let (x_there, delta_there, w_there, clean_there) = (there(&x)?, there(&delta)?, there(&w)?, there(&clean)?);
    let found = forward(
        executor,
        &Norm { x: &x_there, delta: Some(&delta_there), weight: &w_there, clean: Some(&clean_there), eps: EPS as f32 },
    )?;
    let expected = rms_norm::definition(&x, Some(&delta), &w, Some(&clean), EPS)?;
    if let Some(residual) = &found.residual {
        compared.tensors(residual, &expected.residual)?;
    }
    compared.tensors_near(&found.y, &expected.y, two_places(kind), smallest(kind))?;
    if let (Some(found), Some(expected)) = (&found.changed, &expected.changed) {
        // Values that lie on the boundary of two roundings fall on either side.
        let expected = i64::try_from(expected)?;
        compared.near(i64::try_from(found.f_to_device(Device::Cpu)?)? as f64 + 1.0, expected as f64 + 1.0, 0.5);
    }
    Ok(())
}

fn norm_backward(executor: &dyn Executor, shape: (usize, usize), kind: Kind, compared: &mut Compared) -> Result<()> {
    let ([s, dy, ds], w) = (matrices::<3>(shape, kind)?, weight(shape.1)?);
    let there = |t: &Tensor| t.f_to_device(executor.device());
    let (s_there, dy_there, ds_there, w_there) = (there(&s)?, there(&dy)?, there(&ds)?, there(&w)?);
    let back = NormBackward {
        s: &s_there,
        dy: &dy_there,
        ds: Some(&ds_there),
        weight: &w_there,
        eps: EPS as f32,
        wants_dweight: true,
    };
    let found = backward(executor, &back)?;
    let (dx, dw) = backward_chain(&s, &dy, Some(&ds), &w)?;
    let largest = |t: &Tensor| -> Result<f64> { Ok(f64::try_from(t.f_abs()?.f_max()?.f_to_kind(Kind::Double)?)?) };
    compared.tensors_near(&found.dx, &dx, two_places(kind), smallest(kind) + 1e-6 * largest(&dx)?)?;
    if let Some(dweight) = &found.dweight {
        compared.tensors_near(dweight, &dw, 1e-5, 1e-5 * largest(&dw)?)?;
    }
    Ok(())
}

/// (dx, dw) of `rms_norm` as a chain of torch's operations.
pub fn backward_chain(s: &Tensor, dy: &Tensor, ds: Option<&Tensor>, weight: &Tensor) -> Result<(Tensor, Tensor)> {
    let (wide, dy) = (s.f_to_kind(Kind::Float)?, dy.f_to_kind(Kind::Float)?);
    let mean = |t: &Tensor| t.f_mean_dim([-1i64].as_slice(), true, Kind::Float);
    let r = mean(&wide.f_square()?)?.f_add_scalar(EPS)?.f_rsqrt()?;
    let (n, g) = (wide.f_mul(&r)?, dy.f_mul(weight)?);
    let dx = g.f_sub(&n.f_mul(&mean(&g.f_mul(&n)?)?)?)?.f_mul(&r)?;
    let dx = match ds {
        Some(ds) => dx.f_add(ds)?,
        None => dx,
    };
    let dw = dy.f_mul(&n)?.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Float)?;
    Ok((dx.f_to_kind(s.kind())?, dw))
}

fn gate(executor: &dyn Executor, shape: (usize, usize), kind: Kind, compared: &mut Compared) -> Result<()> {
    let [gate, up, dy] = matrices::<3>(shape, kind)?;
    let there = |t: &Tensor| t.f_to_device(executor.device());
    let (gate_there, up_there, dy_there) = (there(&gate)?, there(&up)?, there(&dy)?);
    let y = swiglu::forward(executor, &gate_there, &up_there)?;
    let (dgate, dup) = swiglu::backward(executor, &gate_there, &up_there, &dy_there)?;
    let silu = gate.f_silu()?;
    let expected_dgate = gate.f_silu_backward(&dy.f_mul(&up)?)?;
    compared.tensors_near(&y, &silu.f_mul(&up)?, two_places(kind), smallest(kind))?;
    compared.tensors_near(&dup, &dy.f_mul(&silu)?, two_places(kind), smallest(kind))?;
    // 1 + g (1 - sigma) cancels near g = -1.28.
    let terms = f64::try_from(dy.f_mul(&up)?.f_abs()?.f_max()?.f_to_kind(Kind::Double)?)?;
    compared.tensors_near(&dgate, &expected_dgate, two_places(kind), smallest(kind) + 1e-6 * terms)
}

type Heads = (usize, usize, usize, usize);

/// q, k [tokens, heads, dim], cos and sin.
fn rotated((tokens, heads, kv_heads, dim): Heads, kind: Kind) -> Result<[Tensor; 4]> {
    let values = |heads: usize| -> Result<Tensor> {
        let flat = inputs((tokens, heads * dim), kind, false)?;
        Ok(flat.f_view([tokens as i64, heads as i64, dim as i64])?)
    };
    let half = inputs((tokens, dim / 2), Kind::Float, false)?;
    let angle = Tensor::f_cat(&[&half, &half], 1)?.f_unsqueeze(1)?;
    Ok([values(heads)?, values(kv_heads)?, angle.f_cos()?, angle.f_sin()?])
}

/// Compares to the bit but for a zero's sign, which adding zero makes one.
fn equal_values(compared: &mut Compared, found: &Tensor, expected: &Tensor) -> Result<()> {
    compared.tensors(&found.f_add_scalar(0.0)?, &expected.f_add_scalar(0.0)?)
}

fn rotation(executor: &dyn Executor, heads: Heads, kind: Kind, compared: &mut Compared) -> Result<()> {
    let [q, k, cos, sin] = rotated(heads, kind)?;
    let there = |t: &Tensor| t.f_to_device(executor.device());
    let (q_there, k_there, cos_there, sin_there) = (there(&q)?, there(&k)?, there(&cos)?, there(&sin)?);
    for is_back in [false, true] {
        let rotation = Rotation { q: &q_there, k: &k_there, cos: &cos_there, sin: &sin_there, is_back };
        let (found_q, found_k) = rotate(executor, &rotation)?;
        let sin = if is_back { sin.f_neg()? } else { sin.shallow_clone() };
        equal_values(compared, &found_q, &rotary::definition(&q, &cos, &sin)?)?;
        equal_values(compared, &found_k, &rotary::definition(&k, &cos, &sin)?)?;
    }
    Ok(())
}

fn append(executor: &dyn Executor, heads: Heads, kind: Kind, compared: &mut Compared) -> Result<()> {
    let [q, k, cos, sin] = rotated(heads, kind)?;
    let (tokens, _, kv_heads, dim) = heads;
    let cache = [tokens as i64, kv_heads as i64, tokens as i64 + 3, dim as i64];
    let (keys, values) = (Tensor::f_zeros(cache, (kind, Device::Cpu))?, Tensor::f_zeros(cache, (kind, Device::Cpu))?);
    let positions = Tensor::f_arange(tokens as i64, (Kind::Int64, Device::Cpu))?.f_add_scalar(2)?;
    let v = k.f_neg()?;
    let there = |t: &Tensor| t.copy().f_to_device(executor.device());
    let (q_there, k_there, v_there) = (there(&q)?, there(&k)?, there(&v)?);
    let (cos_there, sin_there) = (there(&cos)?, there(&sin)?);
    let (keys_there, values_there, positions_there) = (there(&keys)?, there(&values)?, there(&positions)?);
    let rotation = Rotation { q: &q_there, k: &k_there, cos: &cos_there, sin: &sin_there, is_back: false };
    let places = Append { v: &v_there, keys: &keys_there, values: &values_there, positions: &positions_there };
    let found = rotate_and_append(executor, &rotation, &places)?;
    let places = Append { v: &v, keys: &keys, values: &values, positions: &positions };
    equal_values(compared, &found, &rotary::rotary_and_append(&q, &k, &cos, &sin, &places)?)?;
    equal_values(compared, &keys_there, &keys)?;
    equal_values(compared, &values_there, &values)
}
