//! Batched generation: rows on the device, a look at what has ended every few tokens, prompts that follow as rows come free.
//!
//! Between two looks nothing waits for the device: the tokens just sampled, their positions and keys are tensors there. A row
//! whose sequence has ended computes on until the next look, and nobody reads it; a free row computes as position 0 of nothing.

use tch::{Device, Tensor};

use super::rows::Rows;
use super::{Completion, Prompt, Request};
use crate::Result;
use crate::model::attention::Attend;
use crate::model::kv_cache::{DecodeStep, KvCache, Places};
use crate::model::pass::{Pass, Sequence, ids_tensor};
use crate::model::qwen2::Qwen2;
use crate::ops::matmul_error::RowKeys;
use crate::ops::packed_attention::Packing;
use crate::ops::sampling::{SamplingRule, sample};

/// Prompt tokens of one pass: enough to fill a GPU, and few enough that what they compute stays small.
const PREFILL_TOKENS: usize = 16384;

pub fn run(model: &Qwen2, request: &Request, pass: &Pass, mut progress: impl FnMut(usize)) -> Result<Vec<Completion>> {
    let mut rows = Rows::new(request);
    if rows.len() == 0 {
        return Ok(Vec::new());
    }
    let on_cpu = model.device() == Device::Cpu;
    let check_every = request.batching.check_every.unwrap_or(if on_cpu { 1 } else { 8 }).max(1);
    let longest_prompt = request.prompts.iter().map(|prompt| prompt.ids.len()).max().unwrap_or(0);
    let mut engine = Engine {
        model,
        pass,
        rule: request.sampling.rule()?,
        cache: KvCache::new(&model.config, rows.len(), longest_prompt + check_every, model.kind(), model.device())?,
        state: State::of(&rows, model.device())?,
        unread: Vec::new(),
        measure_norms: pass.measure_norms,
    };
    while !rows.finished() {
        let begun = rows.begin();
        if begun.is_empty() {
            for _ in 0..check_every {
                engine.decode()?;
            }
        } else {
            engine.prefill(&begun)?;
        }
        let mut ended = 0;
        for (row, id, logprob) in engine.look()? {
            ended += usize::from(rows.push(row, id, logprob)?);
        }
        progress(ended);
        let kept = rows.compact();
        if let Some(kept) = &kept {
            engine.keep(kept)?;
        }
        if ended > 0 || kept.is_some() || !begun.is_empty() {
            engine.state = State::of(&rows, model.device())?;
        }
    }
    Ok(rows.into_completions())
}

/// The newest token of every row.
struct State {
    ids: Tensor,       // i64 [rows]
    positions: Tensor, // i64 [rows]
    keys: Tensor,      // i64 [rows]: the bits of the token keys
    /// The most tokens that a row has.
    longest: usize,
}

impl State {
    fn of(rows: &Rows, device: Device) -> Result<State> {
        let (mut ids, mut positions, mut keys, mut longest) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for row in 0..rows.len() {
            let (id, position, key) = match rows.of(row) {
                Some(active) => {
                    let sequence = &active.completion.sequence;
                    let position = sequence.ids.len() - 1;
                    (sequence.ids[position], position, sequence.key(position)?)
                }
                None => (0, 0, 0),
            };
            ids.push(i64::from(id));
            positions.push(position as i64);
            keys.push(key as i64);
            longest = longest.max(position + 1);
        }
        let upload = |values: &[i64]| -> Result<Tensor> { Ok(Tensor::f_from_slice(values)?.f_to_device(device)?) };
        Ok(State { ids: upload(&ids)?, positions: upload(&positions)?, keys: upload(&keys)?, longest })
    }
}

struct Engine<'a> {
    model: &'a Qwen2,
    pass: &'a Pass<'a>,
    rule: SamplingRule,
    cache: KvCache,
    state: State,
    unread: Vec<Sampled>,
    /// Norms are measured in the first pass alone.
    measure_norms: bool,
}

/// Tokens on the device, one of each of `rows`.
struct Sampled {
    rows: Vec<usize>,
    ids: Tensor,      // i64 [rows]
    logprobs: Tensor, // f32 [rows]
}

