//! Causal attention within each of several sequences that lie one after the other, without padding:
//! out[t] = softmax(scale q[t] . k[s..=t]) v[s..=t], where s is the row at which t's sequence begins.
//!
//! On a GPU in 16 bits: FlashAttention over all sequences at once. Elsewhere the sequences of equal length are one batched
//! product, so nothing is computed that is not wanted either.
//!
//! Shapes: q [tokens, heads, dim], k and v [tokens, kv_heads, dim]; query head h reads kv head h / (heads / kv_heads).

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::autograd::flash::flash_attention;
use crate::Result;

/// FlashAttention-2's limit on head_dim.
const FLASH_HEAD_DIM: i64 = 256;

/// Where each sequence's rows lie.
pub struct Packing {
    tokens: i64,
    longest: i64,
    starts: Option<Tensor>, // i32 [sequences + 1], on a GPU
    groups: Vec<Group>,
    /// Of each row its place in the groups' rows one after the other; None: the same. i64 [tokens]
    places: Option<Tensor>,
}

/// The sequences of one length.
struct Group {
    length: i64,
    sequences: i64,
    first_row: i64,
    rows: Option<Tensor>, // i64 [sequences * length]; None: consecutive from the first
}

impl Packing {
    /// `lengths`: of each sequence, at least 1.
    pub fn new(lengths: &[usize], device: Device) -> Result<Packing> {
        let mut starts = vec![0i64];
        let mut by_length: BTreeMap<usize, Vec<i64>> = BTreeMap::new();
        for &length in lengths {
            let start = starts[starts.len() - 1];
            by_length.entry(length).or_default().push(start);
            starts.push(start + length as i64);
        }
        let tokens = starts[starts.len() - 1];
        let longest = by_length.last_key_value().map_or(0, |(&length, _)| length as i64);
        let (mut groups, mut order) = (Vec::new(), Vec::with_capacity(tokens as usize));
        for (length, group) in by_length {
            let begin = order.len();
            order.extend(group.iter().flat_map(|&start| start..start + length as i64));
            let rows = &order[begin..];
            let consecutive = rows.windows(2).all(|pair| pair[1] == pair[0] + 1);
            groups.push(Group {
                length: length as i64,
                sequences: group.len() as i64,
                first_row: group[0],
                rows: if consecutive { None } else { Some(Tensor::f_from_slice(rows)?.f_to_device(device)?) },
            });
        }
        let mut places = vec![0i64; order.len()];
        order.iter().enumerate().for_each(|(place, &row)| places[row as usize] = place as i64);
        let in_order = places.iter().enumerate().all(|(row, &place)| row as i64 == place);
        let starts = match device {
            Device::Cuda(_) => Some(Tensor::f_from_slice(&starts)?.f_to_kind(Kind::Int)?.f_to_device(device)?),
            _ => None,
        };
        let places = if in_order { None } else { Some(Tensor::f_from_slice(&places)?.f_to_device(device)?) };
        Ok(Packing { tokens, longest, starts, groups, places })
    }

    /// Rows of all sequences.
    pub fn tokens(&self) -> i64 {
        self.tokens
    }

    /// -> [tokens, heads * dim].
    pub fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Tensor> {
        let (tokens, heads, dim) = q.size3()?;
        let out = match &self.starts {
            Some(starts) if q.kind() != Kind::Float && dim % 8 == 0 && dim <= FLASH_HEAD_DIM => {
                flash_attention(q, k, v, starts, self.longest, scale)?
            }
            _ => self.by_length(q, k, v, scale)?,
        };
        Ok(out.f_reshape([tokens, heads * dim])?)
    }

