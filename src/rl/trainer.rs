//! The training run, top to bottom: validate, then per step noise, rollout, rewards, update, measure, log, checkpoint.

use std::cell::Cell;
use std::time::Instant;

use serde_json::Value;
use tch::Device;

pub use super::launch::{Launch, Outcome, Workload, check_lengths};

use super::evaluation::{Condition, Evaluation, Validation};
use super::metrics::{metrics_row, sample_rows, validation_row};
use super::microbatch::{Halving, Halvings};
use super::optimizer::AdamW;
use super::recipe::Recipe;
use super::reward::scorer::Scorer;
use super::rollout::Sampler;
use super::state::{self, TrainerState};
use super::stop_rules::StopRules;
use super::timing::{Accounting, start_monitor, timing_line, timing_row};
use super::update::{Updater, check_skipped};
use crate::device::gpu::monitor::Monitor;
use crate::inject::injector::Injector;
use crate::inject::measured::StepInjection;
use crate::inject::plan::InjectionPlan;
use crate::inject::schedule::SigmaSchedule;
use crate::model::load::model_of_section;
use crate::model::qwen2::Qwen2;
use crate::model::{aqn, calibration};
use crate::numerics::generator::NOISE_VERSION;
use crate::ops::profile::numbered;
use crate::run::checkpoints::{CheckpointScore, CheckpointStore, Retention};
use crate::run::directory::{RunDir, RunSpec, Start};
use crate::run::jsonl::JsonlWriter;
use crate::run::stopped;
use crate::run::tensorboard::TensorBoard;
use crate::{Error, Result, bail_input};

/// Trains to the end, or to the step at which a signal asked to stop (then `Error::Interrupted`, after a checkpoint).
pub fn train(recipe: &Recipe, workload: &Workload, launch: &Launch) -> Result<Outcome> {
    train_with(recipe, workload, launch, |planned| planned.clone())
}

/// As [`train`], but injects `applied(plan)` while it expects the plan: tests show with it that a run notices
/// multipliers that were dropped or a scale that is 0.
pub fn train_with(
    recipe: &Recipe,
    workload: &Workload,
    launch: &Launch,
    applied: impl FnOnce(&InjectionPlan) -> InjectionPlan,
) -> Result<Outcome> {
    if recipe.model.lora.is_some() && recipe.model.path.is_none() {
        bail_input!(
            "model.path: found null with model.lora, expected a model directory: an adapter belongs to weights"
        );
    }
    let mut model = model_of_section(&recipe.model, recipe.seed, launch.device)?;
    check_lengths(recipe, workload, &model.config)?;
    let home = if recipe.trainer.offload_reference { Device::Cpu } else { launch.device };
    let with_reference = recipe.has_reference_model();
    let reference = with_reference.then(|| model_of_section(&recipe.model, recipe.seed, home)).transpose()?;
    model.make_trainable()?;
    let planned = recipe.injection_plan(&model.module_specs())?;
    let injector = Injector::applying(applied(&planned), planned, recipe.rollout.group_size as u64);
    let schedule = recipe.schedule(workload.train.len())?;
    let scorer = Scorer::new(&recipe.reward)?;
    let run_dir = RunDir::open(&RunSpec {
        root: launch.out,
        name: &recipe.name,
        config_hash: &recipe.hash,
        seed: recipe.seed,
        config_yaml: &recipe.yaml,
        inputs: &workload.inputs,
        resume: launch.resume,
        device: &launch.device_name,
        threads: tch::get_num_threads() as usize,
        libtorch_version: crate::device::kernels::TORCH_VERSION.map(str::to_string),
        noise_version: NOISE_VERSION,
    })?;
    let mut run = Run::open(recipe, workload, launch, run_dir, model, reference, injector, schedule, scorer)?;
    run.train()
}

