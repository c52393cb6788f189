//! The model itself against transformers: log-probs and tokens of ragged batches, and gradients with noise off.

use std::path::Path;

use tch::{Device, Kind, Tensor};
use temper::model::checkpoint::Checkpoint;
use temper::model::generate::{Prompt, Request, Sampling, generate};
use temper::model::load::load_model;
use temper::model::logprobs::response_logprobs;
use temper::model::pass::{Pass, PromptUid, Sequence};
use temper::model::qwen2::Qwen2;
use temper::ops::matmul_error::RowKeys;

use crate::expected::{Expected, LOGPROB_TOLERANCE, Model, assert_logprobs, expected, stories};

/// Largest ||g - g_torch|| / ||g_torch|| of a parameter's gradient.
const GRADIENT_TOLERANCE: f64 = 1e-4;

/// In f32 whatever the weights' dtype, on one thread: the models are tiny and the tests run side by side.
fn load(dir: &Path) -> Qwen2 {
    tch::set_num_threads(1);
    load_model(dir, Device::Cpu, Some(Kind::Float)).unwrap()
}

fn tensor(checkpoint: &Checkpoint, name: &str) -> Tensor {
    let shape: Vec<i64> = checkpoint.tensor(name).unwrap().shape.iter().map(|&d| d as i64).collect();
    Tensor::from_slice(&checkpoint.tensor_f32(name).unwrap()).view(shape.as_slice())
}

fn uid(dataset_index: usize) -> PromptUid {
    PromptUid { step: 1, dataset_index: dataset_index as u32 }
}

/// All but the first token as response.
fn sequence(ids: &[u32]) -> Sequence {
    Sequence { uid: uid(0), member: 0, ids: ids.to_vec(), prompt_len: 1 }
}

fn clean() -> Pass<'static> {
    Pass::clean(RowKeys::new(Vec::new()))
}

/// Every sequence of a model in one micro-batch: 2, 17, 64 and 700 tokens side by side.
#[test]
fn a_ragged_micro_batch_agrees_with_transformers() {
    let Some(expected) = expected() else { return };
    let _no_grad = tch::no_grad_guard();
    let mut worst = 0f64;
    for model in &expected.models {
        let sequences: Vec<Sequence> = model.scores.iter().map(|s| sequence(&s.ids)).collect();
        let sequences: Vec<&Sequence> = sequences.iter().collect();
        let result = response_logprobs(&load(&expected.dir(model)), &sequences, 1.0, &clean()).unwrap();
        let got: Vec<f64> = Vec::<f32>::try_from(&result.logprobs).unwrap().into_iter().map(f64::from).collect();
        let want: Vec<f64> = model.scores.iter().flat_map(|s| s.logprobs.clone()).collect();
        worst = worst.max(assert_logprobs(&got, &want, LOGPROB_TOLERANCE, &model.name));
    }
    println!("response_logprobs: largest difference from transformers {worst:.1e}");
}

/// All prompts of a model in one batch, two members each, one of which may end before the others.
#[test]
fn batched_generation_agrees_with_transformers() {
    let Some(expected) = expected() else { return };
    for model in &expected.models {
        let qwen2 = load(&expected.dir(model));
        let limit = model.generations.iter().map(|g| g.max_new_tokens).max().unwrap();
        let prompts: Vec<Prompt> =
            model.generations.iter().enumerate().map(|(i, g)| Prompt { uid: uid(i), ids: g.ids.clone() }).collect();
        for kv_cache in [true, false] {
            let request = Request {
                prompts: &prompts,
                group_size: 2,
                max_new_tokens: limit,
                limits: None,
                stop_ids: &qwen2.config.eos_token_ids,
                sampling: &Sampling::greedy(),
                kv_cache,
            };
            let completions = generate(&qwen2, &request, &clean(), |_| ()).unwrap();
            for (case, group) in model.generations.iter().zip(completions.chunks(2)) {
                for completion in group {
                    let response = completion.sequence.response();
                    // The batch runs to the longest limit; a case knows its own.
                    let known = response.len().min(case.max_new_tokens);
                    assert_eq!(response[..known], case.new_ids, "{} kv_cache {kv_cache}", model.name);
                    assert_eq!(completion.finished, response.len() < limit);
                }
            }
        }
    }
}

#[test]
fn the_known_story() {
    let Some((dir, ids)) = stories() else { return };
    let qwen2 = load(&dir);
    for kv_cache in [true, false] {
        let request = Request {
            prompts: &[Prompt { uid: uid(0), ids: vec![1] }],
            group_size: 1,
            max_new_tokens: 150,
            limits: None,
            stop_ids: &qwen2.config.eos_token_ids,
            sampling: &Sampling::greedy(),
            kv_cache,
        };
        let completions = generate(&qwen2, &request, &clean(), |_| ()).unwrap();
        assert_eq!(completions[0].sequence.response(), &ids[..150], "kv_cache {kv_cache}");
    }
}

#[test]
fn gradients_agree_with_torch() {
    let Some(expected) = expected() else { return };
    let mut worst = 0f64;
    for model in &expected.models {
        worst = worst.max(compare_gradients(expected, model));
    }
    println!("gradients: largest relative difference from torch {worst:.1e}");
}

/// Gradient of the mean NLL for every parameter, noise off; returns the largest relative difference.
fn compare_gradients(expected: &Expected, model: &Model) -> f64 {
    let mut qwen2 = load(&expected.dir(model));
    for parameter in qwen2.parameters_mut() {
        parameter.make_trainable().unwrap();
    }
    let sequence = sequence(&model.gradient.ids);
    let pass = Pass { differentiable: true, ..clean() };
    let loss = response_logprobs(&qwen2, &[&sequence], 1.0, &pass).unwrap().logprobs.mean(Kind::Float).neg();
    assert!((loss.double_value(&[]) - model.gradient.loss).abs() < 1e-5, "{}: loss", model.name);
    loss.backward();

    let reference = Checkpoint::open(&expected.root.join(&model.gradient.file)).unwrap();
    let mut worst = 0f64;
    let mut compared = Vec::new();
    for parameter in qwen2.parameters() {
        let want = tensor(&reference, &parameter.name);
        let got = parameter.gradient().unwrap_or_else(|| panic!("{}: no gradient", parameter.name));
        assert_eq!(got.size(), want.size(), "{}", parameter.name);
        let relative = ((&got - &want).norm() / want.norm()).double_value(&[]);
        assert!(relative <= GRADIENT_TOLERANCE, "{}: {}: off by {relative:.1e}", model.name, parameter.name);
        worst = worst.max(relative);
        compared.push(parameter.name.clone());
    }
    compared.sort();
    assert_eq!(compared, reference.names().collect::<Vec<_>>(), "{}: parameters", model.name);
    worst
}
