//! Small random models, sequences and recipes, all on the CPU in f32.

use std::cell::Cell;
use std::path::Path;

use tch::{Device, Kind, Tensor};
use temper::data::generated::{Split, Task, write_tokenizer};
use temper::device::gpu::monitor::Watch;
use temper::inject::injector::Injector;
use temper::inject::plan::InjectionPlan;
use temper::inject::section::{FakeQuantSection, NoiseInjectionSection, NoisyOpsSection};
use temper::model::config::Qwen2Config;
use temper::model::load::random_model;
use temper::model::pass::{PromptUid, Sequence};
use temper::model::qwen2::Qwen2;
use temper::model::tokenizer::Tokenizer;
use temper::numerics::generator::uniform_u32;
use temper::rl::microbatch::Halving;
use temper::rl::optimizer::AdamW;
use temper::rl::recipe::{PreparedQuestion, Recipe, prepare};
use temper::rl::reward::scorer::Scorer;
use temper::rl::rollout::{Rollout, Sampler};
use temper::rl::trainer::{Launch, Outcome, Workload, train_with};
use temper::rl::update::{UpdateSummary, Updater};
use temper::run::console::{Console, Verbosity};
use temper::run::signals::Interrupt;

pub const SEED: u64 = 11;

/// Two layers of the tiny preset, tied or not. Weights large enough that logits differ by several units.
pub fn model(tied: bool) -> Qwen2 {
    let tiny = Qwen2Config::preset("tiny-4x64").unwrap();
    let config = Qwen2Config { num_hidden_layers: 2, tie_word_embeddings: tied, ..tiny };
    random_model(config, 5, 0.2, Device::Cpu, Kind::Float).unwrap()
}

pub fn trainable(mut model: Qwen2) -> Qwen2 {
    for parameter in model.parameters_mut() {
        parameter.make_trainable().unwrap();
    }
    model
}

/// The experience of training step 1 on these questions.
pub fn first_step(
    model: &Qwen2,
    injector: &Injector,
    tokenizer: &Tokenizer,
    recipe: &Recipe,
    questions: &[PreparedQuestion],
) -> Rollout {
    let scorer = Scorer::new(&recipe.reward).unwrap();
    let all: Vec<_> = questions.iter().collect();
    let halvings = Cell::new(0);
    let sampler = Sampler {
        model,
        injector,
        tokenizer,
        recipe,
        scorer: &scorer,
        step: 1,
        halving: Halving { count: &halvings, warn: &|line| panic!("{line}") },
    };
    sampler.rollout(&all, &[], |_| {}).unwrap()
}

/// The update of one step, with sigma 0; memory does not run out in it.
pub fn update(
    model: &mut Qwen2,
    reference: Option<&mut Qwen2>,
    recipe: &Recipe,
    injector: &Injector,
    optimizer: &mut AdamW,
    update_number: &mut u32,
    experience: &Rollout,
) -> UpdateSummary {
    let mut updater = Updater {
        model,
        reference,
        injector,
        optimizer,
        recipe,
        update_number,
        halvings: &mut 0,
        step: 1,
        sigma: 0.0,
        progress: &mut |_| {},
        warn: &|line| panic!("{line}"),
    };
    updater.run(experience).unwrap()
}

/// 5 % matmul noise on every linear, the head included.
pub fn noise_everywhere() -> NoisyOpsSection {
    NoisyOpsSection { enabled: true, exclude_modules: vec![], ..NoisyOpsSection::default() }
}

pub fn plan(model: &Qwen2, aqn: &NoiseInjectionSection, noise: &NoisyOpsSection, seed: u64) -> InjectionPlan {
    let quant = FakeQuantSection::default();
    InjectionPlan::resolve(aqn, noise, &quant, &model.config.modules(), seed).unwrap()
}

pub fn injector_of(plan: InjectionPlan) -> Injector {
    Injector::applying(plan.clone(), plan, 1)
}

pub fn noisy(model: &Qwen2, noise: &NoisyOpsSection, seed: u64) -> Injector {
    injector_of(plan(model, &NoiseInjectionSection::default(), noise, seed))
}

