//! Between tokens and their sequences: weights of the aggregation, advantages, means; and what a mask leaves.

use tch::Tensor;

use super::{LossNormalizer, PolicyLossInputs};
use crate::rl::section::Aggregation;
use crate::{Result, bail_input};

/// Replaces what does not count by 0, in value and gradient (a product with the mask would keep a NaN).
pub(super) fn keep(x: &Tensor, counts: Option<&Tensor>) -> Result<Tensor> {
    Ok(match counts {
        Some(counts) => x.f_masked_fill(&counts.f_logical_not()?, 0.0)?,
        None => x.shallow_clone(),
    })
}

/// Weight of each token [T], 0 where the mask is 0; the divisors are formed in f64.
pub(super) fn token_weights(
    inputs: &PolicyLossInputs,
    counts: Option<&Tensor>,
    aggregation: Aggregation,
    normalizer: LossNormalizer,
) -> Result<Tensor> {
    let lengths = inputs.sequence_lengths;
    let mask: Option<Vec<bool>> = counts.map(Vec::<bool>::try_from).transpose()?;
    let total: usize = lengths.iter().sum();
    let mut weights: Vec<f32> = Vec::with_capacity(total);
    let mut counted_total = 0u64;
    for &length in lengths {
        let start = weights.len();
        let is_counted = |i: usize| mask.as_ref().is_none_or(|m| m[start + i]);
        let counted = (0..length).filter(|&i| is_counted(i)).count() as u64;
        counted_total += counted;
        let divisor = match aggregation {
            Aggregation::TokenMean => normalizer.tokens as f64,
            Aggregation::SequenceMean => counted as f64 * normalizer.sequences as f64,
            Aggregation::SumOverLmax => normalizer.sequences as f64 * normalizer.max_response_tokens as f64,
        };
        if counted > 0 && divisor < 1.0 {
            bail_input!("loss normalizer: found a divisor of {divisor} for {aggregation:?}, expected at least 1");
        }
        weights.extend((0..length).map(|i| if is_counted(i) { (1.0 / divisor) as f32 } else { 0.0 }));
    }
    let sequences = lengths.len() as u64;
    if counted_total > normalizer.tokens || sequences > normalizer.sequences {
        bail_input!(
            "loss normalizer: found {} tokens and {} sequences, expected at least the micro-batch's {counted_total} \
             and {sequences} (it counts the whole optimizer batch)",
            normalizer.tokens,
            normalizer.sequences
        );
    }
    let new = inputs.new_logprobs;
    Ok(Tensor::f_from_slice(&weights)?.f_to_kind(new.kind())?.f_to_device(new.device())?)
}

/// Advantages per token [T], from [T] or [sequences].
pub(super) fn spread_advantages(inputs: &PolicyLossInputs, tokens: usize) -> Result<Tensor> {
    let new = inputs.new_logprobs;
    let advantages = inputs.advantages.detach().f_to_kind(new.kind())?.f_to_device(new.device())?;
    if advantages.size() == [tokens as i64] {
        return Ok(advantages);
    }
    let sequence_of: Vec<i64> =
        inputs.sequence_lengths.iter().enumerate().flat_map(|(s, &n)| std::iter::repeat_n(s as i64, n)).collect();
    Ok(advantages.f_index_select(0, &Tensor::f_from_slice(&sequence_of)?.f_to_device(new.device())?)?)
}

/// The mean over each sequence's tokens that count, at each of its tokens [T]; `x` is 0 at the others. Differentiable;
/// sequence by sequence, so that no sum depends on the order of a GPU's threads.
pub(super) fn sequence_means(x: &Tensor, lengths: &[usize], counts: Option<&Tensor>) -> Result<Tensor> {
    let sizes: Vec<i64> = lengths.iter().map(|&n| n as i64).collect();
    let counts = match counts {
        Some(counts) => counts.f_to_kind(x.kind())?,
        None => x.f_detach()?.f_ones_like()?,
    };
    let parts = x.f_split_with_sizes(&sizes[..], 0)?;
    let counts = counts.f_split_with_sizes(&sizes[..], 0)?;
    let mean = |(part, count): (&Tensor, &Tensor)| -> Result<Tensor> {
        let mean = part.f_sum(x.kind())?.f_div(&count.f_sum(x.kind())?.f_clamp_min(1.0)?)?;
        Ok(mean.f_expand_as(part)?)
    };
    let means = parts.iter().zip(&counts).map(mean).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::f_cat(&means, 0)?)
}
