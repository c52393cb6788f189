//! A loss or gradient that is not finite: the update is skipped, counted and leaves nothing behind; after
//! `max_skipped_steps` the run stops with an error and a checkpoint.

use temper::data::generated::Split;
use temper::inject::section::{InjectPhase, NoisyOpsSection, PhaseSet};
use temper::model::load::{load_model, random_model};
use temper::model::qwen2::Qwen2;
use temper::rl::optimizer::AdamW;
use temper::rl::rollout::Rollout;
use temper::rl::section::KlEstimator;
use temper::rl::update::UpdateSummary;

use crate::mutation::{train, training_rows};
use crate::support::{
    SEED, bits, first_step, floats, model, noise_everywhere, questions, recipe, tokenizer, trainable, update,
};

fn weights(model: &Qwen2) -> Vec<Vec<u32>> {
    model.parameters().iter().map(|p| bits(&floats(&p.master().unwrap_or(p.value().shallow_clone())))).collect()
}

/// A model and what updates it, all sequences of a step in one optimizer update.
struct Bench {
    recipe: temper::rl::recipe::Recipe,
    model: Qwen2,
    optimizer: AdamW,
    update_number: u32,
}

impl Bench {
    fn new(update_number: u32) -> Bench {
        let recipe = recipe(|r| {
            r.noisy_ops = noise_everywhere();
            r.optimizer.lr = 1e-3;
        });
        let optimizer = AdamW::new(recipe.optimizer.clone()).unwrap();
        Bench { recipe, model: trainable(model(true)), optimizer, update_number }
    }

    fn update(&mut self, experience: &Rollout) -> UpdateSummary {
        let injector = self.recipe.injector(&self.model.config.modules()).unwrap();
        let Bench { recipe, model, optimizer, update_number } = self;
        update(model, None, recipe, &injector, optimizer, update_number, experience)
    }

    fn experience(&self) -> Rollout {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = tokenizer(dir.path());
        let questions = questions(&self.recipe, &tokenizer, Split::Train, 4);
        let injector = self.recipe.injector(&self.model.config.modules()).unwrap();
        let mut experience = first_step(&self.model, &injector, &tokenizer, &self.recipe, &questions);
        let signs = experience.advantages.iter_mut().enumerate();
        signs.for_each(|(i, advantage)| *advantage = if i % 2 == 0 { 1.0 } else { -1.0 });
        experience
    }
}

/// The last micro-batch is poisoned, after others have left gradients: the next update is that of a run without it.
#[test]
fn a_skipped_update_leaves_nothing_behind() {
    for poison in [f64::NAN, f64::INFINITY] {
        let mut bench = Bench::new(0);
        let start = weights(&bench.model);
        let mut experience = bench.experience();
        let good = experience.advantages.clone();
        *experience.advantages.last_mut().unwrap() = poison;
        let summary = bench.update(&experience);
        assert_eq!((summary.updates, summary.skipped, bench.optimizer.counters().skipped_steps), (1, 1, 1));
        assert_eq!(weights(&bench.model), start);

        experience.advantages = good;
        let summary = bench.update(&experience);
        assert_eq!((summary.updates, summary.skipped, bench.optimizer.counters().skipped_steps), (1, 0, 1));
        let after = weights(&bench.model);
        assert_ne!(after, start);

        let mut other = Bench::new(1); // the skipped update had number 0
        let undisturbed = other.update(&experience);
        assert_eq!(summary.grad_norm.to_bits(), undisturbed.grad_norm.to_bits());
        assert!(after == weights(&other.model), "the update after a skipped one differs");
    }
}

/// Backward noise of 1e38 overflows every gradient while losses stay finite: every step is skipped.
#[test]
fn a_run_that_only_skips_stops_with_a_checkpoint() {
    let recipe = recipe(|r| {
        r.algorithm.kl_coef = 0.1;
        r.algorithm.kl_estimator = KlEstimator::K1;
        r.noisy_ops =
            NoisyOpsSection { error_scale: 1e38, phases: PhaseSet::of(&[InjectPhase::Backward]), ..noise_everywhere() };
        r.trainer.max_skipped_steps = 2;
    });
    let dir = tempfile::tempdir().unwrap();
    let error = train(&recipe, dir.path(), |plan| plan.clone()).err().unwrap();
    assert_eq!(error.exit_code(), 1);
    let text = error.to_string();
    assert!(text.contains("max_skipped_steps: 2") && text.lines().count() == 1, "{text}");

    let run = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).find(|p| p.join("run.json").exists());
    let run = run.unwrap();
    let rows = training_rows(&run);
    let skipped: Vec<f64> = rows.iter().map(|row| row["skipped_steps"].as_f64().unwrap()).collect();
    assert_eq!(skipped, [1.0, 1.0, 1.0], "stopped by the third");
    let saved = load_model(&run.join("latest"), tch::Device::Cpu, None).unwrap();
    let config = saved.config.clone();
    let start = random_model(config, SEED, 0.02, tch::Device::Cpu, tch::Kind::Float).unwrap();
    assert_eq!(weights(&saved), weights(&start), "no skipped step changed a weight");
}
