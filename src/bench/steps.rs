//! Whole training steps, or their rollouts, of a configuration on made-up prompts: the code of `rl/`, timed by phase.
//!
//! The recipe runs as it stands, and in turns with it the same without matmul error, on the same weights and lengths;
//! what the error costs is the ratio of the two. Prompts are random tokens, rewards alternate within a group, and a
//! response ends where its length says (`lengths.rs`).
//!
//! A phase ends when the device has done it. The breakdown's parts are the host's spans (`ops/profile.rs`): on a GPU,
//! where the host runs ahead, they say which part launched work, not how long it took.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::time::Instant;

use serde_json::{Map, Value};

use super::lengths::{Drawn, Lengths, Limits};
use super::step_report::{PhaseRow, Spread, StepReport, Variant};
use crate::device::gpu::monitor::{Monitor, Watch};
use crate::device::{Device, host};
use crate::inject::injector::Injector;
use crate::model::generate::Prompt;
use crate::model::load::model_of_section;
use crate::model::pass::PromptUid;
use crate::model::qwen2::Qwen2;
use crate::model::{aqn, calibration};
use crate::numerics::generator::uniform_u32;
use crate::numerics::noise_key::{Phase, Purpose, row_key, stream};
use crate::ops::cuda::memory::synchronize;
use crate::ops::profile::{self, Recorded, Recording, numbered};
use crate::rl::advantage::{advantages, zero_std_groups};
use crate::rl::flops::{StepWork, Work};
use crate::rl::memory::Demand;
use crate::rl::microbatch::Halving;
use crate::rl::optimizer::AdamW;
use crate::rl::recipe::Recipe;
use crate::rl::rollout::{Rollout, completions};
use crate::rl::section::Advantage;
use crate::rl::timing::Accounting;
use crate::rl::update::Updater;
use crate::run::machine::{CpuKind, SOURCES, git_commit, utc_now};
use crate::{Result, bail_input};

pub struct StepOptions<'a> {
    /// Only the rollouts.
    pub rollout_only: bool,
    /// Measured steps of each variant, after `warmup` that are not.
    pub steps: usize,
    pub warmup: usize,
    pub lengths: Lengths,
    pub device: Device,
    pub device_name: String,
    pub monitor: Option<Watch>,
    /// Called before each step.
    pub progress: &'a dyn Fn(&str),
    /// Told of what makes a step another one than was asked for.
    pub warn: &'a dyn Fn(&str),
}

/// Runs the steps; the report, and all spans of the measured steps.
///
/// # Errors
/// Those of the model, of a phase, and lengths that do not fit.
pub fn steps(recipe: &Recipe, options: &StepOptions) -> Result<(StepReport, Recording)> {
    if options.steps == 0 {
        bail_input!("--steps 0: expected at least 1");
    }
    (options.progress)("making the model");
    let mut bench = Bench::new(recipe, options)?;
    profile::start();
    let measured = bench.measure(options);
    let mut recording = profile::stop();
    let measured = measured?;
    recording.spans = std::mem::take(&mut bench.spans);
    Ok((bench.report(options, &measured), recording))
}

/// The recipe, or the recipe without matmul error.
struct Arm {
    name: &'static str,
    recipe: Recipe,
    injector: Injector,
}

struct Bench<'a> {
    recipe: &'a Recipe,
    device: Device,
    model: Qwen2,
    reference: Option<Qwen2>,
    arms: Vec<Arm>,
    optimizer: AdamW,
    update_number: u32,
    halvings: u32,
    rollout_halvings: Cell<u32>,
    prompts: Vec<Prompt>,
    drawn: Drawn,
    accounting: Accounting,
    monitor: Option<Monitor>,
    work: StepWork,
    spans: Vec<Recorded>,
    warnings: RefCell<Vec<String>>,
    /// The arm whose quantized weights the model holds.
    last_arm: Option<usize>,
}

