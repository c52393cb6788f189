//! A token's draw is its own: bitwise the same in another batch, order, padding, micro-batch split, with and without
//! KV cache. Values agree to 1e-5 in f32, because matrix products are not batch-invariant.

use tch::{Kind, Tensor};
use temper::model::generate::{Completion, Prompt, Request, Sampling, generate};
use temper::model::logprobs::response_logprobs;
use temper::model::pass::{Pass, PromptUid, Sequence};
use temper::model::qwen2::Qwen2;
use temper::numerics::error_law::ErrorLaw;
use temper::numerics::generator::normal;
use temper::numerics::noise_key::{Phase, Purpose, stream, token_key};
use temper::ops::matmul_error::{ErrorDraw, RowKeys, finish_product};
use temper::ops::noisy_linear::{self, NoisyLinearCall, ProductError};

use crate::support::{SEED, bits, floats, largest_difference, model, noise_everywhere, noisy, sequences};

const TOLERANCE: f32 = 1e-5;

fn no_keys() -> RowKeys {
    RowKeys::new(Vec::new())
}

/// With y = 1 and s = 1 the law gives 1 + z, exact in f32 for z = S / 2^15: the draw can be read off.
fn read_draws(call: &NoisyLinearCall, columns: i64) -> Vec<Vec<f32>> {
    let draw = ErrorDraw { scale: 1.0, law: ErrorLaw::RelativeGaussian, ..call.forward.draw.clone().unwrap() };
    let call = NoisyLinearCall { forward: ProductError { draw: Some(draw), sink: None }, ..call.clone() };
    let x = Tensor::ones([call.keys.len() as i64, 1], (Kind::Float, tch::Device::Cpu));
    let weight = Tensor::ones([columns, 1], (Kind::Float, tch::Device::Cpu));
    let y = noisy_linear::forward(&x, &weight, None, &call, false, Kind::Float).unwrap();
    floats(&y).chunks(columns as usize).map(|row| row.iter().map(|v| v - 1.0).collect()).collect()
}

#[test]
fn every_product_of_a_token_gets_the_draw_of_its_key() {
    let model = model(true);
    let injector = noisy(&model, &noise_everywhere(), SEED);
    let keys: Vec<u64> = sequences().iter().flat_map(|s| s.keys().unwrap()).collect();
    let reversed: Vec<usize> = (0..keys.len()).rev().collect();
    let every_third: Vec<usize> = (1..keys.len()).step_by(3).collect();
    let keys = RowKeys::new(keys);
    for (phase, index, columns) in [(Phase::Rollout, 2, 130), (Phase::Update, 9, 64), (Phase::OldLogprobs, 20, 45)] {
        let stream = stream(Purpose::MatmulForward, phase, 0, index).unwrap();
        let draws = |keys: &RowKeys| {
            let call = injector.linear_call(index, phase, keys, false, 0, columns as usize);
            read_draws(&call, columns)
        };
        let all = draws(&keys);
        for (row, values) in all.iter().enumerate() {
            for (column, z) in values.iter().enumerate() {
                let defined = normal(SEED, stream, keys.host()[row], column as u32);
                assert_eq!(z.to_bits(), defined.to_bits(), "module {index} row {row} column {column}");
            }
        }
        for rows in [&reversed, &every_third] {
            for (values, &row) in draws(&keys.select(rows)).iter().zip(rows.iter()) {
                assert_eq!(bits(values), bits(&all[row]));
            }
        }
        assert_eq!(bits(&draws(&keys.narrow(4, 1))[0]), bits(&all[4]), "a row alone");
    }
}

