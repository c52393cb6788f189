//! Causal grouped-query attention with rotary position embedding.
//!
//! Rows are flattened tokens without padding.

use tch::{Kind, Tensor};

use super::config::Qwen2Config;
use super::kv_cache::{DecodeStep, KvCache, Places};
use super::linear::Linear;
use super::linear_input::LinearInput;
use super::pass::Pass;
use crate::Result;
use crate::ops::packed_attention::Packing;

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

    /// x [tokens, heads, head_dim] rotated, in f32, one rounding to x's dtype.
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let x32 = x.f_to_kind(Kind::Float)?;
        let halves = x32.f_chunk(2, -1)?;
        let rotated = Tensor::f_cat(&[&halves[1].f_neg()?, &halves[0]], -1)?;
        let y = x32.f_mul(&self.cos)?.f_add(&rotated.f_mul(&self.sin)?)?;
        Ok(y.f_to_kind(x.kind())?)
    }
}

/// How one pass attends.
pub enum Attend<'a> {
    /// Whole sequences; their keys and values may be stored at places of a cache.
    Full { packing: &'a Packing, store: Option<(&'a KvCache, &'a Places)> },
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
        let q = rotary.apply(&self.q_proj.forward_shared(&input, pass)?.f_view([-1, heads, dim])?)?;
        let k = rotary.apply(&self.k_proj.forward_shared(&input, pass)?.f_view([-1, kv_heads, dim])?)?;
        let v = self.v_proj.forward_shared(&input, pass)?.f_view([-1, kv_heads, dim])?;
        let scale = 1.0 / (dim as f64).sqrt();
        let out = match attend {
            Attend::Full { packing, store } => {
                if let Some((cache, places)) = store {
                    cache.store(layer, &k, &v, places)?;
                }
                packing.attention(&q, &k, &v, scale)?
            }
            Attend::Decode { cache, step } => {
                let (k, v) = cache.append(layer, &k, &v, step)?;
                // The query heads of one kv head stand as rows of one small attention problem.
                let q = q.f_view([-1, kv_heads, heads / kv_heads, dim])?;
                let out =
                    Tensor::f_scaled_dot_product_attention(&q, &k, &v, Some(step.mask()), 0.0, false, scale, false)?;
                out.f_reshape([-1, heads * dim])?
            }
        };
        self.o_proj.forward(&out, pass)
    }
}