/// One step: seconds by phase, the whole last; spans; what the machine said.
struct Measured {
    seconds: BTreeMap<&'static str, f64>,
    breakdown: BTreeMap<&'static str, f64>,
    machine: Map<String, Value>,
    /// Mean |old - rollout| of the response tokens' log-probs; of training alone.
    logprob_gap_abs: Option<f64>,
}

impl<'a> Bench<'a> {
    fn new(recipe: &'a Recipe, options: &StepOptions) -> Result<Bench<'a>> {
        let device = options.device;
        let mut model = model_of_section(&recipe.model, recipe.seed, device)?;
        let with_reference = !options.rollout_only && recipe.has_reference_model();
        let reference = with_reference.then(|| model_of_section(&recipe.model, recipe.seed, device)).transpose()?;
        if !options.rollout_only {
            model.make_trainable()?;
        }
        let limits = Limits {
            prompt: recipe.data.max_prompt_tokens,
            response: recipe.data.max_response_tokens,
            sequence: model.config.max_position_embeddings,
        };
        let group_size = recipe.rollout.group_size;
        let drawn = options.lengths.draw(recipe.data.prompts_per_step, group_size, recipe.seed, limits)?;
        let prompts = prompts(&drawn.prompts, model.config.vocab_size, recipe.seed)?;
        let arms = arms(recipe, &model, &prompts)?;
        let accounting = Accounting::of(recipe, &model.config, device, &options.device_name);
        Ok(Bench {
            recipe,
            device,
            reference,
            arms,
            optimizer: AdamW::new(recipe.optimizer.clone())?,
            update_number: 0,
            halvings: 0,
            rollout_halvings: Cell::new(0),
            prompts,
            drawn,
            accounting,
            monitor: options.monitor.as_ref().and_then(|watch| Monitor::start(watch, |_| {}).ok()),
            work: StepWork::default(),
            spans: Vec::new(),
            warnings: RefCell::default(),
            last_arm: None,
            model,
        })
    }

    /// For each arm its measured steps; arms take turns.
    fn measure(&mut self, options: &StepOptions) -> Result<Vec<Vec<Measured>>> {
        let mut all: Vec<Vec<Measured>> = self.arms.iter().map(|_| Vec::new()).collect();
        for round in 0..options.warmup + options.steps {
            for (arm, steps) in all.iter_mut().enumerate() {
                let is_warm = round >= options.warmup;
                let what = if is_warm { "step" } else { "warm-up" };
                let number = if is_warm { round - options.warmup } else { round } + 1;
                (options.progress)(&format!("{what} {number}, {}", self.arms[arm].name));
                let step = self.step(arm, round as u32 + 1, options)?;
                if is_warm {
                    steps.push(step);
                } else {
                    self.spans.clear();
                }
            }
        }
        Ok(all)
    }

    fn step(&mut self, arm: usize, number: u32, options: &StepOptions) -> Result<Measured> {
        // An arm measures its own quantization.
        if self.last_arm.replace(arm).is_some_and(|last| last != arm) {
            self.model.invalidate();
        }
        let Arm { recipe, injector, .. } = &self.arms[arm];
        let mut seconds = BTreeMap::new();
        self.monitor.iter().for_each(Monitor::begin_step);
        synchronize(self.device);
        self.accounting.begin_step();
        let _ = profile::take();
        let started = Instant::now();
        let whole = numbered("step", u64::from(number));
        let sigma = recipe.noise_injection.sigma_start;
        aqn::apply(&self.model, injector, number, sigma)?;
        let warn = |line: &str| {
            (options.warn)(line);
            self.warnings.borrow_mut().push(line.to_string());
        };
        let halving = Halving { count: &self.rollout_halvings, warn: &warn };
        let limits = Some(&self.drawn.responses[..]);
        let completed = completions(&self.model, injector, recipe, &self.prompts, limits, &halving, |_| {})?;
        if !injector.aqn_applies(Phase::Update) {
            aqn::clear(&self.model);
        }
        synchronize(self.device);
        seconds.insert("rollout", started.elapsed().as_secs_f64());
        let experience = experience(completed, recipe.rollout.group_size)?;
        let mut logprob_gap_abs = None;
        if !options.rollout_only {
            let updating = Instant::now();
            let summary = Updater {
                model: &mut self.model,
                reference: self.reference.as_mut(),
                injector,
                optimizer: &mut self.optimizer,
                recipe,
                update_number: &mut self.update_number,
                halvings: &mut self.halvings,
                step: number,
                sigma,
                progress: &mut |_| {},
                warn: &warn,
            }
            .run(&experience)?;
            synchronize(self.device);
            logprob_gap_abs = Some(summary.logprob_gap_abs);
            seconds.insert("logprobs", summary.seconds_logprobs);
            seconds.insert("update", updating.elapsed().as_secs_f64() - summary.seconds_logprobs);
        }
        aqn::clear(&self.model);
        let injected = injector.finish_step(u64::from(number), sigma)?;
        // A rollout alone has not run what is planned for the other phases.
        if let Some(first) = injected.disagreements.first().filter(|_| !options.rollout_only) {
            warn(&format!("what was injected is not what was planned: {first}"));
        }
        seconds.insert("step", started.elapsed().as_secs_f64());
        drop(whole);
        let recording = profile::take();
        let breakdown = recording.seconds_by_name();
        self.spans.extend(recording.spans);
        let mut machine = self.accounting.memory();
        machine.extend(self.monitor.as_ref().map(Monitor::end_step).unwrap_or_default());
        self.work = self.accounting.work(&experience);
        Ok(Measured { seconds, breakdown, machine, logprob_gap_abs })
    }

    fn report(&self, options: &StepOptions, measured: &[Vec<Measured>]) -> StepReport {
        let variants: Vec<Variant> =
            self.arms.iter().zip(measured).map(|(arm, steps)| self.variant(arm.name, steps)).collect();
        let plan = self.arms[0].injector.plan();
        let mut demand = Demand::of(self.recipe, &self.model.config, plan, self.device.is_cuda());
        let longest = |x: &[usize]| x.iter().max().copied().unwrap_or(0) as u64;
        demand.microbatch_tokens = demand.microbatch_tokens / demand.longest_sequence().max(1)
            * (longest(&self.drawn.prompts) + longest(&self.drawn.responses));
        demand.validation_sequences = 0;
        (demand.prompt_tokens, demand.response_tokens) = (longest(&self.drawn.prompts), longest(&self.drawn.responses));
        StepReport {
            bench: if options.rollout_only { "rollout" } else { "train" },
            name: self.recipe.name.clone(),
            config_hash: self.recipe.hash.clone(),
            seed: self.recipe.seed,
            machine: CpuKind::of_this_machine(),
            device: options.device_name.clone(),
            threads: rayon::current_num_threads(),
            version: env!("CARGO_PKG_VERSION"),
            torch: crate::device::kernels::TORCH_VERSION,
            commit: git_commit(),
            sources: SOURCES,
            date: utc_now(),
            parameters: self.model.config.parameter_count(),
            lengths: options.lengths.name(),
            sequences: self.drawn.responses.len(),
            group_size: self.recipe.rollout.group_size,
            prompt_tokens_mean: mean(&self.drawn.prompts),
            response_tokens_mean: mean(&self.drawn.responses),
            response_tokens_max: longest(&self.drawn.responses),
            warmup_steps: options.warmup,
            steps: options.steps,
            noise_time_ratio: StepReport::noise_time_ratio(&variants),
            estimated_device_bytes: (!options.rollout_only).then(|| demand.estimate().peak_bytes),
            peak_host_bytes: host::peak_memory_bytes(),
            warnings: self.warnings.borrow().clone(),
            variants,
        }
    }

    fn variant(&self, name: &'static str, steps: &[Measured]) -> Variant {
        let work = &self.work;
        let all =
            Work { flops: work.rollout.flops + work.logprobs.flops + work.update.flops, tokens: work.update.tokens };
        let named = [("rollout", work.rollout), ("logprobs", work.logprobs), ("update", work.update), ("step", all)];
        let phases = named.into_iter().filter_map(|(phase, work)| {
            let seconds: Vec<f64> = steps.iter().filter_map(|step| step.seconds.get(phase).copied()).collect();
            // The whole step of a rollout benchmark is its rollout.
            let is_there = !seconds.is_empty() && (phase != "step" || steps[0].seconds.len() > 2);
            is_there.then(|| PhaseRow::new(phase, Spread::of(&seconds), work, self.accounting.ceiling_flop_per_s()))
        });
        let of_machine =
            |key: &str| -> Vec<f64> { steps.iter().filter_map(|step| step.machine.get(key)?.as_f64()).collect() };
        let median = |all: Vec<f64>| (!all.is_empty()).then(|| Spread::of(&all).median);
        let mut breakdown = BTreeMap::new();
        for part in steps.iter().flat_map(|step| step.breakdown.keys().copied()) {
            let seconds: Vec<f64> = steps.iter().filter_map(|step| step.breakdown.get(part).copied()).collect();
            breakdown.insert(part, Spread::of(&seconds).median);
        }
        Variant {
            name,
            phases: phases.collect(),
            breakdown_s: breakdown,
            update_recomputed_flops: steps
                .iter()
                .any(|s| s.seconds.contains_key("update"))
                .then_some(work.recomputed_flops),
            logprob_gap_abs: median(steps.iter().filter_map(|step| step.logprob_gap_abs).collect()),
            peak_device_bytes: of_machine("peak_device_bytes").into_iter().reduce(f64::max).map(|bytes| bytes as u64),
            energy_j: median(of_machine("gpu_energy_j")),
        }
    }
}

/// The recipe, and where it has matmul error also without.
fn arms(recipe: &Recipe, model: &Qwen2, prompts: &[Prompt]) -> Result<Vec<Arm>> {
    let mut recipes = vec![("recipe", recipe.clone())];
    if recipe.noisy_ops.enabled {
        let mut clean = recipe.clone();
        clean.noisy_ops.enabled = false;
        recipes.push(("without_matmul_error", clean));
    }
    let calibrated = prompts.iter().take(recipe.fake_quant.calibration_prompts());
    let ids: Vec<&[u32]> = calibrated.map(|prompt| prompt.ids.as_slice()).collect();
    let arm = |(name, recipe): (&'static str, Recipe)| {
        let mut injector = recipe.injector(&model.module_specs())?;
        injector.set_activation_amax(calibration::calibrate(model, injector.plan(), &ids)?);
        Ok(Arm { name, recipe, injector })
    };
    recipes.into_iter().map(arm).collect()
}

/// Random tokens.
fn prompts(lengths: &[usize], vocab: usize, seed: u64) -> Result<Vec<Prompt>> {
    let stream = stream(Purpose::Other, Phase::Rollout, 0, 4)?;
    let id = |prompt: u32, n: u32| uniform_u32(seed, stream, row_key(0, prompt), n) % vocab as u32;
    let prompt = |(p, &length): (usize, &usize)| Prompt {
        uid: PromptUid { step: 1, dataset_index: p as u32 },
        ids: (0..length as u32).map(|n| id(p as u32, n)).collect(),
    };
    Ok(lengths.iter().enumerate().map(prompt).collect())
}

/// Rewards 0 and 1 in turn within a group, so that advantages and gradients are not 0.
fn experience(completions: Vec<crate::model::generate::Completion>, group_size: usize) -> Result<Rollout> {
    let rewards: Vec<Option<f64>> = (0..completions.len()).map(|s| Some(((s % group_size) % 2) as f64)).collect();
    Ok(Rollout {
        advantages: advantages(Advantage::Grpo, &rewards, group_size)?,
        zero_std_groups: zero_std_groups(&rewards, group_size)?,
        completions,
        rewards,
        ..Rollout::default()
    })
}

fn mean(x: &[usize]) -> f64 {
    x.iter().sum::<usize>() as f64 / x.len().max(1) as f64
}
