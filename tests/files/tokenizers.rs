//! Qwen2.5's tokenizer and chat template against transformers' own output (golden/qwen2.5_chat.json).

use serde_json::Value;
use temper::model::tokenizer::Tokenizer;

use crate::{golden, shared};

#[test]
fn qwen_prompts_are_those_of_transformers() {
    let Some(dir) = shared("fixtures/qwen2.5_tokenizer") else {
        return;
    };
    let tokenizer = Tokenizer::from_dir(&dir).unwrap();
    assert_eq!(tokenizer.vocab_size(), 151_665);
    assert_eq!(tokenizer.token_to_id("<|im_end|>"), Some(151_645));
    let cases: Value = serde_json::from_slice(&std::fs::read(golden("qwen2.5_chat.json")).unwrap()).unwrap();
    for case in cases.as_array().unwrap() {
        let user = case["user"].as_str().unwrap();
        assert_eq!(tokenizer.chat_text(user).unwrap(), case["text"]);
        let ids = tokenizer.chat_prompt(user).unwrap();
        assert_eq!(serde_json::json!(ids), case["ids"], "{user:?}");
        assert_eq!(tokenizer.decode(&ids).unwrap(), case["decoded"]);
    }
}

#[test]
fn ids_beyond_the_model_are_refused_and_padding_ids_have_no_text() {
    let Some(dir) = shared("fixtures/qwen2.5_tokenizer") else {
        return;
    };
    let tokenizer = Tokenizer::from_dir(&dir).unwrap().with_model_vocab_size(151_936).unwrap();
    assert_eq!(tokenizer.decode(&[17, 151_900, 17]).unwrap(), "22");
    let error = tokenizer.decode(&[17, 151_936]).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("token id 151936"), "{error}");
    let error = Tokenizer::from_dir(&dir).unwrap().with_model_vocab_size(512).err().unwrap().to_string();
    assert!(error.ends_with("tokenizer has 151665 ids, expected at most the model's vocab_size (512)"), "{error}");
}

#[test]
fn broken_tokenizers_are_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let error_of = || {
        let error = Tokenizer::from_dir(dir.path()).err().unwrap();
        assert_eq!(error.exit_code(), 2);
        let text = error.to_string();
        assert!(!text.contains('\n'), "{text}");
        text
    };
    assert!(error_of().ends_with("tokenizer.json: no such file or directory"));
    for (content, expected) in [
        ("", "tokenizer.json: not a tokenizer: "),
        ("{\"version\": \"1.0\"", "tokenizer.json: not a tokenizer: "),
        ("{}", "tokenizer.json: not a tokenizer: "),
        ("\u{0}\u{1}", "tokenizer.json: not a tokenizer: "),
    ] {
        std::fs::write(dir.path().join("tokenizer.json"), content).unwrap();
        assert!(error_of().contains(expected), "{}", error_of());
    }
    temper::data::generated::write_tokenizer(dir.path()).unwrap();
    Tokenizer::from_dir(dir.path()).unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), "{\"chat_template\": 3}").unwrap();
    assert!(error_of().ends_with("chat_template: expected a string or a list of named templates"));
    std::fs::write(dir.path().join("tokenizer_config.json"), "{\"chat_template\": \"{% for %}\"}").unwrap();
    assert!(error_of().contains("tokenizer_config.json: chat template: line 1: "), "{}", error_of());
    std::fs::write(dir.path().join("tokenizer_config.json"), "{").unwrap();
    assert!(error_of().contains("tokenizer_config.json: not valid JSON: "), "{}", error_of());
    std::fs::remove_file(dir.path().join("tokenizer_config.json")).unwrap();
    let error = Tokenizer::from_dir(dir.path()).unwrap().chat_prompt("x").unwrap_err().to_string();
    assert!(error.contains("found no chat template"), "{error}");
}

#[test]
fn a_template_file_wins_over_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    temper::data::generated::write_tokenizer(dir.path()).unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), "<user>{{ messages[0].content }}{{ eos_token }}").unwrap();
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(tokenizer.chat_text("7").unwrap(), "<user>7<eos>");
    assert_eq!(tokenizer.chat_prompt("7").unwrap(), [2, 12, 1]);
}