impl Engine<'_> {
    /// Computes each prompt once, stores it in the rows of its members and samples their first tokens.
    fn prefill(&mut self, begun: &[(&Prompt, Vec<usize>)]) -> Result<()> {
        let mut rest = begun;
        while !rest.is_empty() {
            let mut tokens = 0;
            let fit = rest.iter().take_while(|(prompt, _)| {
                tokens += prompt.ids.len();
                tokens <= PREFILL_TOKENS
            });
            let (now, later) = rest.split_at(fit.count().max(1));
            self.prefill_pass(now)?;
            rest = later;
        }
        Ok(())
    }

    fn prefill_pass(&mut self, begun: &[(&Prompt, Vec<usize>)]) -> Result<()> {
        let (model, device) = (self.model, self.model.device());
        let (mut ids, mut positions, mut keys) = (Vec::new(), Vec::new(), Vec::new());
        let (mut last, mut lengths) = (Vec::new(), Vec::new());
        let (mut rows, mut prompt_of_row, mut first_keys) = (Vec::new(), Vec::new(), Vec::new());
        for (number, (prompt, members)) in begun.iter().enumerate() {
            let sequence = |member| Sequence { uid: prompt.uid, member, ids: Vec::new(), prompt_len: prompt.ids.len() };
            ids.extend_from_slice(&prompt.ids);
            positions.extend((0..prompt.ids.len()).map(|p| p as i64));
            for position in 0..prompt.ids.len() {
                keys.push(sequence(0).key(position)?);
            }
            last.push(ids.len() - 1);
            lengths.push(prompt.ids.len());
            for (member, &row) in members.iter().enumerate() {
                rows.push(row);
                prompt_of_row.push(number);
                first_keys.push(sequence(member as u32).key(prompt.ids.len())? as i64);
            }
        }
        let keys = RowKeys::new(keys);
        let measure_norms = std::mem::take(&mut self.measure_norms);
        let head_pass = Pass { measure_norms, ..self.pass.with_keys(keys.select(&last)) };
        let pass = Pass { measure_norms, ..self.pass.with_keys(keys) };
        let places = Places::new(&rows, &prompt_of_row, &lengths, device)?;
        let attend = Attend::Full { packing: &Packing::new(&lengths, device)?, store: Some((&self.cache, &places)) };
        let index = |values: &[usize]| -> Result<Tensor> {
            let values: Vec<i64> = values.iter().map(|&v| v as i64).collect();
            Ok(Tensor::f_from_slice(&values)?.f_to_device(device)?)
        };
        let positions = Tensor::f_from_slice(&positions)?.f_to_device(device)?;
        let residual = model.residual(&ids_tensor(&ids, device)?, &positions, &attend, &pass)?;
        let hidden = model.norm.forward(&residual.f_index_select(0, &index(&last)?)?, &head_pass)?;
        let logits = model.head.logits(model.head_weight(), &hidden, &head_pass)?;
        let logits = logits.f_index_select(0, &index(&prompt_of_row)?)?;
        let first_keys = Tensor::f_from_slice(&first_keys)?.f_to_device(device)?;
        let (ids, logprobs) = sample(&logits, &first_keys, &self.rule)?;
        self.unread.push(Sampled { rows, ids, logprobs });
        Ok(())
    }

    /// The next token of every row.
    fn decode(&mut self) -> Result<()> {
        let (model, state) = (self.model, &mut self.state);
        self.cache.reserve(state.longest)?;
        let step = DecodeStep::new(&state.positions, state.longest)?;
        let pass = Pass { measure_norms: false, ..self.pass.with_keys(RowKeys::of_tensor(&state.keys)) };
        let attend = Attend::Decode { cache: &self.cache, step: &step };
        let residual = model.residual(&state.ids, step.positions(), &attend, &pass)?;
        let hidden = model.norm.forward(&residual, &pass)?;
        let logits = model.head.logits(model.head_weight(), &hidden, &pass)?;
        // Positions are the keys' lowest bits.
        state.keys = state.keys.f_add_scalar(1)?;
        state.positions = state.positions.f_add_scalar(1)?;
        state.longest += 1;
        let (ids, logprobs) = sample(&logits, &state.keys, &self.rule)?;
        state.ids = ids.shallow_clone();
        self.unread.push(Sampled { rows: (0..ids.size()[0] as usize).collect(), ids, logprobs });
        Ok(())
    }

    /// Waits for the device: (row, token, log-probability) of all that was sampled since the last look, in its order.
    fn look(&mut self) -> Result<Vec<(usize, u32, f32)>> {
        let unread = std::mem::take(&mut self.unread);
        let together =
            |tensors: Vec<&Tensor>| -> Result<Tensor> { Ok(Tensor::f_cat(&tensors, 0)?.f_to_device(Device::Cpu)?) };
        let ids = Vec::<i64>::try_from(together(unread.iter().map(|s| &s.ids).collect())?)?;
        let logprobs = Vec::<f32>::try_from(together(unread.iter().map(|s| &s.logprobs).collect())?)?;
        let rows = unread.into_iter().flat_map(|sampled| sampled.rows);
        Ok(rows.zip(ids).zip(logprobs).map(|((row, id), logprob)| (row, id as u32, logprob)).collect())
    }

    /// Keeps the rows that are at work.
    fn keep(&mut self, rows: &[usize]) -> Result<()> {
        let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        self.cache.keep_rows(&Tensor::f_from_slice(&rows)?.f_to_device(self.model.device())?)
    }
}
