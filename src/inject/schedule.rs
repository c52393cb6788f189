//! Annealed sigma of AQN, step by step.
//!
//! Training step t = 1..T uses u = t-1; N steps per epoch, E epochs, T = N*E; integer arithmetic:
//! - step-based (K stages): j = min(floor(u*K/T), K-1); j = 0 is clean, otherwise
//!   sigma = start*(end/start)^((j-1)/(K-2)), start for K = 2.
//! - epoch-aware (S noisy stages an epoch): b_i = start*(end/start)^(i/E); e = floor(u/N),
//!   r = u - e*N, k = min(floor(r*(S+1)/N), S); k = 0 is clean, otherwise
//!   sigma = b_e*(b_{e+1}/b_e)^((k-1)/(S-1)), b_e for S = 1.
//! - constant: start at every step.
//!
//! `warmup_stage: false` drops the clean stage: its steps are shared among the noisy ones.
//! `layer_sigma_config.base_sigma` replaces start and keeps end/start.

use super::multipliers;
use super::section::{Compat, NoiseInjectionSection, ScheduleKind};
use crate::{Result, input_error};

const DEFAULT_STAGES_PER_EPOCH: u64 = 5;
const DEFAULT_NUM_STAGES: u64 = 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// AQN is disabled, or `compat: original` reproduces an epoch-aware schedule that was always 0.
    Off,
    StepBased {
        stages: u64,
    },
    EpochAware {
        stages: u64,
    },
    Constant,
}

/// Sigma as a function of the training step.
#[derive(Clone, Debug, PartialEq)]
pub struct SigmaSchedule {
    kind: Kind,
    start: f64,
    end: f64,
    steps_per_epoch: u64,
    epochs: u64,
    warmup_stage: bool,
    unused: Vec<String>,
}

impl SigmaSchedule {
    /// Errors: the rules of `check`, and an empty schedule (no step per epoch).
    pub fn resolve(section: &NoiseInjectionSection, steps_per_epoch: u64, epochs: u64) -> Result<SigmaSchedule> {
        check(section, epochs).map_err(|(key, message)| input_error!("noise_injection.{key}: {message}"))?;
        if steps_per_epoch == 0 || epochs == 0 {
            return Err(input_error!(
                "no training step: {steps_per_epoch} steps per epoch, {epochs} epochs; data.prompts_per_step is larger than the training rows"
            ));
        }
        if steps_per_epoch.checked_mul(epochs).is_none_or(|steps| steps >= 0xFFFF) {
            return Err(input_error!(
                "trainer.epochs: found {epochs} epochs x {steps_per_epoch} steps, expected at most 65534 steps, which is what the noise keys hold"
            ));
        }
        let configured =
            configured_kind(section).map_err(|(key, message)| input_error!("noise_injection.{key}: {message}"))?;
        let mut kind = if section.enabled { configured } else { Kind::Off };
        if section.compat == Some(Compat::Original) && matches!(configured, Kind::EpochAware { .. }) {
            kind = Kind::Off;
        }
        let (start, end) = range(section);
        Ok(SigmaSchedule {
            kind,
            start,
            end,
            steps_per_epoch,
            epochs,
            warmup_stage: section.warmup_stage,
            unused: unused_keys(section, configured),
        })
    }

    /// Sigma of the rollout of training step 1..=T; steps outside give the nearest one's.
    pub fn sigma(&self, step: u64) -> f64 {
        let stage = self.stage(step);
        let clean = u64::from(self.warmup_stage);
        match self.kind {
            Kind::Off => 0.0,
            Kind::Constant => self.start,
            _ if stage < clean => 0.0,
            Kind::StepBased { stages } => anneal(self.start, self.end, stage - clean, stages - clean),
            Kind::EpochAware { stages } => {
                let (from, to) = (self.boundary(self.epoch(step)), self.boundary(self.epoch(step) + 1));
                anneal(from, to, stage - clean, stages)
            }
        }
    }

