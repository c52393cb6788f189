//! Attention of one new token a sequence to its cached keys and values, grouped queries to their one key head.
//!
//! out[r, h] = softmax over i < lengths[r] of (scale q[r, h] . k[r, h / group, i]), times v[r, h / group, i]. Shapes: q [rows,
//! heads, dim]; keys, values [rows, kv_heads, capacity, dim]; lengths i64 [rows]; out [rows, heads * dim]; f32, bf16 or f16. No
//! gradient. On CUDA no launch depends on lengths, only on `longest`, an upper bound that the host knows: a graph may hold it.

use tch::{Kind, Tensor};

use super::cuda::decode_attention as cuda;
use super::cuda::place::Place;
use crate::Result;

/// # Errors
/// `Runtime` for shapes and dtypes that do not fit.
pub fn decode_attention(
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    lengths: &Tensor,
    longest: i64,
    scale: f64,
) -> Result<Tensor> {
    match Place::of(q) {
        Some(place) if cuda::is_supported(q.size().last().copied().unwrap_or(0)) => {
            let q = q.f_contiguous()?;
            let heads = cuda::Heads { q: &q, keys, values, lengths, longest, scale: scale as f32 };
            cuda::decode_attention(&place, &heads)
        }
        _ => definition(q, keys, values, lengths, longest, scale),
    }
}

/// The same by torch's attention, masked.
///
/// # Errors
/// Torch's, for shapes that do not fit.
pub fn definition(
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    lengths: &Tensor,
    longest: i64,
    scale: f64,
) -> Result<Tensor> {
    let ((rows, heads, dim), (_, kv_heads, _, _)) = (q.size3()?, keys.size4()?);
    let (keys, values) = (keys.f_narrow(2, 0, longest)?, values.f_narrow(2, 0, longest)?);
    let places = Tensor::f_arange(longest, (Kind::Int64, q.device()))?;
    let mask = places.f_unsqueeze(0)?.f_lt_tensor(&lengths.f_unsqueeze(1)?)?.f_view([rows, 1, 1, longest])?;
    // The query heads of one kv head stand as rows of one small attention problem.
    let q = q.f_view([rows, kv_heads, heads / kv_heads, dim])?;
    let out = Tensor::f_scaled_dot_product_attention(&q, &keys, &values, Some(&mask), 0.0, false, scale, false)?;
    Ok(out.f_reshape([rows, heads * dim])?)
}
