//! A model's tokenizer: `tokenizer.json` with the chat template beside it.

use std::path::Path;

use super::chat_template::{ChatTemplate, Message};
use crate::error::one_line;
use crate::{Error, Result, bail_input, input_error};

/// Text to ids and back, and prompts in the model's own chat format.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    template: Option<ChatTemplate>,
    vocab_size: usize,
    model_vocab_size: Option<usize>,
    /// The directory, for messages.
    place: String,
}

impl Tokenizer {
    /// Reads `dir/tokenizer.json` and, where present, tokenizer_config.json and chat_template.jinja.
    ///
    /// # Errors
    /// `Error::Input` names the file that is missing or broken.
    pub fn from_dir(dir: &Path) -> Result<Tokenizer> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
        let inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|e| input_error!("{}: not a tokenizer: {}", path.display(), one_line(e)))?;
        let largest = inner.get_vocab(true).values().max().copied();
        let Some(largest) = largest else {
            bail_input!("{}: found an empty vocabulary, expected tokens", path.display());
        };
        Ok(Tokenizer {
            inner,
            template: ChatTemplate::from_dir(dir)?,
            vocab_size: largest as usize + 1,
            model_vocab_size: None,
            place: dir.display().to_string(),
        })
    }

    /// Tells the tokenizer how many ids the model has: `decode` then refuses those beyond, and a tokenizer
    /// with more ids than the model is an error here rather than in the middle of a run.
    pub fn with_model_vocab_size(mut self, model_vocab_size: usize) -> Result<Tokenizer> {
        if self.vocab_size > model_vocab_size {
            bail_input!(
                "{}: tokenizer has {} ids, expected at most the model's vocab_size ({model_vocab_size})",
                self.place,
                self.vocab_size
            );
        }
        self.model_vocab_size = Some(model_vocab_size);
        Ok(self)
    }

    /// Ids of `text`, with whatever the tokenizer itself adds at the ends (Qwen2.5: nothing).
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, true)
    }

    /// Text of `ids` without special tokens. An id that has no token (the padding rows of an embedding) gives
    /// no text, as in transformers.
    ///
    /// # Errors
    /// An id that the model does not have, once [`Tokenizer::with_model_vocab_size`] told how many there are.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let limit = self.model_vocab_size.unwrap_or(usize::MAX);
        if let Some(id) = ids.iter().find(|&&id| id as usize >= limit) {
            bail_input!("token id {id}: expected an id below the model's vocab_size ({limit})");
        }
        self.inner
            .decode(ids, true)
            .map_err(|e| Error::Runtime(format!("{}: decoding failed: {}", self.place, one_line(e))))
    }

    /// Ids of a one-turn conversation in the model's chat template, up to where the assistant begins.
    pub fn chat_prompt(&self, user: &str) -> Result<Vec<u32>> {
        self.encode_with(&self.chat_text(user)?, false)
    }

    /// The text that [`Tokenizer::chat_prompt`] encodes.
    pub fn chat_text(&self, user: &str) -> Result<String> {
        match &self.template {
            Some(template) => template.render(&[Message { role: "user", content: user }], true),
            None => bail_input!(
                "{}: found no chat template, expected one in chat_template.jinja or tokenizer_config.json",
                self.place
            ),
        }
    }

    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// One more than the largest id, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of exactly this token.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    fn encode_with(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        self.inner
            .encode(text, add_special_tokens)
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|e| input_error!("{}: cannot encode the text: {}", self.place, one_line(e)))
    }
}