/// prompt positions belong to the prompt (members share them), response positions to the sequence.
#[test]
fn keys_tell_prompts_members_and_steps_apart() {
    let all = sequences();
    let (first, second) = (&all[0], &all[1]);
    let shared = first.prompt_len;
    assert_eq!(first.keys().unwrap()[..shared], second.keys().unwrap()[..shared]);
    assert_eq!(first.key(shared).unwrap(), token_key(7, 100, 1, shared as u32).unwrap());
    let mut seen = std::collections::HashSet::new();
    for (i, sequence) in all.iter().enumerate() {
        for p in 0..sequence.ids.len() {
            let fresh = seen.insert(sequence.key(p).unwrap());
            assert_eq!(fresh, p >= sequence.prompt_len || i % 2 == 0, "sequence {i} position {p}");
        }
    }
    let later = Sequence { uid: PromptUid { step: 8, ..first.uid }, ..first.clone() };
    assert!(later.keys().unwrap().iter().all(|key| !seen.contains(key)));
}

/// y' = law(y, z) + bias with a mixture of signs, in one rounding, bitwise from the definition.
#[test]
fn the_law_is_applied_before_the_bias() {
    let keys = RowKeys::new(vec![5, 6, 1 << 40]);
    let y = crate::support::uniform(3, 70, 1);
    let bias = crate::support::uniform(1, 70, 2).view([70]);
    let stream = stream(Purpose::MatmulForward, Phase::Rollout, 0, 3).unwrap();
    for law in [ErrorLaw::RelativeGaussian, ErrorLaw::AbsoluteGaussian, ErrorLaw::SystematicBias] {
        let draw = ErrorDraw { law, scale: 0.05, seed: SEED, stream };
        let got = finish_product(y.copy(), Some(&bias), Some(&draw), &keys, None, Kind::Float).unwrap();
        let (clean, b) = (floats(&y), floats(&bias));
        for (i, got) in floats(&got).into_iter().enumerate() {
            let (row, column) = (i / 70, i % 70);
            let z = normal(SEED, stream, keys.host()[row], column as u32);
            let s = 0.05f32;
            let erroneous = match law {
                ErrorLaw::RelativeGaussian => clean[i].abs().mul_add(s * z, clean[i]),
                ErrorLaw::AbsoluteGaussian => s.mul_add(z, clean[i]),
                ErrorLaw::SystematicBias => clean[i] + s * clean[i].signum(),
            };
            assert!((got - (erroneous + b[column])).abs() <= 1.2e-7, "{law:?} {i}: {got}");
            if law == ErrorLaw::RelativeGaussian {
                assert_eq!(got.to_bits(), (erroneous + b[column]).to_bits(), "{law:?} {i}");
            }
        }
    }
}

fn logprobs(model: &Qwen2, seed: u64, phase: Phase, batches: &[Vec<&Sequence>]) -> Vec<Vec<f32>> {
    let injector = noisy(model, &noise_everywhere(), seed);
    let pass = Pass::injected(&injector, phase, no_keys());
    let mut all = Vec::new();
    for batch in batches {
        let values = floats(&response_logprobs(model, batch, 0.9, &pass).unwrap().logprobs);
        let mut rest = values.as_slice();
        for sequence in batch {
            let (own, after) = rest.split_at(sequence.response().len());
            all.push(own.to_vec());
            rest = after;
        }
    }
    all
}

#[test]
fn logprobs_do_not_depend_on_batch_order_and_split() {
    let model = model(true);
    let all = sequences();
    let alone = logprobs(&model, SEED, Phase::Update, &all.iter().map(|s| vec![s]).collect::<Vec<_>>());
    for order in [vec![0usize, 1, 2, 3, 4, 5], vec![5, 3, 1, 0, 2, 4]] {
        for split in [6, 4, 1] {
            let batches: Vec<Vec<&Sequence>> =
                order.chunks(split).map(|chunk| chunk.iter().map(|&i| &all[i]).collect()).collect();
            for (values, &i) in logprobs(&model, SEED, Phase::Update, &batches).iter().zip(&order) {
                let difference = largest_difference(values, &alone[i]);
                assert!(difference <= TOLERANCE, "sequence {i} in {order:?} by {split}: {difference}");
            }
        }
    }
    let batch = [all.iter().collect::<Vec<_>>()];
    for (seed, phase) in [(SEED + 1, Phase::Update), (SEED, Phase::OldLogprobs)] {
        let other = logprobs(&model, seed, phase, &batch);
        for (i, values) in other.iter().enumerate() {
            let difference = largest_difference(values, &alone[i]);
            assert!(difference > 1e-2, "sequence {i}: another draw moves it by {difference} only");
        }
    }
}

