//! Causal grouped-query attention with rotary position embedding.
//!
//! Rows are flattened tokens without padding; a full pass pads them to [sequences, length] for the attention product
//! alone. Padding is on the right, so the causal mask already hides it and no row is ever fully masked.

use tch::{Device, Kind, Tensor};

use super::config::Qwen2Config;
use super::kv_cache::{DecodeStep, KvCache};
use super::linear::Linear;
use super::linear_input::LinearInput;
use super::pass::Pass;
use crate::{Result, ops};

pub struct Attention {
    pub q_proj: Linear,
    pub k_proj: Linear,
    pub v_proj: Linear,
    pub o_proj: Linear,
}

/// cos and sin of every row's rotation, f32 [tokens, 1, head_dim].
pub struct Rotary {
    cos: Tensor,
    sin: Tensor,
}

impl Rotary {
    /// theta^(-2i/d) * position, in f32 as transformers computes it. `positions` i64 [tokens].
    pub fn new(config: &Qwen2Config, positions: &Tensor) -> Result<Rotary> {
        let (device, dim) = (positions.device(), config.head_dim as i64);
        let exponent = Tensor::f_arange_start_step(0, dim, 2, (Kind::Float, device))?.f_div_scalar(dim as f64)?;
        let theta = Tensor::f_full([1], config.rope_theta, (Kind::Float, device))?;
        let inverse_frequency = theta.f_pow(&exponent)?.f_reciprocal()?;
        let angle = positions.f_to_kind(Kind::Float)?.f_unsqueeze(1)?.f_mul(&inverse_frequency)?;
        let angle = Tensor::f_cat(&[&angle, &angle], 1)?.f_unsqueeze(1)?;
        Ok(Rotary { cos: angle.f_cos()?, sin: angle.f_sin()? })
    }
}

/// Where the rows of several sequences lie in a right-padded [sequences, length] arrangement.
pub struct PaddedLayout {
    pub sequences: i64,
    pub length: i64,
    to_padded: Option<Tensor>, // i64 [sequences * length]: row of each place (padding repeats a row)
    to_flat: Option<Tensor>,   // i64 [tokens]: place of each row
}

impl PaddedLayout {
    pub fn new(lengths: &[usize], device: Device) -> Result<PaddedLayout> {
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let mut layout =
            PaddedLayout { sequences: lengths.len() as i64, length: longest as i64, to_padded: None, to_flat: None };
        if lengths.iter().any(|&l| l != longest) {
            let (mut to_padded, mut to_flat, mut row) = (Vec::new(), Vec::new(), 0i64);
            for (s, &length) in lengths.iter().enumerate() {
                for p in 0..longest {
                    to_padded.push(row + (p.min(length - 1)) as i64);
                }
                to_flat.extend((0..length).map(|p| (s * longest + p) as i64));
                row += length as i64;
            }
            layout.to_padded = Some(Tensor::f_from_slice(&to_padded)?.f_to_device(device)?);
            layout.to_flat = Some(Tensor::f_from_slice(&to_flat)?.f_to_device(device)?);
        }
        Ok(layout)
    }

    /// [tokens, heads, dim] -> [sequences, heads, length, dim].
    fn pad(&self, x: &Tensor) -> Result<Tensor> {
        let (_, heads, dim) = x.size3()?;
        let x = match &self.to_padded {
            Some(index) => x.f_index_select(0, index)?,
            None => x.shallow_clone(),
        };
        Ok(x.f_view([self.sequences, self.length, heads, dim])?.f_transpose(1, 2)?)
    }

    /// [sequences, heads, length, dim] -> [tokens, heads * dim].
    fn flatten(&self, x: &Tensor) -> Result<Tensor> {
        let (_, heads, _, dim) = x.size4()?;
        let x = x.f_transpose(1, 2)?.f_reshape([self.sequences * self.length, heads * dim])?;
        match &self.to_flat {
            Some(index) => Ok(x.f_index_select(0, index)?),
            None => Ok(x),
        }
    }
}

/// How one pass attends.
pub enum Attend<'a> {
    /// Whole sequences; with a cache, their keys and values are stored in it.
    Full { layout: &'a PaddedLayout, cache: Option<&'a KvCache> },
    /// One new token per sequence, against the cache.
    Decode { cache: &'a KvCache, step: &'a DecodeStep },
}

impl Attention {
    /// x [tokens, hidden] -> [tokens, hidden].
    pub fn forward(
        &self,
        layer: usize,
        x: &Tensor,
        config: &Qwen2Config,
        rotary: &Rotary,
        attend: &Attend,
        pass: &Pass,
    ) -> Result<Tensor> {
        let (heads, kv_heads) = (config.num_attention_heads as i64, config.num_key_value_heads as i64);
        let dim = config.head_dim as i64;
        let input = LinearInput::new(x);
        let q = self.q_proj.forward_shared(&input, pass)?.f_view([-1, heads, dim])?;
        let k = self.k_proj.forward_shared(&input, pass)?.f_view([-1, kv_heads, dim])?;
        let (q, k) = ops::rotary::rotary(&q, &k, &rotary.cos, &rotary.sin)?;
        let v = self.v_proj.forward_shared(&input, pass)?.f_view([-1, kv_heads, dim])?;
        let scale = 1.0 / (dim as f64).sqrt();
        let out = match attend {
            Attend::Full { layout, cache } => {
                let (q, k, v) = (layout.pad(&q)?, layout.pad(&k)?, layout.pad(&v)?);
                if let Some(cache) = cache {
                    cache.store_prefill(layer, &k, &v)?;
                }
                let (k, v) = (repeat_kv(&k, heads)?, repeat_kv(&v, heads)?);
                let none: Option<&Tensor> = None;
                layout.flatten(&Tensor::f_scaled_dot_product_attention(&q, &k, &v, none, 0.0, true, scale, false)?)?
            }
            Attend::Decode { cache, step } => {
                let (k, v) = cache.append(layer, &k, &v, step)?;
                ops::decode_attention::decode_attention(&q, &k, &v, step.lengths(), step.longest(), scale)?
            }
        };
        self.o_proj.forward(&out, pass)
    }
}

/// [b, kv_heads, length, dim] -> [b, heads, length, dim], each kv head repeated for its query heads.
fn repeat_kv(x: &Tensor, heads: i64) -> Result<Tensor> {
    let (b, kv_heads, length, dim) = x.size4()?;
    if kv_heads == heads {
        return Ok(x.shallow_clone());
    }
    let repeat = heads / kv_heads;
    let x = x.f_unsqueeze(2)?.f_expand([b, kv_heads, repeat, length, dim], false)?;
    Ok(x.f_reshape([b, heads, length, dim])?)
}
