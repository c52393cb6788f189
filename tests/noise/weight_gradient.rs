//! dW's error in the model: on the accumulated gradient of an update (`per_update`, whatever the micro-batches), or on
//! each micro-batch's (`per_microbatch`); the head included where the plan includes it, tied or not.

use tch::Kind;
use temper::inject::section::{DwDraw, InjectPhase, NoisyOpsSection, PhaseSet};
use temper::model::logprobs::response_logprobs;
use temper::model::pass::{Pass, Sequence};
use temper::model::qwen2::{Module, Qwen2};
use temper::numerics::generator::normal;
use temper::numerics::noise_key::{Phase, Purpose, row_key, stream};
use temper::ops::autograd::run_backward;
use temper::ops::matmul_error::RowKeys;
use temper::rl::update::add_update_gradient_error;

use crate::support::{SEED, bits, floats, largest_difference, model, noise_everywhere, noisy, sequences, trainable};

const UPDATE: u32 = 7;

/// Accumulates the gradient of -sum of log-probs over micro-batches of `split` sequences; draw numbers count from 0.
fn accumulate(model: &Qwen2, noise: &NoisyOpsSection, split: usize) {
    let injector = noisy(model, noise, SEED);
    let all = sequences();
    for (number, microbatch) in all.chunks(split).enumerate() {
        let microbatch: Vec<&Sequence> = microbatch.iter().collect();
        let pass = Pass {
            differentiable: true,
            microbatch_draw: number as u32,
            ..Pass::injected(&injector, Phase::Update, RowKeys::new(vec![]))
        };
        let logprobs = response_logprobs(model, &microbatch, 1.0, &pass).unwrap().logprobs;
        run_backward(&logprobs.sum(Kind::Float).neg()).unwrap();
    }
}

/// As an update does: accumulate, then dW's error per update.
fn update(model: &Qwen2, noise: &NoisyOpsSection, split: usize) {
    accumulate(model, noise, split);
    tch::no_grad(|| add_update_gradient_error(model, &noisy(model, noise, SEED), UPDATE)).unwrap();
}

fn gradients(model: &Qwen2) -> Vec<(String, Vec<f32>)> {
    model.parameters().iter().map(|p| (p.name.clone(), floats(&p.gradient().unwrap()))).collect()
}

fn assert_relative(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
    let scale = want.iter().fold(0f32, |m, v| m.max(v.abs()));
    let difference = largest_difference(got, want);
    assert!(scale > 0.0 && difference <= tolerance * scale, "{what}: {difference} of {scale}");
}

/// On the accumulated gradient g of every linear: g' = fma(|g|, s z, g), z keyed by (update number, out feature).
#[test]
fn per_update_the_draws_are_exact_and_the_split_does_not_matter() {
    let noise = NoisyOpsSection { exclude_modules: vec!["lm_head".into()], ..noise_everywhere() };
    let mut of_splits = Vec::new();
    for split in [6, 4, 1] {
        let model = trainable(model(true));
        accumulate(&model, &noise, split);
        let before = gradients(&model);
        tch::no_grad(|| add_update_gradient_error(&model, &noisy(&model, &noise, SEED), UPDATE)).unwrap();
        for (index, module) in model.modules() {
            let Module::Linear(_, weight) = module else { continue };
            if index == model.head.site.index {
                continue;
            }
            let clean = &before.iter().find(|(name, _)| *name == weight.name).unwrap().1;
            let columns = weight.value().size()[1] as usize;
            let stream = stream(Purpose::MatmulDw, Phase::Update, 2, index).unwrap();
            let expected: Vec<f32> = clean
                .iter()
                .enumerate()
                .map(|(i, g)| {
                    let row = (i / columns) as u32;
                    let z = normal(SEED, stream, row_key(UPDATE, row), (i % columns) as u32);
                    g.abs().mul_add(0.05 * z, *g)
                })
                .collect();
            assert_eq!(bits(&floats(&weight.gradient().unwrap())), bits(&expected), "{}", weight.name);
        }
        of_splits.push(gradients(&model));
    }
    for other in &of_splits[1..] {
        for ((name, got), (_, want)) in other.iter().zip(&of_splits[0]) {
            assert_relative(got, want, 1e-5, name);
        }
    }
}

/// Per micro-batch the split is part of the experiment, and each micro-batch draws for itself.
#[test]
fn per_microbatch_the_split_matters() {
    let noise = NoisyOpsSection {
        dw_draw: DwDraw::PerMicrobatch,
        phases: PhaseSet::of(&[InjectPhase::Backward]),
        ..noise_everywhere()
    };
    let whole = trainable(model(true));
    let split = trainable(model(true));
    update(&whole, &noise, 6);
    update(&split, &noise, 2);
    let down = |model: &Qwen2| floats(&model.blocks[1].mlp.down_proj.weight.gradient().unwrap());
    let (a, b) = (down(&whole), down(&split));
    let scale = a.iter().fold(0f32, |m, v| m.max(v.abs()));
    assert!(largest_difference(&a, &b) > 1e-3 * scale);
}

/// A scale that changes nothing visible must not lose or double anything either: every parameter's gradient is the
/// clean one, the head's too.
#[test]
fn no_gradient_is_lost_under_noise() {
    for tied in [true, false] {
        let clean = trainable(model(tied));
        accumulate(&clean, &NoisyOpsSection::default(), 3);
        for dw_draw in [DwDraw::PerUpdate, DwDraw::PerMicrobatch] {
            let noise = NoisyOpsSection { dw_draw, error_scale: 1e-7, ..noise_everywhere() };
            let noisy = trainable(model(tied));
            update(&noisy, &noise, 3);
            for ((name, got), (_, want)) in gradients(&noisy).iter().zip(&gradients(&clean)) {
                assert_relative(got, want, 1e-4, &format!("{name}, tied {tied}, {dw_draw:?}"));
            }
        }
    }
}
