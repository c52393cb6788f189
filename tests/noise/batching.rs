//! What is computed at once changes nothing: generation in any number of rows, refilled or not, looked at after every token or
//! every eight; updates in any micro-batches. Draws are equal to the bit, values to 1e-5, tokens except at near ties.

use tch::{Device, Kind, Tensor};
use temper::inject::injector::Injector;
use temper::inject::section::NoisyOpsSection;
use temper::model::attention::Attend;
use temper::model::generate::{Batching, Completion, Prompt, Request, Sampling, generate};
use temper::model::logprobs::response_logprobs;
use temper::model::pass::{Pass, PromptUid, Sequence, ids_tensor};
use temper::model::qwen2::Qwen2;
use temper::numerics::error_law::ErrorLaw;
use temper::numerics::generator::uniform_f32;
use temper::numerics::noise_key::{Phase, Purpose, stream};
use temper::ops::matmul_error::RowKeys;
use temper::ops::packed_attention::Packing;
use temper::rl::optimizer::AdamW;
use temper::rl::rollout::Rollout;
use temper::rl::section::TrainerSection;
use temper::rl::timing::Accounting;
use temper::rl::update::UpdateSummary;

use crate::support::{
    SEED, bits, floats, largest_difference, model, noise_everywhere, noisy, recipe, sequences, trainable, update,
};

const GROUP: usize = 3;
const TOKENS: usize = 20;
/// Scores closer than this may swap the tokens that they choose.
const NEAR: f32 = 1e-4;

fn no_keys() -> RowKeys {
    RowKeys::new(Vec::new())
}

fn batchings() -> Vec<Batching> {
    [(None, 1), (None, 8), (Some(GROUP), 1), (Some(7), 3), (Some(13), 8), (Some(1), 50)]
        .map(|(max_sequences, every)| Batching { max_sequences, check_every: Some(every), ..Batching::default() })
        .to_vec()
}

fn prompts() -> Vec<Prompt> {
    let length = |i: u32| 2 + (7 * i) % 11;
    let uid = |i| PromptUid { step: 3, dataset_index: i };
    (0..8).map(|i| Prompt { uid: uid(i), ids: (0..length(i)).map(|p| 2 + (5 * i + 3 * p) % 43).collect() }).collect()
}

/// The plain definition's completions, and the engine's under a batching.
fn completions(model: &Qwen2, injector: &Injector, greedy: bool, batching: Option<Batching>) -> Vec<Completion> {
    let prompts = prompts();
    let sampling = Sampling { greedy, temperature: 0.9, top_p: 1.0, top_k: 0, seed: SEED, phase: Phase::Rollout };
    let (kv_cache, batching) = (batching.is_some(), batching.unwrap_or_default());
    let request = Request { kv_cache, batching, ..Request::new(&prompts, GROUP, TOKENS, &[1, 17, 30], &sampling) };
    generate(model, &request, &Pass::injected(injector, Phase::Rollout, no_keys()), |_| {}).unwrap()
}

/// A head of zeros under an absolute error: logits are the error itself, so log-probabilities show draws bit by bit.
fn model_of_draws() -> (Qwen2, Injector) {
    let mut model = model(false);
    let head = model.lm_head.as_mut().unwrap();
    let zeros = head.value().zeros_like();
    head.assign(&zeros).unwrap();
    let exclude_modules = ["embed_tokens", "self_attn", "mlp"].map(String::from).to_vec();
    let noise = NoisyOpsSection {
        error_type: ErrorLaw::AbsoluteGaussian,
        error_scale: 1.5,
        exclude_modules,
        ..noise_everywhere()
    };
    let injector = noisy(&model, &noise, SEED);
    (model, injector)
}

#[test]
fn a_rollouts_draws_are_the_same_bits_in_any_batch() {
    let (model, injector) = model_of_draws();
    let plain = completions(&model, &injector, false, None);
    let lengths: std::collections::HashSet<usize> = plain.iter().map(|c| c.logprobs.len()).collect();
    assert!(lengths.len() > 4, "sequences must end at different steps: {lengths:?}");
    for batching in batchings() {
        for (got, want) in completions(&model, &injector, false, Some(batching)).iter().zip(&plain) {
            assert_eq!(got.sequence.ids, want.sequence.ids, "{batching:?}");
            assert_eq!(bits(&got.logprobs), bits(&want.logprobs), "{batching:?}");
            assert_eq!(got.finished, want.finished);
        }
    }
}