fn completions(model: &Qwen2, prompts: &[Prompt], group_size: usize, greedy: bool, kv_cache: bool) -> Vec<Completion> {
    let injector = noisy(model, &noise_everywhere(), SEED);
    let pass = Pass::injected(&injector, Phase::Rollout, no_keys());
    let sampling = Sampling { greedy, temperature: 0.9, top_p: 1.0, top_k: 0, seed: SEED, phase: Phase::Rollout };
    let request = Request {
        prompts,
        group_size,
        max_new_tokens: 14,
        limits: None,
        stop_ids: &[1],
        sampling: &sampling,
        kv_cache,
    };
    generate(model, &request, &pass, |_| {}).unwrap()
}

fn prompts(which: &[usize]) -> Vec<Prompt> {
    let all = sequences();
    which
        .iter()
        .map(|&i| {
            let sequence = &all[2 * i];
            Prompt { uid: sequence.uid, ids: sequence.ids[..sequence.prompt_len].to_vec() }
        })
        .collect()
}

fn assert_same(got: &Completion, want: &Completion, what: &str) {
    assert_eq!(got.sequence.ids, want.sequence.ids, "{what}");
    assert_eq!(got.finished, want.finished, "{what}");
    let difference = largest_difference(&got.logprobs, &want.logprobs);
    assert!(difference <= TOLERANCE, "{what}: {difference}");
}

#[test]
fn generation_does_not_depend_on_the_cache_or_on_others() {
    let model = model(true);
    for greedy in [true, false] {
        let plain = completions(&model, &prompts(&[0, 1, 2]), 3, greedy, false);
        let cached = completions(&model, &prompts(&[0, 1, 2]), 3, greedy, true);
        let lengths: std::collections::HashSet<usize> = plain.iter().map(|c| c.logprobs.len()).collect();
        assert!(greedy || lengths.len() > 1, "rows must end at different steps for the cache to drop some");
        for (i, (got, want)) in cached.iter().zip(&plain).enumerate() {
            assert_same(got, want, &format!("cached, greedy {greedy}, completion {i}"));
        }
        for (which, group) in [(vec![1], 3), (vec![2, 1], 2), (vec![0, 2, 1], 1)] {
            let others = completions(&model, &prompts(&which), group, greedy, true);
            for (i, got) in others.iter().enumerate() {
                let (prompt, member) = (which[i / group], i % group);
                assert_same(got, &plain[3 * prompt + member], &format!("prompts {which:?} x {group}: {i}"));
            }
        }
        // The same tokens, scored in one pass under the rollout's draw.
        let all: Vec<&Sequence> = plain.iter().map(|c| &c.sequence).collect();
        for (values, completion) in logprobs(&model, SEED, Phase::Rollout, &[all]).iter().zip(&plain) {
            assert!(largest_difference(values, &completion.logprobs) <= TOLERANCE);
        }
    }
}

/// Members of a group differ through their response positions, greedy decoding included.
#[test]
fn members_of_a_group_draw_for_themselves() {
    let model = model(true);
    let group = completions(&model, &prompts(&[1]), 4, true, true);
    let first: Vec<u32> = group.iter().map(|c| c.logprobs[0].to_bits()).collect();
    assert!(first.iter().all(|bits| *bits == first[0]), "the first token comes from the shared prompt");
    let second: std::collections::HashSet<u32> = group.iter().map(|c| c.logprobs[1].to_bits()).collect();
    assert_eq!(second.len(), 4, "the later ones do not");
}
