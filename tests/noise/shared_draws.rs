//! `draw: shared`: rollout, old log-probs and first update see one draw, so the first mini-batch's ratio is exactly 1;
//! `draw: independent`: each phase has its own.

use temper::data::generated::Split;
use temper::inject::section::{DrawMode, NoisyOpsSection};
use temper::model::logprobs::response_logprobs;
use temper::model::pass::{Pass, Sequence};
use temper::numerics::noise_key::Phase;
use temper::ops::matmul_error::RowKeys;
use temper::rl::optimizer::AdamW;
use temper::rl::recipe::Recipe;
use temper::rl::rollout::Rollout;
use temper::rl::update::UpdateSummary;

use crate::support::{
    bits, first_step, floats, largest_difference, model, noise_everywhere, questions, recipe, tokenizer, trainable,
    update,
};

fn recipe_with(draw: DrawMode) -> Recipe {
    recipe(|r| {
        r.noisy_ops = NoisyOpsSection { draw, ..noise_everywhere() };
        r.rollout.temperature = 0.8;
        r.trainer.minibatch_prompts = 2;
    })
}

/// One step's rollout and update: two mini-batches of two micro-batches (3 + 1 sequences).
fn step(recipe: &Recipe) -> (Rollout, UpdateSummary, f32) {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer(dir.path());
    let questions = questions(recipe, &tokenizer, Split::Train, 4);
    let mut model = trainable(model(true));
    let injector = recipe.injector(&model.config.modules()).unwrap();
    let mut experience = first_step(&model, &injector, &tokenizer, recipe, &questions);
    for (i, advantage) in experience.advantages.iter_mut().enumerate() {
        *advantage = if i % 2 == 0 { 1.0 } else { -1.0 };
    }

    // The two passes whose ratio enters the loss, micro-batch by micro-batch.
    let mut largest_gap = 0f32;
    for minibatch in experience.completions.chunks(4) {
        for microbatch in minibatch.chunks(recipe.trainer.microbatch_sequences) {
            let sequences: Vec<&Sequence> = microbatch.iter().map(|c| &c.sequence).collect();
            let sampled: Vec<f32> = microbatch.iter().flat_map(|c| c.logprobs.clone()).collect();
            let of = |phase, differentiable| {
                let pass = Pass { differentiable, ..Pass::injected(&injector, phase, RowKeys::new(vec![])) };
                floats(&response_logprobs(&model, &sequences, 0.8, &pass).unwrap().logprobs)
            };
            let (old, new) = (of(Phase::OldLogprobs, false), of(Phase::Update, true));
            let same = bits(&old) == bits(&new);
            assert_eq!(same, recipe.noisy_ops.draw == DrawMode::Shared, "every ratio is exactly 1");
            largest_gap = largest_gap.max(largest_difference(&old, &sampled));
        }
    }

    let mut optimizer = AdamW::new(recipe.optimizer.clone()).unwrap();
    let mut update_number = 0;
    let summary = update(&mut model, None, recipe, &injector, &mut optimizer, &mut update_number, &experience);
    assert_eq!((summary.updates, summary.skipped, update_number), (2, 0, 2));
    (experience, summary, largest_gap)
}

#[test]
fn shared_draws_make_the_first_ratio_exactly_one() {
    for quantized in [false, true] {
        let mut recipe = recipe_with(DrawMode::Shared);
        recipe.fake_quant.enabled = quantized;
        let (_, summary, largest_gap) = step(&recipe);
        assert_eq!(summary.first_ratio_max.to_bits(), 1f64.to_bits());
        assert!(largest_gap <= 1e-5, "old against rollout: {largest_gap}");
        assert!(summary.logprob_gap_abs <= 1e-5);
        assert!(summary.grad_norm > 0.0);
    }
}

#[test]
fn independent_draws_do_not() {
    let (_, summary, largest_gap) = step(&recipe_with(DrawMode::Independent));
    assert!(summary.first_ratio_max > 1.01, "{}", summary.first_ratio_max);
    assert!(largest_gap > 1e-2 && summary.logprob_gap_abs > 1e-3);
}

/// What is sampled under one draw is the same experience in both modes only by accident; run twice it is the same.
#[test]
fn a_step_repeats_to_the_bit() {
    let recipe = recipe_with(DrawMode::Independent);
    let (first, a, _) = step(&recipe);
    let (second, b, _) = step(&recipe);
    assert_eq!(first.texts, second.texts);
    for (a, b) in first.completions.iter().zip(&second.completions) {
        assert_eq!(bits(&a.logprobs), bits(&b.logprobs));
    }
    assert_eq!(a.grad_norm.to_bits(), b.grad_norm.to_bits());
    assert_eq!(a.loss.policy_loss.to_bits(), b.loss.policy_loss.to_bits());
}
