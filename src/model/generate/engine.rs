//! Batched generation: rows on the device, a look at what has ended every few tokens, prompts that follow as rows come free.
//!
//! Between two looks nothing waits for the device: the tokens just sampled, their positions and keys are tensors there. A row
//! whose sequence has ended computes on until the next look, and nobody reads it; a free row computes position 0 of nothing.

use tch::{Device, Kind, Tensor};

use super::rows::Rows;
use super::{Completion, Prompt, Request};
use crate::model::attention::Attend;
use crate::model::kv_cache::{DecodeStep, KvCache, Places};
use crate::model::pass::{Pass, Sequence, ids_tensor, rows_tensor};
use crate::model::qwen2::Qwen2;
use crate::ops::cuda::torch_graph::TorchGraph;
use crate::ops::matmul_error::RowKeys;
use crate::ops::packed_attention::Packing;
use crate::ops::profile::span;
use crate::ops::sampling::{SamplingRule, sample};
use crate::{Error, Result};

/// Prompt tokens of one pass: enough to fill a GPU, and few enough that what they compute stays small.
pub const PREFILL_TOKENS: usize = 16384;

pub fn run(model: &Qwen2, request: &Request, pass: &Pass, mut progress: impl FnMut(usize)) -> Result<Vec<Completion>> {
    let mut rows = Rows::new(request, model.device().is_cuda());
    if rows.len() == 0 {
        return Ok(Vec::new());
    }
    let on_cpu = model.device() == Device::Cpu;
    let check_every = request.batching.check_every.unwrap_or(if on_cpu { 1 } else { 8 }).max(1);
    let longest_prompt = request.prompts.iter().map(|prompt| prompt.ids.len()).max().unwrap_or(0);
    let mut engine = Engine {
        request,
        model,
        pass,
        rule: request.sampling.rule()?,
        cache: KvCache::new(&model.config, rows.len(), longest_prompt + check_every, model.kind(), model.device())?,
        state: State::new(&Newest::of(&rows)?, check_every, model.device())?,
        measure_norms: pass.measure_norms,
        graph: if request.batching.enforce_eager || TorchGraph::has_failed() { Replay::Never } else { Replay::Cold },
    };
    while !rows.finished() {
        let begun = rows.begin();
        let tokens = if begun.is_empty() {
            for _ in 0..check_every {
                engine.decode()?;
            }
            engine.look(check_every)?
        } else {
            engine.prefill(&begun)?
        };
        let mut ended = 0;
        for (row, id, logprob) in tokens {
            ended += usize::from(rows.push(row, id, logprob)?);
        }
        progress(ended);
        let kept = rows.compact();
        if let Some(kept) = &kept {
            engine.keep(kept)?;
        }
        if ended > 0 || kept.is_some() || !begun.is_empty() {
            let newest = Newest::of(&rows)?;
            match kept {
                Some(_) => engine.state = State::new(&newest, check_every, model.device())?,
                None => engine.state.assign(&newest)?,
            }
        }
    }
    Ok(rows.into_completions())
}

type Token = (usize, u32, f32);

/// (row, token, log-probability) of `rows` and what was sampled for them: i64 [rows], f32 [rows], on the CPU.
fn tokens(rows: impl IntoIterator<Item = usize>, (ids, logprobs): (Tensor, Tensor)) -> Result<Vec<Token>> {
    let (ids, logprobs) = (Vec::<i64>::try_from(ids)?, Vec::<f32>::try_from(logprobs)?);
    Ok(rows.into_iter().zip(ids).zip(logprobs).map(|((row, id), logprob)| (row, id as u32, logprob)).collect())
}

/// The newest token of every row, and what has been sampled since the last look. The tensors stay where they are while tokens
/// are computed, so that a step can be a CUDA graph.
struct State {
    ids: Tensor,       // i64 [rows]
    positions: Tensor, // i64 [rows]
    keys: Tensor,      // i64 [rows]: the bits of the token keys
    /// The most tokens that a row has.
    longest: usize,
    sampled_ids: Tensor,      // i64 [check_every, rows]
    sampled_logprobs: Tensor, // f32 [check_every, rows]
    written: Tensor,          // i64 [1]: rows of these two that are there
}