struct Run<'a> {
    recipe: &'a Recipe,
    workload: &'a Workload,
    launch: &'a Launch<'a>,
    dir: RunDir,
    model: Qwen2,
    reference: Option<Qwen2>,
    injector: Injector,
    schedule: SigmaSchedule,
    optimizer: AdamW,
    state: TrainerState,
    store: CheckpointStore,
    metrics: JsonlWriter,
    timing: JsonlWriter,
    injection: JsonlWriter,
    samples: JsonlWriter,
    tensorboard: TensorBoard,
    last_score: Option<CheckpointScore>,
    rules: StopRules,
    scorer: Scorer,
    monitor: Option<Monitor>,
    accounting: Accounting,
    outcome: Outcome,
}

impl<'a> Run<'a> {
    fn open(
        recipe: &'a Recipe,
        workload: &'a Workload,
        launch: &'a Launch<'a>,
        dir: RunDir,
        mut model: Qwen2,
        reference: Option<Qwen2>,
        mut injector: Injector,
        schedule: SigmaSchedule,
        scorer: Scorer,
    ) -> Result<Run<'a>> {
        launch.console.log_to(&dir.file("console.log"))?;
        for warning in dir.warnings() {
            launch.console.warn(warning);
        }
        let retention = Retention { keep_last: recipe.trainer.keep_last, keep_best: recipe.trainer.keep_best };
        let store = CheckpointStore::open(dir.path(), retention)?;
        let mut optimizer = AdamW::scheduled(recipe.optimizer.clone(), recipe.total_updates(&schedule))?;
        let (state, resumed_after) = match dir.start() {
            Start::Fresh => {
                let prompts = recipe.calibration_prompts(&workload.train);
                injector.set_activation_amax(calibration::calibrate(&model, injector.plan(), &prompts)?);
                (
                    TrainerState {
                        step: 0,
                        update_number: 0,
                        optimizer: optimizer.counters(),
                        halvings: Halvings::default(),
                    },
                    None,
                )
            }
            Start::Resume { step, checkpoint } => {
                injector.set_activation_amax(state::restore_activation_amax(checkpoint, injector.plan())?);
                let state = state::restore(checkpoint, &mut model, &mut optimizer)?;
                launch.console.note(&format!("resuming after step {step} from {}", checkpoint.display()));
                (state, Some(*step))
            }
        };
        Ok(Run {
            metrics: JsonlWriter::open(&dir.file("metrics.jsonl"))?,
            timing: JsonlWriter::open(&dir.file("timing.jsonl"))?,
            injection: JsonlWriter::open(&dir.file("injection.jsonl"))?,
            samples: JsonlWriter::open(&dir.file("samples.jsonl"))?,
            tensorboard: TensorBoard::open(&dir.file("tb"), resumed_after)?,
            outcome: Outcome { run_dir: dir.path().to_path_buf(), validations: Vec::new(), disagreeing_steps: 0 },
            last_score: None,
            scorer,
            rules: StopRules::replay(&recipe.trainer.stop_rules, &dir.file("metrics.jsonl"))?,
            monitor: start_monitor(launch.monitor.as_ref(), launch.console),
            accounting: Accounting::of(recipe, &model.config, launch.device, &launch.device_name),
            recipe,
            workload,
            launch,
            dir,
            model,
            reference,
            injector,
            schedule,
            optimizer,
            state,
            store,
        })
    }

    fn train(&mut self) -> Result<Outcome> {
        let total = self.schedule.total_steps();
        let console = self.launch.console;
        console.note(&format!("run directory {}", self.dir.path().display()));
        self.injector.plan().notices.iter().for_each(|notice| console.warn(notice));
        let notices = self.recipe.notices(self.model.config.max_position_embeddings);
        notices.iter().for_each(|notice| console.note(&format!("notice: {notice}")));
        // The rows that are there decide, under the rules of now: a rule may be new, or gone. A run that had gone on for long
        // when a new rule would have ended it was not ended by it.
        match self.rules.fired() {
            Some(stopped) if stopped.step < self.state.step => {
                console.warn(&format!(
                    "{stopped}; that was {} steps ago, and it was not a rule then",
                    self.state.step - stopped.step
                ));
                stopped::write(self.dir.path(), None)?;
            }
            _ => self.write_stopped()?,
        }
        if self.state.step == 0 && self.recipe.trainer.val_before_train {
            self.validate(0)?;
        }
        while self.state.step < total && self.rules.fired().is_none() {
            let step = self.state.step + 1;
            self.step(step)?;
            self.state.step = step;
            self.state.optimizer = self.optimizer.counters();
            let trainer = &self.recipe.trainer;
            let due = |every: u64| every > 0 && step.is_multiple_of(every);
            if due(trainer.val_every) || step == total || self.rules.fired().is_some() {
                self.validate(step)?;
            }
            let (stop, fired) = (self.launch.interrupt.requested(), self.rules.fired().is_some());
            let skipped = check_skipped(self.optimizer.counters().skipped_steps, trainer.max_skipped_steps);
            if due(trainer.save_every) || step == total || stop || fired || skipped.is_err() {
                self.save(step)?;
            }
            skipped?;
            if fired {
                self.write_stopped()?;
            } else if stop && step < total {
                return Err(Error::Interrupted(format!(
                    "stopped after step {step} of {total}; a checkpoint is in {}; continue with --resume",
                    self.dir.path().display()
                )));
            }
        }
        let empty = Outcome { run_dir: self.dir.path().to_path_buf(), validations: Vec::new(), disagreeing_steps: 0 };
        Ok(std::mem::replace(&mut self.outcome, empty))
    }

    /// stopped.json, as the rules say now; a resume that finds it written anew has nothing left to do.
    fn write_stopped(&self) -> Result<()> {
        if let Some(stopped) = self.rules.fired() {
            self.launch.console.note(&format!("the run is over: {stopped}; --set trainer.stop_rules=[] goes on"));
        }
        stopped::write(self.dir.path(), self.rules.fired())
    }

    fn step(&mut self, step: u64) -> Result<()> {
        let (started, _span) = (Instant::now(), numbered("step", step));
        self.monitor.iter().for_each(Monitor::begin_step);
        self.accounting.begin_step();
        let sigma = self.schedule.sigma(step);
        let key_step = step as u32;
        let asked = self.recipe.step_questions(self.workload.train.len(), &self.schedule, step)?;
        let [questions, further] =
            asked.map(|indices| indices.iter().map(|&i| &self.workload.train[i]).collect::<Vec<_>>());
        let console = self.launch.console;

        aqn::apply(&self.model, &self.injector, key_step, sigma)?;
        let sequences = (questions.len() * self.recipe.rollout.group_size) as u64;
        let mut bar = console.progress(&format!("step {step}"), 2 * sequences);
        bar.set_message("rollout");
        let halvings = Cell::new(self.state.halvings.rollout);
        let sampler = Sampler {
            model: &self.model,
            injector: &self.injector,
            tokenizer: &self.workload.tokenizer,
            recipe: self.recipe,
            scorer: &self.scorer,
            step: key_step,
            halving: Halving { count: &halvings, warn: &|line| console.warn(line) },
        };
        let experience = sampler.rollout(&questions, &further, |done| bar.inc(done as u64))?;
        self.state.halvings.rollout = halvings.get();
        experience.warnings.iter().for_each(|warning| console.warn(warning));
        if !self.injector.aqn_applies(crate::numerics::noise_key::Phase::Update) {
            aqn::clear(&self.model);
        }
        let seconds_rollout = started.elapsed().as_secs_f64();

        bar.set_message("update");
        let summary = Updater {
            model: &mut self.model,
            reference: self.reference.as_mut(),
            injector: &self.injector,
            optimizer: &mut self.optimizer,
            recipe: self.recipe,
            update_number: &mut self.state.update_number,
            halvings: &mut self.state.halvings.microbatch,
            step: key_step,
            sigma,
            progress: &mut |done| bar.inc(done),
            warn: &|line| console.warn(line),
        }
        .run(&experience)?;
        aqn::clear(&self.model);
        bar.finish();

        let injected = self.injector.finish_step(step, sigma)?;
        self.report_disagreements(&injected);
        let row = metrics_row(self.recipe, step, self.schedule.epoch(step), &experience, &summary, &injected);
        self.metrics.write(&row)?;
        self.injection.write_rows(&injected.rows)?;
        self.samples.write_rows(&sample_rows(step, &experience, self.recipe.trainer.samples_per_step))?;
        self.tensorboard.row(step, &row)?;
        console.step(&row);
        self.rules.observe(&row);
        let monitor = self.monitor.as_ref();
        let row = timing_row(step, started, seconds_rollout, &experience, &summary, &self.accounting, monitor);
        console.detail(&timing_line(&row));
        self.timing.write(&row)
    }

    fn report_disagreements(&mut self, injected: &StepInjection) {
        let Some(first) = injected.disagreements.first() else { return };
        self.outcome.disagreeing_steps += 1;
        let more = injected.disagreements.len() - 1;
        let rest = if more > 0 { format!(" (and {more} more of this step)") } else { String::new() };
        self.launch.console.warn(&format!("what was injected is not what was planned: {first}{rest}"));
    }

    fn validate(&mut self, step: u64) -> Result<()> {
        let console = self.launch.console;
        let conditions = Condition::applying(&self.injector);
        let halvings = Cell::new(self.state.halvings.validation);
        let evaluation = Evaluation {
            model: &self.model,
            tokenizer: &self.workload.tokenizer,
            questions: &self.workload.val,
            scorer: &self.scorer,
            max_new_tokens: self.recipe.data.max_response_tokens,
            batching: self.recipe.validation_batching(),
            halving: Halving { count: &halvings, warn: &|line| console.warn(line) },
        };
        let mut results = Vec::new();
        for condition in conditions {
            let label = format!("validation ({})", condition.name());
            let mut bar = console.progress(&label, self.workload.val.len() as u64);
            let answers = evaluation.run(&condition.pass(&self.injector), |done| bar.inc(done as u64))?;
            bar.finish();
            self.scorer.take_warnings().iter().for_each(|warning| console.warn(warning));
            results.push((condition, answers));
        }
        self.state.halvings.validation = halvings.get();
        let validation = Validation { step, conditions: results };
        let row = validation_row(&validation, if step == 0 { 0 } else { self.schedule.epoch(step) });
        self.metrics.write(&row)?;
        self.tensorboard.row(step, &row)?;
        self.rules.observe(&row);
        if let Some((headline, accuracy)) = validation.headline() {
            let n = self.workload.val.len() as u64;
            let others: Vec<(&str, f64)> = validation
                .conditions
                .iter()
                .filter(|(c, _)| *c != headline)
                .filter_map(|(c, _)| Some((c.name(), validation.correct(*c)?.0 as f64 / n.max(1) as f64)))
                .collect();
            console.validation(step, &self.workload.source, accuracy, &others, n);
            let own = format!("val/acc_{}", headline.name());
            let metric = self.recipe.trainer.best_metric.clone().unwrap_or(own);
            let value = row.get(&metric).and_then(Value::as_f64);
            self.last_score = value.map(|value| CheckpointScore { metric, value });
        }
        self.outcome.validations.push(validation);
        Ok(())
    }

    fn save(&mut self, step: u64) -> Result<()> {
        for file in [&mut self.metrics, &mut self.injection, &mut self.samples] {
            file.sync()?;
        }
        let pending = self.store.begin(step)?;
        state::save(
            pending.path(),
            &pending.trainer_path(),
            &self.model,
            self.recipe.model.dtype,
            Some(&self.workload.tokenizer_dir),
            &self.optimizer,
            &self.state,
        )?;
        calibration::write(pending.path(), &self.injector)?;
        // Only a score of this very step says how good this checkpoint is.
        let score = self.outcome.validations.last().filter(|v| v.step == step).and(self.last_score.clone());
        let path = pending.commit(score)?;
        self.launch.console.detail(&format!("checkpoint {}", path.display()));
        Ok(())
    }
}