    /// Epoch of a step, from 0.
    pub fn epoch(&self, step: u64) -> u64 {
        self.lookup(step) / self.steps_per_epoch
    }

    /// Stage of a step, from 0: within the run (step-based) or the epoch (epoch-aware). Stage 0 is
    /// the clean one unless `warmup_stage: false`.
    pub fn stage(&self, step: u64) -> u64 {
        let u = self.lookup(step);
        match self.kind {
            Kind::Off | Kind::Constant => 0,
            Kind::StepBased { stages } => (u * stages / self.total_steps()).min(stages - 1),
            Kind::EpochAware { stages } => {
                let slots = stages + u64::from(self.warmup_stage);
                ((u % self.steps_per_epoch) * slots / self.steps_per_epoch).min(slots - 1)
            }
        }
    }

    pub fn steps_per_epoch(&self) -> u64 {
        self.steps_per_epoch
    }

    pub fn total_steps(&self) -> u64 {
        self.steps_per_epoch * self.epochs
    }

    /// Keys that are set but mean nothing in this kind of schedule.
    pub fn unused_keys(&self) -> &[String] {
        &self.unused
    }

    /// Said where the run is too short for its stages: an enabled AQN that injects nothing, or less than
    /// its schedule names.
    pub fn notices(&self) -> Vec<String> {
        let stages = match self.kind {
            Kind::Off | Kind::Constant => return Vec::new(),
            Kind::StepBased { stages } => stages,
            Kind::EpochAware { stages } => stages + u64::from(self.warmup_stage),
        };
        let (steps, of) = match self.kind {
            Kind::EpochAware { .. } => (self.steps_per_epoch, "an epoch"),
            _ => (self.total_steps(), "the run"),
        };
        if steps >= stages {
            return Vec::new();
        }
        vec![format!(
            "noise_injection: {of} has {steps} steps for {stages} stages: some stages of sigma are never used"
        )]
    }

    fn lookup(&self, step: u64) -> u64 {
        step.saturating_sub(1).min(self.total_steps() - 1)
    }

    /// b_i = start*(end/start)^(i/E).
    fn boundary(&self, i: u64) -> f64 {
        self.start * (self.end / self.start).powf(i as f64 / self.epochs as f64)
    }
}

/// from*(to/from)^(i/(n-1)); from for n = 1.
fn anneal(from: f64, to: f64, i: u64, n: u64) -> f64 {
    if n <= 1 { from } else { from * (to / from).powf(i as f64 / (n - 1) as f64) }
}

/// sigma_start and sigma_end after base_sigma.
fn range(section: &NoiseInjectionSection) -> (f64, f64) {
    let base = multipliers::in_force(section).and_then(|config| config.base_sigma);
    match base {
        Some(base) => (base, base * (section.sigma_end / section.sigma_start)),
        None => (section.sigma_start, section.sigma_end),
    }
}

type Violation = (String, String);

