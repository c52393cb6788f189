//! The generated task's tokenizer, written as HF files: 45 tokens, one per word, digit and sign.
//!
//! WordLevel over a Split pre-tokenizer whose pattern is the vocabulary itself, and a decoder that joins
//! without spaces: words carry their leading space, so that text comes back as it was. A text outside the
//! vocabulary is an error, not an unknown token.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{GAINS, ITEMS, LOSSES, PEOPLE};
use crate::model::checkpoint::atomic_file;
use crate::{Error, Result};

pub const VOCAB_SIZE: usize = 45;

/// Special tokens and signs in id order; the 22 words follow.
pub const TOKENS: [&str; 23] = [
    "<pad>", "<eos>", "<user>", "<bot>", "#### ", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "+", "-", "=", ";",
    ",", ".", "?", "\n",
];
const SPECIAL: usize = 4;

const CHAT_TEMPLATE: &str = "{%- for message in messages %}\
{%- if message['role'] == 'user' %}{{ '<user> ' + (message['content'] | trim) }}\
{%- else %}{{ '<bot>' + message['content'] + '<eos>' }}{%- endif %}\
{%- endfor %}\
{%- if add_generation_prompt %}{{ '<bot>' }}{%- endif %}";

/// Writes tokenizer.json and tokenizer_config.json into the existing directory `dir`.
pub fn write_tokenizer(dir: &Path) -> Result<()> {
    let write = |name: &str, value: Value| {
        let path = dir.join(name);
        let text = format!("{value:#}\n");
        atomic_file(&path, |out| out.write_all(text.as_bytes()).map_err(|e| Error::io(&path, e)))
    };
    write("tokenizer.json", tokenizer_json())?;
    write(
        "tokenizer_config.json",
        json!({
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": false,
            "eos_token": TOKENS[1],
            "model_max_length": 256,
            "pad_token": TOKENS[0],
            "tokenizer_class": "PreTrainedTokenizerFast",
        }),
    )
}

/// All 45 tokens in id order.
fn vocabulary() -> Vec<String> {
    let words = PEOPLE.iter().chain(&["has"]).chain(&ITEMS).chain(&GAINS).chain(&LOSSES);
    TOKENS.iter().map(ToString::to_string).chain(words.map(|word| format!(" {word}"))).collect()
}

fn tokenizer_json() -> Value {
    let tokens = vocabulary();
    let added = tokens[..SPECIAL].iter().enumerate().map(|(id, token)| {
        json!({
            "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    });
    let vocab: Map<String, Value> = tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "#### | [A-Za-z]+|[0-9]|[-+=;,.?]|\\n"},
            "behavior": "Isolated",
            "invert": false,
        },
        "post_processor": null,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::{Split, Task};
    use super::*;
    use crate::model::tokenizer::Tokenizer;

    fn tokenizer() -> Tokenizer {
        let dir = tempfile::tempdir().unwrap();
        write_tokenizer(dir.path()).unwrap();
        Tokenizer::from_dir(dir.path()).unwrap()
    }

    #[test]
    fn the_vocabulary_has_45_tokens_of_which_each_is_one_id() {
        let (tokens, tokenizer) = (vocabulary(), tokenizer());
        assert_eq!((tokens.len(), tokenizer.vocab_size()), (VOCAB_SIZE, VOCAB_SIZE));
        for (id, token) in tokens.iter().enumerate() {
            assert_eq!(tokenizer.encode(token).unwrap(), [id as u32], "{token:?}");
        }
    }

    #[test]
    fn the_documented_problem_is_the_documented_ids() {
        let tokenizer = tokenizer();
        let prompt = tokenizer.chat_prompt("Ann has7 figs, gets5, loses3.").unwrap();
        assert_eq!(prompt, [2, 23, 31, 12, 32, 19, 39, 10, 19, 42, 8, 20, 3]);
        let text = "7+5=12;12-3=9\n#### 9";
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(ids, [12, 15, 10, 17, 6, 7, 18, 6, 7, 16, 8, 17, 14, 22, 4, 14]);
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        assert_eq!(tokenizer.decode(&[3, 4, 6, 6, 1, 0, 0]).unwrap(), "#### 11");
    }

    #[test]
    fn every_problem_and_demonstration_comes_back_as_it_was() {
        let (task, tokenizer) = (Task::new(0), tokenizer());
        for index in 0..300 {
            for text in [task.demonstration(index, 0), task.problem(index).careful] {
                let ids = tokenizer.encode(&text).unwrap();
                assert_eq!(tokenizer.decode(&ids).unwrap(), text);
                assert!((3..=19).contains(&(ids.len() + 1)), "{text}");
            }
        }
        for question in task.questions(Split::Validation, 0..300) {
            let ids = tokenizer.chat_prompt(&format!("{} ", question.question)).unwrap();
            assert_eq!(ids.len(), 13, "{}", question.question);
            assert_eq!(tokenizer.decode(&ids).unwrap(), format!(" {}", question.question));
        }
    }

    #[test]
    fn a_text_outside_the_vocabulary_is_an_error() {
        let error = tokenizer().encode("What is love?").unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(!error.to_string().contains('\n'), "{error}");
    }
}