#[test]
fn generated_tokens_do_not_depend_on_the_batch() {
    let model = model(true);
    let injector = noisy(&model, &noise_everywhere(), SEED);
    let (mut tokens, mut ties) = (0, 0);
    for greedy in [true, false] {
        let plain = completions(&model, &injector, greedy, None);
        for batching in batchings() {
            for (got, want) in completions(&model, &injector, greedy, Some(batching)).iter().zip(&plain) {
                let (a, b) = (got.sequence.response(), want.sequence.response());
                let same = a.iter().zip(b).take_while(|(a, b)| a == b).count();
                let difference = largest_difference(&got.logprobs[..same], &want.logprobs[..same]);
                assert!(difference <= 1e-5, "{batching:?}: {difference}");
                tokens += same;
                if a != b {
                    let gap = gap(&model, &injector, &want.sequence, same, greedy);
                    assert!(gap < NEAR, "{batching:?}: token {same} of {:?} with a gap of {gap}", want.sequence.uid);
                    ties += 1;
                }
            }
        }
    }
    println!("{tokens} tokens the same, {ties} sequences went apart at a near tie");
    assert!(tokens > 2000);
}

/// How far the choice of response token `place` is from another one: by probability (greedy), or by the distance of the
/// uniform from the nearest boundary of the cumulative probabilities.
fn gap(model: &Qwen2, injector: &Injector, sequence: &Sequence, place: usize, greedy: bool) -> f32 {
    let length = sequence.prompt_len + place;
    let keys = RowKeys::new((0..length).map(|p| sequence.key(p).unwrap()).collect());
    let pass = Pass::injected(injector, Phase::Rollout, no_keys());
    let (body, last) = (pass.with_keys(keys.clone()), pass.with_keys(keys.narrow(length - 1, 1)));
    let positions = Tensor::arange(length as i64, (Kind::Int64, model.device()));
    let packing = Packing::new(&[length], model.device()).unwrap();
    let ids = ids_tensor(&sequence.ids[..length], model.device()).unwrap();
    let attend = Attend::Full { packing: &packing, store: None };
    let residual = model.residual(&ids, &positions, &attend, &body).unwrap();
    let hidden = model.norm.forward(&residual.narrow(0, length as i64 - 1, 1), &last).unwrap();
    let logits = model.head.logits(model.head_weight(), &hidden, &last).unwrap() / 0.9;
    let p = floats(&logits.softmax(-1, Kind::Float));
    if greedy {
        let mut sorted = p;
        sorted.sort_by(|a, b| b.total_cmp(a));
        return sorted[0] - sorted[1];
    }
    let stream = stream(Purpose::Sampling, Phase::Rollout, 0, 0).unwrap();
    let u = uniform_f32(SEED, stream, sequence.key(length).unwrap());
    let mut sum = 0.0;
    p.iter()
        .map(|p| {
            sum += p;
            (sum - u).abs()
        })
        .fold(f32::MAX, f32::min)
}

#[test]
fn an_updates_draws_are_the_same_bits_in_any_micro_batch() {
    let (model, injector) = model_of_draws();
    let all = sequences();
    let pass = Pass::injected(&injector, Phase::Update, no_keys());
    let of = |split: &[usize]| {
        let mut rest = &all[..];
        let mut values = Vec::new();
        for &n in split {
            let (part, later) = rest.split_at(n);
            let part: Vec<&Sequence> = part.iter().collect();
            values.extend(floats(&response_logprobs(&model, &part, 0.9, &pass).unwrap().logprobs));
            rest = later;
        }
        bits(&values)
    };
    let together = of(&[6]);
    assert!(together.len() > 30);
    for split in [&[1usize; 6][..], &[2, 4], &[3, 3], &[5, 1]] {
        assert_eq!(of(split), together, "{split:?}");
    }
}

fn experience() -> Rollout {
    let completions = sequences().into_iter().map(|sequence| {
        let logprobs = vec![-3.0; sequence.response().len()];
        Completion { sequence, logprobs, finished: true }
    });
    let advantages = vec![1.0, -1.0, 0.5, -0.5, -2.0, 2.0];
    Rollout { completions: completions.collect(), advantages, ..Rollout::default() }
}

