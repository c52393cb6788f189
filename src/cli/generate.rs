//! `temper generate MODEL`: a continuation of a prompt.

use serde_json::json;

use super::{Global, prompt};
use crate::model::generate::{Prompt, Request, Sampling, generate};
use crate::model::pass::{Pass, PromptUid};
use crate::numerics::noise_key::Phase;
use crate::ops::matmul_error::RowKeys;
use crate::{Result, bail_input};

#[derive(clap::Args)]
pub struct Args {
    /// A model directory (or a hub id in the local cache)
    pub model: String,
    /// The base model of an adapter, where it lies elsewhere than adapter_config.json says
    #[arg(long, value_name = "DIR")]
    pub base: Option<String>,
    /// A user turn, rendered in the model's chat template where it has one
    #[arg(long, required_unless_present = "ids", conflicts_with = "ids")]
    pub prompt: Option<String>,
    /// Token ids, comma-separated; needs no tokenizer
    #[arg(long, allow_hyphen_values = true)]
    pub ids: Option<String>,
    #[arg(long, default_value_t = 64)]
    pub max_new_tokens: usize,
    /// The most likely token each time, instead of sampling
    #[arg(long)]
    pub greedy: bool,
    #[arg(long, default_value_t = 1.0)]
    pub temperature: f64,
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f64,
    /// 0: no limit
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Recompute everything for every token (to check the cache)
    #[arg(long)]
    pub no_kv_cache: bool,
    /// Go on past end-of-sequence tokens
    #[arg(long)]
    pub ignore_eos: bool,
}

pub fn run(args: &Args, global: &Global) -> Result<()> {
    check(args)?;
    let loaded = prompt::load(&args.model, args.base.as_deref(), args.prompt.is_some(), global)?;
    let model = &loaded.model;
    let ids = match (&args.ids, &args.prompt, &loaded.tokenizer) {
        (Some(ids), ..) => prompt::parse_ids(ids, model.config.vocab_size)?,
        (None, Some(text), Some(tokenizer)) if tokenizer.has_chat_template() => tokenizer.chat_prompt(text)?,
        (None, Some(text), Some(tokenizer)) => tokenizer.encode(text)?,
        _ => bail_input!("expected --prompt or --ids"),
    };
    if ids.is_empty() {
        bail_input!("found an empty prompt, expected at least one token");
    }
    prompt::check_length(ids.len().saturating_add(args.max_new_tokens), model)?;
    let sampling = Sampling {
        greedy: args.greedy || args.temperature == 0.0,
        temperature: if args.temperature == 0.0 { 1.0 } else { args.temperature },
        top_p: args.top_p,
        top_k: args.top_k,
        seed: args.seed,
        phase: Phase::Validation,
    };
    let prompts = [Prompt { uid: PromptUid { step: 0, dataset_index: 0 }, ids }];
    let stop_ids = if args.ignore_eos { &[][..] } else { &model.config.eos_token_ids[..] };
    let request =
        Request { kv_cache: !args.no_kv_cache, ..Request::new(&prompts, 1, args.max_new_tokens, stop_ids, &sampling) };
    let completions = generate(model, &request, &Pass::clean(RowKeys::new(Vec::new())), |_| {})?;
    let response = completions.first().map_or(&[][..], |c| c.sequence.response());
    let text = loaded.tokenizer.as_ref().map(|t| t.decode(response)).transpose()?;
    if global.json {
        return super::print(json!({"ids": response, "text": text}));
    }
    let ids = || response.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
    super::print(text.unwrap_or_else(ids))
}

fn check(args: &Args) -> Result<()> {
    if !(args.temperature >= 0.0 && args.temperature.is_finite()) {
        bail_input!("--temperature: found {}, expected a number of at least 0", args.temperature);
    }
    if !(args.top_p > 0.0 && args.top_p <= 1.0) {
        bail_input!("--top-p: found {}, expected a number above 0 and at most 1", args.top_p);
    }
    Ok(())
}
