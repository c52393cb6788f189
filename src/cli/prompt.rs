//! The input of `generate` and `score`: text or ids, and the model that reads them.

use super::{Global, common};
use crate::model::load::{ModelSource, random_preset};
use crate::model::qwen2::Qwen2;
use crate::model::tokenizer::Tokenizer;
use crate::{Result, bail_input, input_error};

/// A loaded model; the tokenizer only where its directory has one.
pub struct Loaded {
    pub model: Qwen2,
    pub tokenizer: Option<Tokenizer>,
}

/// `base`: of an adapter, where it lies elsewhere. `needs_tokenizer`: text goes in, so its absence is an error.
pub fn load(model: &str, base: Option<&str>, needs_tokenizer: bool, global: &Global) -> Result<Loaded> {
    let device = common::device(global, None)?;
    let source = ModelSource::of(model, base)?;
    let model = source.load_for_inference(device)?;
    let dir = source.home_of("tokenizer.json");
    let has_tokenizer = dir.join("tokenizer.json").exists();
    let tokenizer = match needs_tokenizer || has_tokenizer {
        true => Some(Tokenizer::from_dir(dir)?.with_model_vocab_size(model.config.vocab_size)?),
        false => None,
    };
    Ok(Loaded { model, tokenizer })
}

/// Random weights of a preset, without tokenizer.
pub fn of_preset(name: &str, seed: u64, global: &Global) -> Result<Loaded> {
    let device = common::device(global, None)?;
    Ok(Loaded { model: random_preset(name, seed, device)?, tokenizer: None })
}

/// Ids of `--ids 1,2,3`, checked against the model's vocabulary.
pub fn parse_ids(text: &str, vocab_size: usize) -> Result<Vec<u32>> {
    let ids = text
        .split(',')
        .map(|part| {
            let part = part.trim();
            part.parse::<u32>().map_err(|_| input_error!("--ids: found {part:?}, expected token ids such as 1,2,3"))
        })
        .collect::<Result<Vec<u32>>>()?;
    check_ids(&ids, vocab_size)?;
    Ok(ids)
}

pub fn check_ids(ids: &[u32], vocab_size: usize) -> Result<()> {
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
        bail_input!("--ids: found {id}, expected ids below the model's vocab_size ({vocab_size})");
    }
    Ok(())
}

/// Errors when `tokens` positions do not fit the model.
pub fn check_length(tokens: usize, model: &Qwen2) -> Result<()> {
    let limit = model.config.max_position_embeddings;
    if tokens > limit {
        bail_input!("found {tokens} tokens, expected at most {limit} (the model's max_position_embeddings)");
    }
    Ok(())
}