/// Prompts of different lengths with two group members each, responses of different lengths.
pub fn sequences() -> Vec<Sequence> {
    let mut all = Vec::new();
    for (prompt, &prompt_len) in [5usize, 9, 3].iter().enumerate() {
        for member in 0..2u32 {
            let length = prompt_len + 4 + 3 * ((prompt + member as usize) % 3);
            let id = |p: usize| {
                let who = if p < prompt_len { 0 } else { 1 + member };
                2 + uniform_u32(1, 1, (prompt as u64) << 8 | u64::from(who), p as u32) % 43
            };
            let uid = PromptUid { step: 7, dataset_index: 100 + prompt as u32 };
            all.push(Sequence { uid, member, ids: (0..length).map(id).collect(), prompt_len });
        }
    }
    all
}

pub fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::<f32>::try_from(tensor.detach().to_kind(Kind::Float).contiguous().view([-1])).unwrap()
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

pub fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// [rows, cols] of keyed uniform values in [-1, 1).
pub fn uniform(rows: i64, cols: i64, key: u64) -> Tensor {
    let value = |i: i64| uniform_u32(9, 9, key, i as u32) as f32 / 2147483648.0 - 1.0;
    let values: Vec<f32> = (0..rows * cols).map(value).collect();
    Tensor::from_slice(&values).view([rows, cols])
}

/// The debug recipe over the generated task; `change` edits it.
pub fn recipe(change: impl FnOnce(&mut Recipe)) -> Recipe {
    let mut recipe = Recipe {
        name: "noise-test".into(),
        seed: SEED,
        hash: "00000000".into(),
        yaml: "name: noise-test\n".into(),
        model: Default::default(),
        data: Default::default(),
        rollout: Default::default(),
        algorithm: Default::default(),
        optimizer: Default::default(),
        trainer: Default::default(),
        reward: Default::default(),
        noisy_ops: NoisyOpsSection::default(),
        noise_injection: NoiseInjectionSection::default(),
        fake_quant: FakeQuantSection::default(),
    };
    recipe.model.preset = Some("tiny-4x64".into());
    recipe.model.dtype = temper::model::section::Dtype::F32;
    recipe.data.prompts_per_step = 4;
    recipe.data.prompt_suffix = String::new();
    recipe.data.max_prompt_tokens = 32;
    recipe.data.max_response_tokens = 10;
    recipe.rollout.group_size = 2;
    recipe.algorithm.kl_coef = 0.0;
    recipe.trainer.minibatch_prompts = 4;
    recipe.trainer.microbatch_sequences = 3;
    recipe.trainer.epochs = 2;
    recipe.trainer.val_before_train = false;
    recipe.trainer.val_every = 0;
    change(&mut recipe);
    recipe
}

/// The generated task's tokenizer, written into `dir`.
pub fn tokenizer(dir: &Path) -> Tokenizer {
    write_tokenizer(dir).unwrap();
    Tokenizer::from_dir(dir).unwrap().with_model_vocab_size(45).unwrap()
}

pub fn questions(recipe: &Recipe, tokenizer: &Tokenizer, split: Split, n: u32) -> Vec<PreparedQuestion> {
    prepare(&Task::new(0).questions(split, 0..n), &recipe.data, tokenizer).unwrap()
}

/// Trains `recipe` (8 problems, so 2 steps an epoch) into `out`, injecting `applied(plan)`.
pub fn train_small(
    recipe: &Recipe,
    out: &Path,
    monitor: Option<Watch>,
    applied: impl FnOnce(&InjectionPlan) -> InjectionPlan,
) -> temper::Result<Outcome> {
    let tokenizer_dir = out.join("tokenizer");
    std::fs::create_dir_all(&tokenizer_dir).unwrap();
    let tokenizer = tokenizer(&tokenizer_dir);
    let workload = Workload {
        train: questions(recipe, &tokenizer, Split::Train, 8),
        val: questions(recipe, &tokenizer, Split::Validation, 2),
        tokenizer,
        tokenizer_dir,
        source: "generated".into(),
        inputs: Vec::new(),
        _scratch: None,
    };
    let launch = Launch {
        device: Device::Cpu,
        device_name: "cpu".into(),
        out,
        resume: false,
        console: &Console::new(Verbosity::from_flags(true, 0)),
        interrupt: &Interrupt::never(),
        monitor,
    };
    train_with(recipe, &workload, &launch, applied)
}