    /// The sequences of each length as a batch: [tokens, heads, dim].
    pub fn by_length(&self, q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Tensor> {
        let (_, heads, dim) = q.size3()?;
        let outs = self.groups.iter().map(|group| {
            let (q, k, v) = (group.batch(q, heads)?, group.batch(k, heads)?, group.batch(v, heads)?);
            let none: Option<&Tensor> = None;
            let out = Tensor::f_scaled_dot_product_attention(&q, &k, &v, none, 0.0, true, scale, false)?;
            Ok(out.f_transpose(1, 2)?.f_reshape([group.sequences * group.length, heads, dim])?)
        });
        let mut outs = outs.collect::<Result<Vec<Tensor>>>()?;
        let out = if outs.len() == 1 { outs.remove(0) } else { Tensor::f_cat(&outs, 0)? };
        match &self.places {
            Some(places) => Ok(out.f_index_select(0, places)?),
            None => Ok(out),
        }
    }
}

impl Group {
    /// [tokens, some heads, dim] -> [sequences, heads, length, dim], each kv head repeated for its query heads.
    fn batch(&self, x: &Tensor, heads: i64) -> Result<Tensor> {
        let (_, some, dim) = x.size3()?;
        let x = match &self.rows {
            Some(rows) => x.f_index_select(0, rows)?,
            None => x.f_narrow(0, self.first_row, self.sequences * self.length)?,
        };
        let x = x.f_view([self.sequences, self.length, some, dim])?.f_transpose(1, 2)?;
        if some == heads {
            return Ok(x);
        }
        let shape = [self.sequences, some, heads / some, self.length, dim];
        Ok(x.f_unsqueeze(2)?.f_expand(shape, false)?.f_reshape([self.sequences, heads, self.length, dim])?)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The formula, sequence by sequence in f64.
    fn plain(q: &Tensor, k: &Tensor, v: &Tensor, lengths: &[usize], scale: f64) -> Tensor {
        let (_, heads, _) = q.size3().unwrap();
        let repeat = heads / k.size()[1];
        let mut start = 0;
        let outs: Vec<Tensor> = lengths
            .iter()
            .map(|&length| {
                let length = length as i64;
                let part = |x: &Tensor| x.narrow(0, start, length).transpose(0, 1).to_kind(Kind::Double);
                let (q, k, v) = (
                    part(q),
                    part(k).repeat_interleave_self_int(repeat, 0, None),
                    part(v).repeat_interleave_self_int(repeat, 0, None),
                );
                start += length;
                let later = Tensor::ones([length, length], (Kind::Bool, Device::Cpu)).triu(1);
                let scores = (q.matmul(&k.transpose(1, 2)) * scale).masked_fill(&later, f64::NEG_INFINITY);
                scores.softmax(-1, Kind::Double).matmul(&v).transpose(0, 1).to_kind(Kind::Float)
            })
            .collect();
        Tensor::cat(&outs, 0)
    }

    #[test]
    fn values_and_gradients_are_the_formulas_for_any_mixture_of_lengths() {
        for lengths in [&[5usize][..], &[3, 3, 3], &[4, 1, 7, 4, 40, 1], &[2, 9, 9, 2], &[6, 6, 1]] {
            let tokens = lengths.iter().sum::<usize>() as i64;
            let new =
                |heads: i64| Tensor::randn([tokens, heads, 8], (Kind::Float, Device::Cpu)).set_requires_grad(true);
            let (q, k, v, g) = (new(6), new(2), new(2), new(6).detach());
            let packing = Packing::new(lengths, Device::Cpu).unwrap();
            let gradients = |out: Tensor| {
                (out.view([tokens, 6, 8]) * &g).sum(Kind::Float).backward();
                [&q, &k, &v].map(|x| {
                    let mut gradient = x.grad();
                    let copy = gradient.copy();
                    let _ = gradient.zero_();
                    copy
                })
            };
            let (got, want) = (packing.attention(&q, &k, &v, 0.3).unwrap(), plain(&q, &k, &v, lengths, 0.3));
            let far = |a: &Tensor, b: &Tensor| f64::try_from((a - b).abs().max()).unwrap();
            assert!(far(&got.view([tokens, 6, 8]), &want) < 2e-6, "{lengths:?}");
            for (got, want) in gradients(got).iter().zip(&gradients(want)) {
                assert!(far(got, want) < 5e-6, "{lengths:?}");
            }
        }
    }

    /// The bits of a sequence do not depend on its neighbours.
    #[test]
    fn a_sequence_alone_gives_the_same_bits() {
        let lengths = [4usize, 17, 4, 33];
        let new = |heads: i64| Tensor::randn([58, heads, 16], (Kind::Float, Device::Cpu));
        let (q, k, v) = (new(4), new(2), new(2));
        let together = Packing::new(&lengths, Device::Cpu).unwrap().attention(&q, &k, &v, 0.25).unwrap();
        let mut start = 0;
        for length in lengths {
            let part = |x: &Tensor| x.narrow(0, start, length as i64);
            let alone = Packing::new(&[length], Device::Cpu).unwrap();
            let alone = alone.attention(&part(&q), &part(&k), &part(&v), 0.25).unwrap();
            assert!(alone.equal(&part(&together)));
            start += length as i64;
        }
    }

    /// What is only for GPUs is there, and says so.
    #[test]
    fn flash_attention_on_a_cpu_is_an_error() {
        let x = Tensor::ones([4, 2, 8], (Kind::BFloat16, Device::Cpu));
        let starts = Tensor::from_slice(&[0i32, 1, 4]);
        let error = flash_attention(&x, &x, &x, &starts, 3, 1.0).unwrap_err().to_string();
        assert!(error.starts_with("libtorch: ") && error.contains("_flash_attention_forward"), "{error}");
    }
}
