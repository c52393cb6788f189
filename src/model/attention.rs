//! Causal grouped-query attention with rotary position embedding.
//!
//! Rows are flattened tokens without padding.

use tch::{Kind, Tensor};

use super::config::Qwen2Config;
use super::kv_cache::{DecodeStep, KvCache, Places};
use super::linear::Linear;
use super::linear_input::LinearInput;
use super::pass::Pass;
use crate::ops::packed_attention::Packing;
use crate::ops::rotary::Append;
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
        let [q, k, v] = Linear::forward_each([&self.q_proj, &self.k_proj, &self.v_proj], [&input; 3], pass)?;
        let (q, k) = (q.f_view([-1, heads, dim])?, k.f_view([-1, kv_heads, dim])?);
        let v = v.f_view([-1, kv_heads, dim])?;
        let Rotary { cos, sin } = rotary;
        let scale = 1.0 / (dim as f64).sqrt();
        let out = match attend {
            Attend::Full { packing, store } => {
                let (q, k) = ops::rotary::rotary(&q, &k, cos, sin)?;
                if let Some((cache, places)) = store {
                    cache.store(layer, &k, &v, places)?;
                }
                packing.attention(&q, &k, &v, scale)?
            }
            Attend::Decode { cache, step } => {
                let (keys, values) = cache.of_layer(layer);
                let append = Append { v: &v, keys: &keys, values: &values, positions: step.positions() };
                let q = ops::rotary::rotary_and_append(&q, &k, cos, sin, &append)?;
                ops::decode_attention::decode_attention(&q, &keys, &values, step.lengths(), step.longest(), scale)?
            }
        };
        self.o_proj.forward(&out, pass)
    }
}