/// The values of a state, from the rows on the host.
struct Newest {
    ids: Vec<i64>,
    positions: Vec<i64>,
    keys: Vec<i64>,
    longest: usize,
}

impl Newest {
    fn of(rows: &Rows) -> Result<Newest> {
        let mut newest = Newest { ids: Vec::new(), positions: Vec::new(), keys: Vec::new(), longest: 0 };
        for row in 0..rows.len() {
            let (id, position, key) = match rows.of(row) {
                Some(active) => {
                    let sequence = &active.completion.sequence;
                    let position = sequence.ids.len() - 1;
                    (sequence.ids[position], position, sequence.key(position)?)
                }
                None => (0, 0, rows.free_key(row)),
            };
            newest.ids.push(i64::from(id));
            newest.positions.push(position as i64);
            newest.keys.push(key as i64);
            newest.longest = newest.longest.max(position + 1);
        }
        Ok(newest)
    }
}

impl State {
    fn new(newest: &Newest, check_every: usize, device: Device) -> Result<State> {
        let upload = |values: &[i64]| -> Result<Tensor> { Ok(Tensor::f_from_slice(values)?.f_to_device(device)?) };
        let shape = [check_every as i64, newest.ids.len() as i64];
        Ok(State {
            ids: upload(&newest.ids)?,
            positions: upload(&newest.positions)?,
            keys: upload(&newest.keys)?,
            longest: newest.longest,
            sampled_ids: Tensor::f_zeros(shape, (Kind::Int64, device))?,
            sampled_logprobs: Tensor::f_zeros(shape, (Kind::Float, device))?,
            written: Tensor::f_zeros([1], (Kind::Int64, device))?,
        })
    }

    /// Takes the values of as many rows, and leaves the tensors where they are.
    fn assign(&mut self, newest: &Newest) -> Result<()> {
        self.ids.f_copy_(&Tensor::f_from_slice(&newest.ids)?)?;
        self.positions.f_copy_(&Tensor::f_from_slice(&newest.positions)?)?;
        self.keys.f_copy_(&Tensor::f_from_slice(&newest.keys)?)?;
        self.longest = newest.longest;
        Ok(())
    }
}

/// A decode step as a CUDA graph: one call for its hundreds of launches.
enum Replay {
    Never,
    /// The step has not run with the tensors that there are now.
    Cold,
    /// It has run once: all kernels are loaded.
    Warm,
    Captured(TorchGraph),
}

struct Engine<'a> {
    request: &'a Request<'a>,
    model: &'a Qwen2,
    pass: &'a Pass<'a>,
    rule: SamplingRule,
    cache: KvCache,
    state: State,
    /// Norms are measured in the first pass alone.
    measure_norms: bool,
    graph: Replay,
}

