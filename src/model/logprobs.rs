//! Log-probabilities of response tokens under the model, over a micro-batch of whole sequences.

use tch::{Device, Tensor};

use super::attention::{Attend, PaddedLayout};
use super::pass::{Pass, PromptUid, Sequence, ids_tensor};
use super::qwen2::Qwen2;
use crate::Result;
use crate::ops::matmul_error::RowKeys;
use crate::ops::token_logprobs::TokenLogprobs;

/// f32 [response tokens of all sequences, in order]: log-probability of each response token given those before it,
/// at `temperature`, and the entropy of its distribution. `pass.keys` is ignored: the keys are the sequences' own.
pub fn response_logprobs(
    model: &Qwen2,
    sequences: &[&Sequence],
    temperature: f64,
    pass: &Pass,
) -> Result<TokenLogprobs> {
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
    let keys = RowKeys::new(keys);
    let head_pass = pass.with_keys(keys.select(&predicting));
    let pass = pass.with_keys(keys);
    let layout = PaddedLayout::new(&lengths, device)?;
    let attend = Attend::Full { layout: &layout, cache: None };
    let positions = Tensor::f_from_slice(&positions)?.f_to_device(device)?;
    let residual = model.residual(&ids_tensor(&ids, device)?, &positions, &attend, &pass)?;
    let rows: Vec<i64> = predicting.iter().map(|&r| r as i64).collect();
    let rows = Tensor::f_from_slice(&rows)?.f_to_device(device)?;
    let hidden = model.norm.forward(&residual.f_index_select(0, &rows)?, &head_pass)?;
    let targets = ids_tensor(&targets, device)?;
    model.head.token_logprobs(model.head_weight(), &hidden, &targets, temperature, &head_pass)
}

/// Log-probability of ids[i + 1] given ids[..= i], nothing injected: ids.len() - 1 values.
pub fn token_logprobs(model: &Qwen2, ids: &[u32]) -> Result<Vec<f32>> {
    let _no_grad = tch::no_grad_guard();
    let uid = PromptUid { step: 0, dataset_index: 0 };
    let sequence = Sequence { uid, member: 0, ids: ids.to_vec(), prompt_len: 1 };
    let logprobs = response_logprobs(model, &[&sequence], 1.0, &Pass::clean(RowKeys::new(Vec::new())))?.logprobs;
    Ok(Vec::<f32>::try_from(logprobs.f_to_device(Device::Cpu)?)?)
}