/// Under dynamic sampling: the rollout's work is that of everything sampled, the other phases' that of what is trained on.
#[test]
fn what_is_left_out_was_sampled_all_the_same() {
    let (recipe, model) = (recipe(|r| r.rollout.group_size = 1), model(true));
    let accounting = Accounting::of(&recipe, &model.config, Device::Cpu, "cpu");
    let plain = accounting.work(&experience());
    let more = accounting.work(&Rollout { left_out: vec![(7, 30), (2, 5)], ..experience() });
    assert_eq!(more.rollout.tokens, plain.rollout.tokens + 35);
    let alone = Rollout { left_out: vec![(7, 30), (2, 5)], ..Rollout::default() };
    let sum = plain.rollout.flops + accounting.work(&alone).rollout.flops;
    assert!((more.rollout.flops / sum - 1.0).abs() < 1e-12);
    assert_eq!((more.logprobs, more.update), (plain.logprobs, plain.update));
}

/// One optimizer update: its summary, the gradients that it used and the weights after it.
fn update_with(trainer: impl FnOnce(&mut TrainerSection)) -> (UpdateSummary, Vec<Tensor>, Vec<Tensor>) {
    let recipe = recipe(|r| {
        r.noisy_ops = noise_everywhere();
        r.optimizer.lr = 1e-3;
        r.trainer.minibatch_prompts = 3;
        r.algorithm.kl_coef = 0.1;
        trainer(&mut r.trainer);
    });
    let (mut reference, mut model) = (model(true), trainable(model(true)));
    let injector = recipe.injector(&model.config.modules()).unwrap();
    let rollout = experience();
    let mut optimizer = AdamW::new(recipe.optimizer.clone()).unwrap();
    let summary = update(&mut model, Some(&mut reference), &recipe, &injector, &mut optimizer, &mut 0, &rollout);
    assert_eq!(summary.updates, 1);
    let gradients = model.parameters().iter().map(|p| p.gradient().unwrap().copy()).collect();
    let weights = model.parameters().iter().map(|p| p.master().unwrap().copy()).collect();
    (summary, gradients, weights)
}

#[test]
fn an_update_does_not_depend_on_its_micro_batches() {
    let (want, gradients, weights) = update_with(|t| t.microbatch_sequences = 6);
    type Way = Box<dyn FnOnce(&mut TrainerSection)>;
    let ways: [(&str, Way); 7] = [
        ("one by one", Box::new(|t| t.microbatch_sequences = 1)),
        ("threes", Box::new(|t| t.microbatch_sequences = 3)),
        ("25 tokens", Box::new(|t| t.microbatch_tokens = Some(25))),
        ("50 tokens", Box::new(|t| t.microbatch_tokens = Some(50))),
        ("recomputed", Box::new(|t| (t.microbatch_sequences, t.gradient_checkpointing) = (6, Some(true)))),
        (
            "recomputed, 25 tokens",
            Box::new(|t| (t.microbatch_tokens, t.gradient_checkpointing) = (Some(25), Some(true))),
        ),
        ("offloaded reference", Box::new(|t| (t.microbatch_sequences, t.offload_reference) = (6, true))),
    ];
    for (name, way) in ways {
        let (got, its_gradients, its_weights) = update_with(way);
        for (what, a, b) in [
            ("policy", got.loss.policy_loss, want.loss.policy_loss),
            ("kl", got.loss.kl_loss, want.loss.kl_loss),
            ("entropy", got.entropy, want.entropy),
            ("gap", got.logprob_gap_abs, want.logprob_gap_abs),
            ("ratio", got.first_ratio_max, want.first_ratio_max),
            ("norm", got.grad_norm / want.grad_norm, 1.0),
        ] {
            assert!((a - b).abs() <= 1e-5, "{name}: {what} {a}, expected {b}");
        }
        for (got, want) in its_gradients.iter().zip(&gradients) {
            let scale = f64::try_from(want.abs().max()).unwrap();
            let far = f64::try_from((got - want).abs().max()).unwrap();
            assert!(scale > 0.0 && far <= 1e-5 * scale, "{name}: a gradient of {scale} is {far} off");
        }
        assert!(its_weights.iter().zip(&weights).all(|(a, b)| f64::try_from((a - b).abs().max()).unwrap() < 1e-5));
    }
}
