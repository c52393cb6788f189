//! The definition of generation: a sequence by itself, all of it computed again for every token.

use tch::{Device, Tensor};

use super::{Completion, Request};
use crate::Result;
use crate::model::attention::Attend;
use crate::model::pass::{Pass, Sequence, ids_tensor};
use crate::model::qwen2::Qwen2;
use crate::ops::matmul_error::RowKeys;
use crate::ops::packed_attention::Packing;
use crate::ops::sampling::sample;

pub fn run(model: &Qwen2, request: &Request, pass: &Pass, mut progress: impl FnMut(usize)) -> Result<Vec<Completion>> {
    let rule = request.sampling.rule()?;
    let mut done: Vec<Completion> = Vec::with_capacity(request.sequences());
    for prompt in request.prompts {
        for member in 0..request.group_size {
            let mut completion = Completion::new(prompt, member);
            let limit = request.limit(done.len());
            loop {
                let first = done.is_empty() && completion.logprobs.is_empty();
                let logits = last_logits(model, &completion.sequence, pass, first)?;
                let key = completion.sequence.key(completion.sequence.ids.len())?;
                let key = Tensor::f_from_slice(&[key as i64])?.f_to_device(model.device())?;
                let (id, logprob) = sample(&logits, &key, &rule)?;
                let id = i64::try_from(id.f_to_device(Device::Cpu)?)? as u32;
                let logprob = f32::try_from(logprob.f_to_device(Device::Cpu)?)?;
                if completion.push(id, logprob, limit, request.stop_ids)? {
                    break;
                }
            }
            done.push(completion);
            progress(1);
        }
    }
    Ok(done)
}

/// f32 [1, vocab]: logits after the last token.
fn last_logits(model: &Qwen2, sequence: &Sequence, pass: &Pass, first: bool) -> Result<Tensor> {
    let (device, tokens) = (model.device(), sequence.ids.len());
    let keys = RowKeys::new(sequence.keys()?);
    let measure_norms = pass.measure_norms && first;
    let last_pass = Pass { measure_norms, ..pass.with_keys(keys.narrow(tokens - 1, 1)) };
    let pass = Pass { measure_norms, ..pass.with_keys(keys) };
    let positions = Tensor::f_arange(tokens as i64, (tch::Kind::Int64, device))?;
    let attend = Attend::Full { packing: &Packing::new(&[tokens], device)?, store: None };
    let residual = model.residual(&ids_tensor(&sequence.ids, device)?, &positions, &attend, &pass)?;
    let hidden = model.norm.forward(&residual.f_narrow(0, tokens as i64 - 1, 1)?, &last_pass)?;
    model.head.logits(model.head_weight(), &hidden, &last_pass)
}
