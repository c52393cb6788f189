//! Faults that are planted at a layer's output h [tokens, hidden], to see whether they are found (numerics.md section 6):
//!
//!   deadzone  |h| < s max|h| becomes 0            clip   |h| is held at its quantile 1 - s
//!   bias      h + s std(h)                        noise  h + s |h| z
//!   spikes    with probability s an element is +-10 max|h|
//!
//! in all channels, or in a tenth of them; maximum, quantile and std are of those channels.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::prompts::normals_like;
use crate::Result;
use crate::numerics::generator::uniform_f32;
use crate::numerics::noise_key::{Phase, Purpose, row_key, stream};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    Deadzone,
    Clip,
    Bias,
    Noise,
    Spikes,
}

impl FaultKind {
    pub const ALL: [FaultKind; 5] =
        [FaultKind::Deadzone, FaultKind::Clip, FaultKind::Bias, FaultKind::Noise, FaultKind::Spikes];

    /// s of numerics.md.
    pub fn severity(self) -> f64 {
        match self {
            FaultKind::Deadzone | FaultKind::Clip => 0.01,
            FaultKind::Bias => 0.1,
            FaultKind::Noise => 0.05,
            FaultKind::Spikes => 1e-3,
        }
    }
}

/// What a spike is, over the largest magnitude.
const SPIKE: f64 = 10.0;
/// Of the channels, where a fault is sparse.
const SPARSE: f64 = 0.1;

#[derive(Clone, Copy, Debug)]
pub struct Planted {
    pub kind: FaultKind,
    pub severity: f64,
    pub layer: usize,
    pub sparse: bool,
    /// Of the channels, and of what is random.
    pub seed: u64,
}

impl Planted {
    /// h with the fault; `run` tells one execution, and one prompt, from another: noise and spikes are new in each.
    pub fn apply(&self, h: &Tensor, run: u32) -> Result<Tensor> {
        let channels = self.channels(h.size()[1])?.f_to_device(h.device())?;
        let part = h.f_index_select(1, &channels)?.f_to_kind(Kind::Float)?;
        let magnitude = part.f_abs()?;
        let largest = f64::try_from(magnitude.f_max()?)?;
        let s = self.severity;
        let faulty = match self.kind {
            FaultKind::Deadzone => part.f_masked_fill(&magnitude.f_lt(s * largest)?, 0.0)?,
            FaultKind::Clip => {
                let limit =
                    f64::try_from(magnitude.f_flatten(0, -1)?.f_quantile_scalar(1.0 - s, None, false, "linear")?)?;
                part.f_clamp(-limit, limit)?
            }
            FaultKind::Bias => part.f_add_scalar(s * f64::try_from(part.f_std(false)?)?)?,
            FaultKind::Noise => part.f_add(&magnitude.f_mul(&self.normals(&part, run)?)?.f_mul_scalar(s)?)?,
            FaultKind::Spikes => {
                // A normal number beyond the quantile s / 2 on either side is a spike of its sign.
                let z = self.normals(&part, run)?;
                let limit = f64::try_from(Tensor::from(1.0 - s).f_erfinv()?)? * std::f64::consts::SQRT_2;
                let spikes = z.f_sign()?.f_mul_scalar(SPIKE * largest)?;
                part.f_where_self(&z.f_abs()?.f_le(limit)?, &spikes)?
            }
        };
        Ok(h.f_index_copy(1, &channels, &faulty.f_to_kind(h.kind())?)?)
    }

    /// i64, ascending.
    fn channels(&self, hidden: i64) -> Result<Tensor> {
        let stream = stream(Purpose::Other, Phase::Shared, 1, self.layer as u32)?;
        let mut order: Vec<i64> = (0..hidden).collect();
        if self.sparse {
            let draw = |c: &i64| uniform_f32(self.seed, stream, row_key(0, *c as u32));
            order.sort_by(|a, b| draw(a).total_cmp(&draw(b)));
            order.truncate(((hidden as f64 * SPARSE).round() as usize).max(1));
            order.sort_unstable();
        }
        Ok(Tensor::f_from_slice(&order)?)
    }

    fn normals(&self, like: &Tensor, run: u32) -> Result<Tensor> {
        let stream = stream(Purpose::Other, Phase::Shared, 2, self.layer as u32)?;
        normals_like(like, (self.seed, stream), run)
    }
}
