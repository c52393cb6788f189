//! A sweep: arms x seeds of one configuration.
//!
//! ```yaml
//! name: srdd_compare
//! base: ../e5c.yaml                          # relative to the sweep's file
//! set: {trainer.epochs: 1}                   # for every arm
//! arms: {none: {noise_injection.enabled: false}, global: {}, other: {base: ../1e.yaml}}
//! seeds: [0, 1, 2]
//! decisions:                                 # what runs after what, and whether at all, seed by seed
//!   - {run: other, if_any: [{arm: none, stopped: collapse}, {arm: none, metric: val/acc_noisy, below: 0.6}]}
//! ```

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_yaml::{Mapping, Value};

use super::{Config, keys};
use crate::analysis::decision::Decision;
use crate::error::one_line;
use crate::{Error, Result, bail_input, input_error};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SweepFile {
    name: String,
    /// Of the arms that name none of their own.
    base: Option<PathBuf>,
    #[serde(default)]
    set: Mapping,
    /// In the order of the file.
    arms: Mapping,
    seeds: Vec<u64>,
    #[serde(default)]
    decisions: Vec<Decision>,
}

/// One run of a sweep.
#[derive(Debug)]
pub struct Job {
    pub arm: String,
    pub seed: u64,
    /// Its name is the sweep's and the arm's.
    pub config: Config,
    pub decision: Option<Decision>,
}

/// All runs, seed by seed: what every arm has done of a seed can be compared before the next seed begins. `overrides` are
/// `a.b=v`, over those of the file.
///
/// # Errors
/// One line: the file, the arm, and what `config::load` says; no arm, no seed, or one named twice.
pub fn jobs(path: &Path, overrides: &[String]) -> Result<Vec<Job>> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let file: SweepFile = serde_yaml::from_str(&text).map_err(|e| input_error!("{shown}: {}", one_line(e)))?;
    if file.arms.is_empty() || file.seeds.is_empty() {
        bail_input!("{shown}: found {} arms and {} seeds, expected some", file.arms.len(), file.seeds.len());
    }
    if let Some(seed) = file.seeds.iter().enumerate().find(|(i, s)| file.seeds[..*i].contains(s)).map(|(_, s)| s) {
        bail_input!("{shown}: seeds: found {seed} twice");
    }
    check_decisions(&file).map_err(|e| e.at(&shown))?;
    let beside = path.parent().unwrap_or(Path::new("."));
    let mut jobs = Vec::new();
    for seed in &file.seeds {
        for (arm, own) in &file.arms {
            let arm = arm.as_str().map_or_else(|| format!("{arm:?}"), str::to_string);
            let mut own = match own {
                Value::Mapping(own) => own.clone(),
                Value::Null => Mapping::new(),
                _ => bail_input!("{shown}: arms.{arm}: expected a map of keys such as optimizer.lr"),
            };
            let base = match own.shift_remove("base") {
                Some(base) => base.as_str().map(PathBuf::from),
                None => file.base.clone(),
            };
            let Some(base) = base else { bail_input!("{shown}: arms.{arm}: found no base, expected a configuration") };
            let base = beside.join(base);
            let mut sets = assignments(&file.set)?;
            sets.extend(assignments(&own)?);
            sets.extend(overrides.iter().cloned());
            sets.extend([format!("name={}-{arm}", file.name), format!("seed={seed}")]);
            let config = super::load(&base, &sets).map_err(|e| e.at(format!("{shown}: arm {arm}")))?;
            let decision = file.decisions.iter().find(|decision| decision.run == arm).cloned();
            jobs.push(Job { arm, seed: *seed, config, decision });
        }
    }
    Ok(jobs)
}

/// A decision looks back: at arms that stand before its own, so that none waits for itself.
fn check_decisions(file: &SweepFile) -> Result<()> {
    let arms: Vec<String> = file.arms.keys().map(keys::text).collect();
    for (number, decision) in file.decisions.iter().enumerate() {
        decision.check()?;
        let run = &decision.run;
        let Some(own) = arms.iter().position(|arm| arm == run) else {
            bail_input!("decisions: run {run}: expected one of the arms {}", arms.join(", "));
        };
        if file.decisions[..number].iter().any(|other| other.run == *run) {
            bail_input!("decisions: found {run} twice");
        }
        if let Some(arm) = decision.arms().find(|arm| !arms[..own].iter().any(|before| before == arm)) {
            bail_input!("decisions: run {run}: found {arm}, expected an arm that stands before {run}");
        }
    }
    Ok(())
}

/// `a.b: v` -> `a.b=v`, v as JSON, which is YAML.
fn assignments(keys: &Mapping) -> Result<Vec<String>> {
    let one = |(key, value): (&Value, &Value)| {
        let json = serde_json::to_string(value).map_err(|e| Error::Runtime(e.to_string()))?;
        Ok(format!("{}={json}", keys::text(key)))
    };
    keys.iter().map(one).collect()
}