/// The rules of a sigma schedule that do not depend on the steps per epoch: (key within
/// noise_injection, why it cannot be used).
pub fn check(section: &NoiseInjectionSection, epochs: u64) -> std::result::Result<(), Violation> {
    let fail = |key: &str, message: String| Err((key.to_string(), message));
    let constant = section.schedule == ScheduleKind::Constant;
    for (key, sigma) in [("sigma_start", section.sigma_start), ("sigma_end", section.sigma_end)] {
        if !sigma.is_finite() || sigma < 0.0 {
            return fail(key, format!("found {sigma}, expected a number above 0: sigma is a standard deviation"));
        }
    }
    if section.sigma_start == 0.0 {
        return fail("sigma_start", "found 0, expected a number above 0: sigma decays by a constant ratio, which 0 does not have (enabled: false turns AQN off)".to_string());
    }
    if section.sigma_end == 0.0 && !constant {
        return fail(
            "sigma_end",
            "found 0, expected a number above 0: sigma decays by a constant ratio from sigma_start and never reaches 0"
                .to_string(),
        );
    }
    if let Some(base) = section.layer_sigma_config.as_ref().and_then(|config| config.base_sigma)
        && !(base.is_finite() && base > 0.0)
    {
        return fail(
            "layer_sigma_config.base_sigma",
            format!("found {base}, expected a number above 0: it replaces sigma_start"),
        );
    }
    if let Some(stages @ 0..=1) = section.num_stages {
        return fail(
            "num_stages",
            format!(
                "found {stages}, expected 2 or more: the first stage is clean, so with fewer nothing would ever be injected"
            ),
        );
    }
    if section.stages_per_epoch == Some(0) {
        return fail(
            "stages_per_epoch",
            "found 0, expected 1 or more: with none nothing would ever be injected".to_string(),
        );
    }
    let too_many = |stages: Option<u64>| stages.is_some_and(|s| s > 1 << 16);
    if let Some(key) = too_many(section.stages_per_epoch)
        .then_some("stages_per_epoch")
        .or(too_many(section.num_stages).then_some("num_stages"))
    {
        return fail(key, "found more than 65536 stages, expected no more than the run has steps".to_string());
    }
    if epochs == 0 {
        return fail("schedule", "the run has no epochs".to_string());
    }
    configured_kind(section).map(drop)
}

/// Whether the section asks for an epoch-aware schedule.
pub(super) fn is_epoch_aware(section: &NoiseInjectionSection) -> bool {
    matches!(configured_kind(section), Ok(Kind::EpochAware { .. }))
}

fn configured_kind(section: &NoiseInjectionSection) -> std::result::Result<Kind, Violation> {
    let epoch_aware = Kind::EpochAware { stages: section.stages_per_epoch.unwrap_or(DEFAULT_STAGES_PER_EPOCH) };
    let step_based = Kind::StepBased { stages: section.num_stages.unwrap_or(DEFAULT_NUM_STAGES) };
    let contradiction = |kind: &str, flag: bool| {
        Err(("schedule".to_string(), format!("found {kind} with epoch_aware: {flag}; keep one of the two keys")))
    };
    match (section.schedule, section.epoch_aware) {
        (ScheduleKind::EpochAware, Some(false)) => contradiction("epoch_aware", false),
        (ScheduleKind::StepBased, Some(true)) => contradiction("step_based", true),
        (ScheduleKind::Constant, _) => Ok(Kind::Constant),
        (ScheduleKind::EpochAware, _) | (ScheduleKind::Auto, Some(true)) => Ok(epoch_aware),
        (ScheduleKind::StepBased, _) | (ScheduleKind::Auto, Some(false)) => Ok(step_based),
        (ScheduleKind::Auto, None) => match (section.stages_per_epoch, section.num_stages) {
            (Some(_), Some(_)) => Err((
                "epoch_aware".to_string(),
                "not set, with both stages_per_epoch and num_stages set; set it to true or false".to_string(),
            )),
            (None, Some(_)) => Ok(step_based),
            _ => Ok(epoch_aware),
        },
    }
}

fn unused_keys(section: &NoiseInjectionSection, kind: Kind) -> Vec<String> {
    let mut unused = Vec::new();
    let mut note = |set: bool, key: &str| {
        if set {
            unused.push(format!("noise_injection.{key}"));
        }
    };
    let constant = kind == Kind::Constant;
    note(section.stages_per_epoch.is_some() && !matches!(kind, Kind::EpochAware { .. }), "stages_per_epoch");
    note(section.num_stages.is_some() && !matches!(kind, Kind::StepBased { .. }), "num_stages");
    note(constant && section.epoch_aware.is_some(), "epoch_aware");
    note(constant && !section.warmup_stage, "warmup_stage");
    let base = multipliers::in_force(section).and_then(|config| config.base_sigma);
    note(constant && base.is_some(), "sigma_start");
    unused
}

#[cfg(test)]
mod tests;
