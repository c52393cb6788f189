//! `temper score MODEL`: the log-probability of each token given those before it.

use serde_json::json;

use super::{Global, prompt};
use crate::model::logprobs::token_logprobs;
use crate::{Result, bail_input};

#[derive(clap::Args)]
pub struct Args {
    /// A model directory (or a hub id in the local cache)
    pub model: String,
    /// The base model of an adapter, where it lies elsewhere than adapter_config.json says
    #[arg(long, value_name = "DIR")]
    pub base: Option<String>,
    /// Text, encoded without chat template
    #[arg(long, required_unless_present = "ids", conflicts_with = "ids")]
    pub text: Option<String>,
    /// Token ids, comma-separated; needs no tokenizer
    #[arg(long, allow_hyphen_values = true)]
    pub ids: Option<String>,
}

pub fn run(args: &Args, global: &Global) -> Result<()> {
    let loaded = prompt::load(&args.model, args.base.as_deref(), args.text.is_some(), global)?;
    let ids = match (&args.ids, &args.text, &loaded.tokenizer) {
        (Some(ids), ..) => prompt::parse_ids(ids, loaded.model.config.vocab_size)?,
        (None, Some(text), Some(tokenizer)) => tokenizer.encode(text)?,
        _ => bail_input!("expected --text or --ids"),
    };
    if ids.len() < 2 {
        bail_input!("found {} tokens, expected at least 2 to score", ids.len());
    }
    prompt::check_length(ids.len(), &loaded.model)?;
    let logprobs = token_logprobs(&loaded.model, &ids)?;
    if global.json {
        return super::print(json!({"ids": ids, "logprobs": logprobs}));
    }
    let mut lines = String::new();
    for (id, logprob) in ids[1..].iter().zip(&logprobs) {
        let text = match &loaded.tokenizer {
            Some(tokenizer) => format!("  {:?}", tokenizer.decode(&[*id])?),
            None => String::new(),
        };
        lines += &format!("{id:>8}  {logprob:>10.5}{text}\n");
    }
    let sum: f64 = logprobs.iter().map(|&l| f64::from(l)).sum();
    super::print(format_args!("{lines}sum {sum:.5}, perplexity {:.4}", (-sum / logprobs.len() as f64).exp()))
}
