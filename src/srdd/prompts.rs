//! The prompts of a scan, a forward pass over one, and normals of a tensor's shape.

use std::path::Path;

use tch::Tensor;

use crate::model::attention::{Attend, Rotary};
use crate::model::pass::{Pass, ids_tensor};
use crate::model::qwen2::Qwen2;
use crate::model::tokenizer::Tokenizer;
use crate::numerics::generator::uniform_f32;
use crate::numerics::noise_key::{Phase, Purpose, VALIDATION_STEP, row_key, stream, token_key};
use crate::ops::cpu::normals::normals_into;
use crate::ops::matmul_error::RowKeys;
use crate::ops::packed_attention::Packing;
use crate::{Error, Result, bail_input, input_error};

/// What is scanned without `--prompts`.
const BUILT_IN: [&str; 8] = [
    "A farmer has 17 cows and buys 8 more. He then sells a third of them. How many cows does he have left?",
    "The train leaves the station at nine in the morning and reaches the coast, 240 kilometres away, at noon.",
    "def mean(values):\n    return sum(values) / len(values)\n\nprint(mean([3, 5, 10]))",
    "Once upon a time a little fox lived at the edge of a dark forest. One day it found a shiny stone.",
    "Water boils at 100 degrees Celsius at sea level; on a mountain the pressure is lower, and it boils sooner.",
    "Maria reads 12 pages an hour. The book has 300 pages and she has read 48. How many hours are left? Answer: 21.",
    "Translate into French: The weather is fine today, and we are going to the market to buy apples.",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144",
];

/// Tokens of a prompt without tokenizer.
const RANDOM_TOKENS: usize = 64;
const MOST_TOKENS: usize = 1024;

pub struct Prompts {
    /// Of each prompt.
    pub ids: Vec<Vec<u32>>,
    /// Where they come from.
    pub source: String,
}

/// The prompts of a file's lines, else built-in texts. Without a tokenizer lines are ids (`1,2,3`); without one that knows the
/// built-in texts (a made task's does not) these are random ids, the same every time.
///
/// # Errors
/// `Input` naming the file and line.
pub fn prompts(file: Option<&Path>, tokenizer: Option<&Tokenizer>, model: &Qwen2) -> Result<Prompts> {
    let longest = model.config.max_position_embeddings.min(MOST_TOKENS);
    let Some(path) = file else {
        let of_text = |text: &&str| tokenizer.and_then(|tokenizer| tokenizer.encode(text).ok());
        let encoded: Option<Vec<Vec<u32>>> = BUILT_IN.iter().map(of_text).collect();
        let source = if encoded.is_some() { "built-in texts" } else { "random ids" };
        let all = encoded.map_or_else(|| random_ids(model.config.vocab_size, BUILT_IN.len()), Ok)?;
        let ids = all.into_iter().map(|ids| ids.into_iter().take(longest).collect()).collect();
        return Ok(Prompts { ids, source: source.to_string() });
    };
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let prompt = |(number, line): (usize, &str)| -> Result<Vec<u32>> {
        let place = || format!("{}: line {}", path.display(), number + 1);
        let ids: Vec<u32> = match tokenizer {
            Some(tokenizer) => tokenizer.encode(line)?,
            None => {
                let ids = line.split(',').map(|id| id.trim().parse());
                ids.collect::<std::result::Result<_, _>>().map_err(|_| {
                    input_error!("{}: found {line:?}, expected ids such as 1,2,3 (the model has no tokenizer)", place())
                })?
            }
        };
        if let Some(id) = ids.iter().find(|&&id| id as usize >= model.config.vocab_size) {
            bail_input!("{}: found id {id}, expected ids below {}", place(), model.config.vocab_size);
        }
        if ids.len() < 2 || ids.len() > longest {
            bail_input!("{}: found {} tokens, expected 2 to {longest}", place(), ids.len());
        }
        Ok(ids)
    };
    let all = lines.map(prompt).collect::<Result<Vec<_>>>()?;
    if all.is_empty() {
        bail_input!("{}: found no prompt, expected one a line", path.display());
    }
    Ok(Prompts { ids: all, source: path.display().to_string() })
}

fn random_ids(vocab_size: usize, count: usize) -> Result<Vec<Vec<u32>>> {
    let stream = stream(Purpose::Other, Phase::Validation, 0, 0)?;
    let id = |prompt: usize, position: usize| {
        let u = uniform_f32(0, stream, row_key(prompt as u32, position as u32));
        ((f64::from(u) * vocab_size as f64) as u32).min(vocab_size as u32 - 1)
    };
    Ok((0..count).map(|prompt| (0..RANDOM_TOKENS).map(|position| id(prompt, position)).collect()).collect())
}

/// f32 normals of the shape of x [rows, columns], of (seed, stream); another `counter` gives others.
pub fn normals_like(x: &Tensor, (seed, stream): (u64, u32), counter: u32) -> Result<Tensor> {
    let (rows, columns) = x.size2()?;
    let mut values = vec![0f32; (rows * columns) as usize];
    for (row, values) in values.chunks_mut(columns as usize).enumerate() {
        normals_into(seed, stream, row_key(counter, row as u32), values);
    }
    Ok(Tensor::f_from_slice(&values)?.f_view([rows, columns])?.f_to_device(x.device())?)
}

/// A prompt laid out for a model.
pub struct Laid {
    pub ids: Tensor,       // i64 [tokens]
    pub positions: Tensor, // i64 [tokens]
    number: u32,
    packing: Packing,
    pub rotary: Rotary,
}

impl Laid {
    /// `number`: which of the prompts it is, part of its noise's keys.
    pub fn new(ids: &[u32], number: usize, model: &Qwen2) -> Result<Laid> {
        let positions: Vec<i64> = (0..ids.len() as i64).collect();
        let positions = Tensor::f_from_slice(&positions)?.f_to_device(model.device())?;
        Ok(Laid {
            ids: ids_tensor(ids, model.device())?,
            rotary: Rotary::new(&model.config, &positions)?,
            positions,
            number: number as u32,
            packing: Packing::new(&[ids.len()], model.device())?,
        })
    }

    /// The tokens' keys [tokens] in execution `run`: each has noise of its own.
    pub fn keys(&self, run: u32) -> Result<RowKeys> {
        let positions = 0..self.ids.size()[0] as u32;
        let keys = positions.map(|position| token_key(VALIDATION_STEP, self.number, run, position));
        Ok(RowKeys::new(keys.collect::<Result<_>>()?))
    }

    /// A number of this prompt's execution `run`, another one for every prompt.
    pub fn execution(&self, run: u32) -> u32 {
        self.number << 8 | run
    }

    pub fn attend(&self) -> Attend<'_> {
        Attend::Full { packing: &self.packing, store: None }
    }

    /// The residual stream [tokens, hidden] after the last block; `pass.keys` is ignored.
    pub fn residual(&self, model: &Qwen2, pass: &Pass) -> Result<Tensor> {
        model.residual(&self.ids, &self.positions, &self.attend(), &pass.with_keys(self.keys(0)?))
    }

    /// f32 log-probabilities [tokens, vocab] of the next token.
    pub fn logprobs(&self, model: &Qwen2, pass: &Pass) -> Result<Tensor> {
        let residual = self.residual(model, pass)?;
        let pass = pass.with_keys(self.keys(0)?);
        let hidden = model.norm.forward(&residual, &pass)?;
        let logits = model.head.logits(model.head_weight(), &hidden, &pass)?;
        Ok(logits.f_log_softmax(-1, tch::Kind::Float)?)
    }
}