impl Engine<'_> {
    /// Computes each prompt once, stores it in the rows of its members and samples their first tokens.
    fn prefill(&mut self, begun: &[(&Prompt, Vec<usize>)]) -> Result<Vec<Token>> {
        let (mut rest, mut tokens_of_rows) = (begun, Vec::new());
        while !rest.is_empty() {
            let mut tokens = 0;
            let fit = rest.iter().take_while(|(prompt, _)| {
                tokens += prompt.ids.len();
                tokens <= PREFILL_TOKENS
            });
            let (now, later) = rest.split_at(fit.count().max(1));
            tokens_of_rows.extend(self.prefill_pass(now)?);
            rest = later;
        }
        Ok(tokens_of_rows)
    }

    fn prefill_pass(&mut self, begun: &[(&Prompt, Vec<usize>)]) -> Result<Vec<Token>> {
        let _span = span("prefill");
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
        let positions = Tensor::f_from_slice(&positions)?.f_to_device(device)?;
        let residual = model.residual(&ids_tensor(&ids, device)?, &positions, &attend, &pass)?;
        let hidden = model.norm.forward(&residual.f_index_select(0, &rows_tensor(&last, device)?)?, &head_pass)?;
        let logits = model.head.logits(model.head_weight(), &hidden, &head_pass)?;
        let logits = logits.f_index_select(0, &rows_tensor(&prompt_of_row, device)?)?;
        let first_keys = Tensor::f_from_slice(&first_keys)?.f_to_device(device)?;
        let (ids, logprobs) = sample(&logits, &first_keys, &self.rule)?;
        tokens(rows, (ids.f_to_device(Device::Cpu)?, logprobs.f_to_device(Device::Cpu)?))
    }

    /// The next token of every row.
    fn decode(&mut self) -> Result<()> {
        let _span = span("decode");
        if self.cache.reserve(self.state.longest)? {
            self.tensors_moved();
        }
        // What is or will be a graph has the same launches every time, whatever the lengths.
        match (&self.graph, self.model.device()) {
            (Replay::Captured(graph), _) => {
                graph.replay()?;
                self.pass.injector.iter().for_each(|injector| injector.count_replay(self.pass.phase));
            }
            (Replay::Warm, Device::Cuda(index)) => self.capture(index)?,
            (Replay::Cold, Device::Cuda(_)) => {
                self.step(self.cache.capacity())?;
                self.graph = Replay::Warm;
            }
            _ => self.step(self.state.longest)?,
        }
        self.state.longest += 1;
        Ok(())
    }

    /// Captures the step and does it; where that fails it is said, and done without.
    fn capture(&mut self, index: usize) -> Result<()> {
        let capacity = self.cache.capacity();
        match TorchGraph::capture(index, &mut || self.step(capacity)) {
            // The capture has counted the step's products, and run none of them.
            Ok(graph) => {
                graph.replay()?;
                self.graph = Replay::Captured(graph);
                Ok(())
            }
            Err(Error::OutOfMemory(message)) => Err(Error::OutOfMemory(message)),
            Err(error) => {
                (self.request.warn)(&format!("decoding without CUDA graphs: {error}"));
                self.graph = Replay::Never;
                self.step(self.state.longest)
            }
        }
    }

    fn tensors_moved(&mut self) {
        if !matches!(self.graph, Replay::Never) {
            self.graph = Replay::Cold;
        }
    }

    /// What a token takes on the device; no row sees more than `longest` positions.
    fn step(&mut self, longest: usize) -> Result<()> {
        let (model, state) = (self.model, &mut self.state);
        let step = DecodeStep::new(&state.positions, longest)?;
        let pass = Pass { measure_norms: false, ..self.pass.with_keys(RowKeys::of_tensor(&state.keys)) };
        let attend = Attend::Decode { cache: &self.cache, step: &step };
        let residual = model.residual(&state.ids, step.positions(), &attend, &pass)?;
        let hidden = model.norm.forward(&residual, &pass)?;
        let logits = model.head.logits(model.head_weight(), &hidden, &pass)?;
        // Positions are the keys' lowest bits.
        let _ = state.keys.f_add_scalar_(1)?;
        let _ = state.positions.f_add_scalar_(1)?;
        let (ids, logprobs) = sample(&logits, &state.keys, &self.rule)?;
        state.ids.f_copy_(&ids)?;
        let _ = state.sampled_ids.f_index_copy_(0, &state.written, &ids.f_unsqueeze(0)?)?;
        let _ = state.sampled_logprobs.f_index_copy_(0, &state.written, &logprobs.f_unsqueeze(0)?)?;
        let _ = state.written.f_add_scalar_(1)?;
        Ok(())
    }

    /// Waits for the device: (row, token, log-probability) of the `steps` tokens since the last look, in their order.
    fn look(&mut self, steps: usize) -> Result<Vec<Token>> {
        let _span = span("look");
        let state = &mut self.state;
        let _ = state.written.f_zero_()?;
        let rows = state.ids.size()[0] as usize;
        let read = |of: &Tensor| -> Result<Tensor> {
            Ok(of.f_narrow(0, 0, steps as i64)?.f_to_device(Device::Cpu)?.f_reshape([-1])?)
        };
        let sampled = (read(&state.sampled_ids)?, read(&state.sampled_logprobs)?);
        tokens((0..steps).flat_map(|_| 0..rows), sampled)
    }

    /// Keeps the rows that are at work.
    fn keep(&mut self, rows: &[usize]) -> Result<()> {
        self.tensors_moved();
        self.cache.keep_rows(&rows_tensor(rows, self.model.device())?)
    }
}
