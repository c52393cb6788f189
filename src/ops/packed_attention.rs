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
    longest: i64,
    starts: Option<Tensor>, // i32 [sequences + 1], on a GPU
    groups: Vec<Group>,
    by_length: Option<Order>, // None: the rows lie in the groups' order
}

/// The sequences of one length.
struct Group {
    length: i64,
    sequences: i64,
}

/// The rows of the groups one after the other, and back.
struct Order {
    rows: Tensor,   // i64 [tokens]: which row stands at each place
    places: Tensor, // i64 [tokens]: at which place each row stands
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
        let upload = |values: &[i64]| -> Result<Tensor> { Ok(Tensor::f_from_slice(values)?.f_to_device(device)?) };
        let longest = by_length.last_key_value().map_or(0, |(&length, _)| length as i64);
        let (mut groups, mut rows) = (Vec::new(), Vec::new());
        for (length, group) in by_length {
            groups.push(Group { length: length as i64, sequences: group.len() as i64 });
            rows.extend(group.iter().flat_map(|&start| start..start + length as i64));
        }
        let mut places = vec![0i64; rows.len()];
        rows.iter().enumerate().for_each(|(place, &row)| places[row as usize] = place as i64);
        let order = match rows.is_sorted() {
            true => None,
            false => Some(Order { rows: upload(&rows)?, places: upload(&places)? }),
        };
        let starts = match device {
            Device::Cuda(_) => Some(upload(&starts)?.f_to_kind(Kind::Int)?),
            _ => None,
        };
        Ok(Packing { longest, starts, groups, by_length: order })
    }

    /// -> [tokens, heads * dim].
    pub fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Tensor> {
        let (tokens, heads, dim) = q.size3()?;
        let out = match &self.starts {
            Some(starts) if q.kind() != Kind::Float && dim % 8 == 0 && dim <= FLASH_HEAD_DIM => {
                flash_attention(q, k, v, starts, self.longest, scale)?
            }
            _ => self.in_batches(q, k, v, scale)?,
        };
        Ok(out.f_reshape([tokens, heads * dim])?)
    }

    /// The sequences of each length as a batch: [tokens, heads, dim].
    fn in_batches(&self, q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Tensor> {
        let (_, heads, dim) = q.size3()?;
        let sizes: Vec<i64> = self.groups.iter().map(|group| group.sequences * group.length).collect();
        let split = |x: &Tensor| -> Result<Vec<Tensor>> {
            let x = match &self.by_length {
                Some(order) => x.f_index_select(0, &order.rows)?,
                None => x.shallow_clone(),
            };
            Ok(x.f_split_with_sizes(&sizes, 0)?)
        };
        let (q, k, v) = (split(q)?, split(k)?, split(v)?);
        let outs = self.groups.iter().zip(&q).zip(k.iter().zip(&v)).map(|((group, q), (k, v))| {
            let (q, k, v) = (group.batch(q, heads)?, group.batch(k, heads)?, group.batch(v, heads)?);
            let none: Option<&Tensor> = None;
            let out = Tensor::f_scaled_dot_product_attention(&q, &k, &v, none, 0.0, true, scale, false)?;
            Ok(out.f_transpose(1, 2)?.f_reshape([group.sequences * group.length, heads, dim])?)
        });
        let mut outs = outs.collect::<Result<Vec<Tensor>>>()?;
        let out = if outs.len() == 1 { outs.remove(0) } else { Tensor::f_cat(&outs, 0)? };
        match &self.by_length {
            Some(order) => Ok(out.f_index_select(0, &order.places)?),
            None => Ok(out),
        }
    }
}

impl Group {
    /// The group's rows [rows, some heads, dim] -> [sequences, heads, length, dim], each kv head repeated for its query heads.
    fn batch(&self, x: &Tensor, heads: i64) -> Result<Tensor> {
        let (_, some, dim) = x.size3()?;
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
