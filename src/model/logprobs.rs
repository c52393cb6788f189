//! Log-probabilities of response tokens under the model, over a micro-batch of whole sequences.

use tch::{Device, Tensor};

use super::attention::Attend;
use super::pass::{Pass, PromptUid, Sequence, ids_tensor, rows_tensor};
use super::qwen2::Qwen2;
use super::recompute::Recompute;
use crate::Result;
use crate::ops::matmul_error::RowKeys;
use crate::ops::packed_attention::Packing;
use crate::ops::token_logprobs::TokenLogprobs;

/// f32 [response tokens of all sequences, in order]: log-probability of each response token given those before it,
/// at `temperature`, and the entropy of its distribution. `pass.keys` is ignored: the keys are the sequences' own.
pub fn response_logprobs(
    model: &Qwen2,
    sequences: &[&Sequence],
    temperature: f64,
    pass: &Pass,
) -> Result<TokenLogprobs> {
    let rows = Rows::new(model, sequences)?;
    let body = pass.with_keys(rows.keys.clone());
    let attend = Attend::Full { packing: &rows.packing, store: None };
    let residual = model.residual(&rows.ids, &rows.positions, &attend, &body)?;
    rows.read_out(model, &residual, temperature, pass)
}

/// As [`response_logprobs`], for a backward pass that computes the blocks again instead of keeping what is inside them.
pub fn recomputed_logprobs<'a>(
    model: &'a Qwen2,
    sequences: &[&Sequence],
    temperature: f64,
    pass: &Pass<'a>,
) -> Result<(TokenLogprobs, Recompute<'a>)> {
    let rows = Rows::new(model, sequences)?;
    let body = pass.with_keys(rows.keys.clone());
    let packing = Packing::new(&rows.lengths, model.device())?;
    let (ids, positions) = (rows.ids.shallow_clone(), rows.positions.shallow_clone());
    let recompute = Recompute::forward(model, ids, positions, packing, body)?;
    Ok((rows.read_out(model, recompute.residual(), temperature, pass)?, recompute))
}

/// The tokens of whole sequences, one after the other without padding, and which of them predict a response's.
struct Rows {
    ids: Tensor,       // i64 [tokens]
    positions: Tensor, // i64 [tokens]
    keys: RowKeys,     // [tokens]
    lengths: Vec<usize>,
    packing: Packing,
    predicting: Vec<usize>,
    targets: Tensor, // i64 [predicting]
}

impl Rows {
    fn new(model: &Qwen2, sequences: &[&Sequence]) -> Result<Rows> {
        let (mut ids, mut positions, mut keys) = (Vec::new(), Vec::new(), Vec::new());
        let (mut lengths, mut predicting, mut targets) = (Vec::new(), Vec::new(), Vec::new());
        for sequence in sequences {
            // The last token predicts nothing that is asked for.
            let length = sequence.ids.len() - 1;
            let first_row = ids.len();
            ids.extend_from_slice(&sequence.ids[..length]);
            positions.extend((0..length).map(|p| p as i64));
            for p in 0..length {
                keys.push(sequence.key(p)?);
            }
            predicting.extend((sequence.prompt_len - 1..length).map(|p| first_row + p));
            targets.extend_from_slice(sequence.response());
            lengths.push(length);
        }
        let device = model.device();
        Ok(Rows {
            ids: ids_tensor(&ids, device)?,
            positions: Tensor::f_from_slice(&positions)?.f_to_device(device)?,
            keys: RowKeys::new(keys),
            packing: Packing::new(&lengths, device)?,
            lengths,
            predicting,
            targets: ids_tensor(&targets, device)?,
        })
    }

    /// Final norm and head on the rows that predict.
    fn read_out(&self, model: &Qwen2, residual: &Tensor, temperature: f64, pass: &Pass) -> Result<TokenLogprobs> {
        let head_pass = pass.with_keys(self.keys.select(&self.predicting));
        let rows = rows_tensor(&self.predicting, model.device())?;
        let hidden = model.norm.forward(&residual.f_index_select(0, &rows)?, &head_pass)?;
        model.head.token_logprobs(model.head_weight(), &hidden, &self.targets, temperature, &head_pass)
    }
}

/// Log-probability of ids[i + 1] given ids[..= i], nothing injected: ids.len() - 1 values.
pub fn token_logprobs(model: &Qwen2, ids: &[u32]) -> Result<Vec<f32>> {
    let _no_grad = tch::no_grad_guard();
    let uid = PromptUid { step: 0, dataset_index: 0 };
    let sequence = Sequence { uid, member: 0, ids: ids.to_vec(), prompt_len: 1 };
    let logprobs = response_logprobs(model, &[&sequence], 1.0, &Pass::clean(RowKeys::new(Vec::new())))?.logprobs;
    Ok(Vec::<f32>::try_from(logprobs.f_to_device(Device::Cpu)?)?)
}
