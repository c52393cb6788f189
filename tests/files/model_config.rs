//! config.json in its old and new forms, and everything in it that is refused.

use serde_json::{Value, json};
use temper::model::config::{PRESETS, Qwen2Config};
use temper::model::section::Dtype;

fn new_form() -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "bfloat16",
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "tie_word_embeddings": true,
        "hidden_act": "silu", "use_sliding_window": false, "sliding_window": null, "rope_scaling": null,
        "layer_types": ["full_attention", "full_attention"], "eos_token_id": [7, 3], "pad_token_id": 0,
        "bos_token_id": null,
    })
}

#[test]
fn old_and_new_forms_say_the_same() {
    let mut old = new_form();
    let map = old.as_object_mut().unwrap();
    map.remove("rope_parameters");
    map.remove("dtype");
    map.insert("rope_theta".into(), json!(5e5));
    map.insert("torch_dtype".into(), json!("bfloat16"));
    let config = Qwen2Config::from_json(&new_form()).unwrap();
    assert_eq!(config, Qwen2Config::from_json(&old).unwrap());
    assert_eq!((config.rope_theta, config.dtype, config.head_dim), (5e5, Dtype::Bf16, 16));
    assert_eq!((config.eos_token_ids, config.pad_token_id), (vec![3, 7], Some(0)));
}

#[test]
fn eos_ids_of_both_files_are_joined() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), new_form().to_string()).unwrap();
    std::fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": [9, 7]}"#).unwrap();
    assert_eq!(Qwen2Config::from_dir(dir.path()).unwrap().eos_token_ids, [3, 7, 9]);
    std::fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": 100}"#).unwrap();
    let error = Qwen2Config::from_dir(dir.path()).unwrap_err().to_string();
    let expected = "generation_config.json: eos_token_id: found 100, expected an id below vocab_size (100)";
    assert!(error.ends_with(expected), "{error}");
}

#[test]
fn what_the_model_does_not_compute_is_refused() {
    let table: &[(&str, Value, &str)] = &[
        ("architectures", json!(["LlamaForCausalLM"]), "architectures: found [\"LlamaForCausalLM\"], expected"),
        ("hidden_act", json!("gelu"), "hidden_act: found \"gelu\", expected \"silu\""),
        ("use_sliding_window", json!(true), "use_sliding_window: found true, expected false"),
        ("layer_types", json!(["full_attention", "sliding_attention"]), "layer_types: found"),
        (
            "rope_parameters",
            json!({"rope_theta": 1e4, "rope_type": "yarn"}),
            "rope_parameters.rope_type: found \"yarn\"",
        ),
        ("rope_parameters", json!({"rope_type": "default"}), "rope_theta: missing"),
        ("rope_scaling", json!({"type": "linear", "factor": 2.0}), "rope_scaling.rope_type: found \"linear\""),
        (
            "quantization_config",
            json!({"quant_method": "gptq"}),
            "quantization_config: quant_method: found \"gptq\", expected",
        ),
        ("dtype", json!("float8"), "dtype: found \"float8\", expected float32, bfloat16 or float16"),
        ("hidden_size", Value::Null, "hidden_size: missing, expected a positive integer"),
        ("hidden_size", json!("64"), "hidden_size: found \"64\", expected a positive integer"),
        ("hidden_size", json!(66), "hidden_size: found 66, expected a multiple of num_attention_heads (4)"),
        ("hidden_size", json!(-64), "hidden_size: found -64"),
        ("hidden_size", json!(64.5), "hidden_size: found 64.5"),
        ("hidden_size", json!(1u64 << 40), "hidden_size: found 1099511627776"),
        ("num_hidden_layers", json!(0), "num_hidden_layers: found 0, expected a positive integer"),
        (
            "num_key_value_heads",
            json!(3),
            "num_key_value_heads: found 3, expected a divisor of num_attention_heads (4)",
        ),
        ("head_dim", json!(15), "head_dim: found 15, expected an even number"),
        ("rms_norm_eps", json!(0.0), "rms_norm_eps: found 0.0, expected a positive number"),
        ("tie_word_embeddings", json!("yes"), "tie_word_embeddings: found \"yes\", expected true or false"),
        ("eos_token_id", json!([3, "x"]), "eos_token_id: found \"x\", expected a token id"),
        ("eos_token_id", json!(100), "eos_token_id: found 100, expected an id below vocab_size (100)"),
        ("pad_token_id", json!(-1), "pad_token_id: found -1, expected a token id"),
    ];
    for (key, value, expected) in table {
        let mut config = new_form();
        config[*key] = value.clone();
        let error = Qwen2Config::from_json(&config).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let error = error.to_string();
        assert!(error.starts_with(expected) && !error.contains('\n'), "{error:?}, expected {expected:?}");
    }
}

#[test]
fn a_preset_survives_writing_and_reading() {
    for name in PRESETS {
        let config = Qwen2Config::preset(name).unwrap();
        assert_eq!(Qwen2Config::from_json(&config.to_hf_json()).unwrap(), config, "{name}");
    }
    let error = Qwen2Config::preset("qwen2.5-3b").unwrap_err().to_string();
    assert!(error.contains("qwen2.5-1.5b"), "{error}");
}

#[test]
fn presets_have_the_published_sizes() {
    let count = |name| Qwen2Config::preset(name).unwrap().parameter_count();
    assert_eq!(count("qwen2.5-0.5b"), 494_032_768);
    assert_eq!(count("qwen2.5-1.5b"), 1_543_714_304);
    assert_eq!(count("qwen2.5-7b"), 7_615_616_512);
    assert_eq!(count("tiny-28x32"), 263_104);
    assert_eq!(count("tiny-4x64"), 151_424);
}

#[test]
fn the_module_list_has_one_entry_per_embedding_norm_and_projection() {
    let config = Qwen2Config::preset("qwen2.5-1.5b").unwrap();
    let modules = config.modules();
    assert_eq!(modules.len(), 1 + 28 * 9 + 2);
    for module in &modules {
        let name = format!("{}.weight", module.name);
        let shapes = config.parameter_shapes();
        let stored = shapes.iter().find(|(parameter, _)| *parameter == name);
        assert!(stored.is_some() || module.name == "lm_head", "{name}");
    }
}
