//! Qwen2: configuration, weights on disk, tokenizer and chat template, blocks, KV cache, generation.

pub mod aqn;
pub mod attention;
pub mod calibration;
pub mod chat_template;
pub mod checkpoint;
pub mod config;
pub mod generate;
pub mod kv_cache;
pub mod linear;
pub mod linear_input;
pub mod load;
pub mod logprobs;
pub mod lora;
pub mod norm;
pub mod parameter;
pub mod pass;
pub mod quantized;
pub mod qwen2;
pub mod recompute;
pub mod section;
pub mod tokenizer;
