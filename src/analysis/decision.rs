//! Whether an arm of a sweep runs, decided by what another arm's run of the same seed gave.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::run_files::RunFiles;
use crate::run::stopped;
use crate::{Result, bail_input, input_error};

/// `{run: 1e, if_any: [{arm: 1d, stopped: collapse}, {arm: 1d, metric: val/acc_noisy, below: 0.6}]}`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decision {
    /// The arm that it is about.
    pub run: String,
    /// Arms whose runs must be over before.
    #[serde(default)]
    pub after: Vec<String>,
    /// The arm runs where one of these holds; without any, always.
    #[serde(default)]
    pub if_any: Vec<Condition>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Condition {
    pub arm: String,
    /// A stop rule of this name ended the run; `any`: one did.
    pub stopped: Option<String>,
    /// A metric whose last value is compared.
    pub metric: Option<String>,
    pub below: Option<f64>,
    pub above: Option<f64>,
}

impl Decision {
    /// The arms that must be over before anything is decided.
    pub fn arms(&self) -> impl Iterator<Item = &str> {
        self.after.iter().map(String::as_str).chain(self.if_any.iter().map(|condition| condition.arm.as_str()))
    }

    pub fn check(&self) -> Result<()> {
        for condition in &self.if_any {
            let by_metric = condition.metric.is_some() && (condition.below.is_some() != condition.above.is_some());
            let by_stop = condition.stopped.is_some()
                && condition.metric.is_none()
                && condition.below.is_none()
                && condition.above.is_none();
            if by_stop == by_metric || (by_metric && condition.stopped.is_some()) {
                bail_input!(
                    "decisions: run {}: a condition on {}: expected stopped: RULE, or metric: NAME with below: or above:",
                    self.run,
                    condition.arm
                );
            }
        }
        Ok(())
    }

    /// Why the arm runs, or why it does not; `run_of` gives the directory of another arm's run of this seed.
    pub fn outcome<'a>(&self, run_of: impl Fn(&str) -> Result<std::path::PathBuf> + 'a) -> Result<Outcome> {
        if self.if_any.is_empty() {
            return Ok(Outcome::Runs(String::new()));
        }
        let mut said = Vec::new();
        for condition in &self.if_any {
            let (holds, what) = condition.outcome(&run_of(&condition.arm)?)?;
            if holds {
                return Ok(Outcome::Runs(what));
            }
            said.push(what);
        }
        Ok(Outcome::Skipped(said.join("; ")))
    }
}

#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    Runs(String),
    Skipped(String),
}

impl Condition {
    fn outcome(&self, run: &Path) -> Result<(bool, String)> {
        let arm = &self.arm;
        if let Some(rule) = &self.stopped {
            return Ok(match stopped::read(run)? {
                Some(by) => (rule == "any" || *rule == by.rule, format!("{arm}: {by}")),
                None => (false, format!("{arm} was not stopped")),
            });
        }
        let metric = self.metric.as_deref().unwrap_or_default();
        let value = last_value(&RunFiles::read(run)?, metric)
            .ok_or_else(|| input_error!("{}: no value of {metric}, which a decision asks for", run.display()))?;
        let holds = self.below.is_some_and(|bound| value < bound) || self.above.is_some_and(|bound| value > bound);
        // What is no number is out of every bound, as for stop rules.
        Ok((holds || !value.is_finite(), format!("{arm}: {metric} is {value}")))
    }
}

fn last_value(run: &RunFiles, metric: &str) -> Option<f64> {
    let mut rows = run.train.iter().chain(&run.validations).filter_map(|row| row.get(metric));
    rows.next_back().map(|value| if *value == Value::Null { f64::NAN } else { value.as_f64().unwrap_or(f64::NAN) })
}

#[cfg(test)]
mod tests {
    use super::*;

    type Checked = std::result::Result<(), Box<dyn std::error::Error>>;

    fn decision(text: &str) -> Decision {
        serde_yaml::from_str(text).unwrap_or_else(|e| unreachable!("{e}"))
    }

    #[test]
    fn a_condition_is_about_a_stop_or_about_one_bound() {
        for (conditions, good) in [
            ("[]", true),
            ("[{arm: a, stopped: any}]", true),
            ("[{arm: a, metric: entropy, above: 1}]", true),
            ("[{arm: a}]", false),
            ("[{arm: a, metric: entropy}]", false),
            ("[{arm: a, above: 1}]", false),
            ("[{arm: a, metric: entropy, above: 1, below: 2}]", false),
            ("[{arm: a, stopped: x, metric: entropy, above: 1}]", false),
            ("[{arm: a, stopped: x, below: 2}]", false),
        ] {
            assert_eq!(decision(&format!("{{run: b, if_any: {conditions}}}")).check().is_ok(), good, "{conditions}");
        }
    }

    #[test]
    fn the_last_value_and_the_stop_decide() -> Checked {
        let dir = tempfile::tempdir()?;
        let file = |name: &str, text: &str| std::fs::write(dir.path().join(name), text);
        file("run.json", r#"{"name": "a", "config_hash": "01234567", "seed": 3}"#)?;
        file("config.yaml", "name: a\n")?;
        file(
            "metrics.jsonl",
            "{\"step\":1,\"kind\":\"train\",\"entropy\":0.5}\n{\"step\":1,\"kind\":\"val\",\"val/acc_noisy\":0.7}\n\
             {\"step\":2,\"kind\":\"val\",\"val/acc_noisy\":0.5}\n{\"step\":2,\"kind\":\"train\",\"grad_norm\":null}\n",
        )?;
        let outcome = |conditions: &str| {
            decision(&format!("{{run: b, if_any: {conditions}}}")).outcome(|_| Ok(dir.path().to_path_buf()))
        };
        let runs = |conditions: &str| -> Result<bool> { Ok(matches!(outcome(conditions)?, Outcome::Runs(_))) };
        assert!(runs("[]")?);
        assert!(runs("[{arm: a, metric: val/acc_noisy, below: 0.6}]")?);
        assert!(!runs("[{arm: a, metric: val/acc_noisy, above: 0.6}]")?);
        assert!(runs("[{arm: a, metric: val/acc_noisy, above: 0.6}, {arm: a, metric: entropy, above: 0.4}]")?);
        assert!(runs("[{arm: a, metric: grad_norm, below: -1}]")?, "no number is out of bounds");
        assert!(outcome("[{arm: a, metric: nothing, below: 1}]").is_err_and(|e| e.to_string().contains("nothing")));
        assert!(!runs("[{arm: a, stopped: any}]")?);
        let text = r#"{"rule":"collapse","metric":"entropy","value":1.2,"comparison":"above","bound":1.0,"step":23}"#;
        file("stopped.json", text)?;
        assert!(runs("[{arm: a, stopped: collapse}]")? && runs("[{arm: a, stopped: any}]")?);
        assert!(!runs("[{arm: a, stopped: floor}]")?);
        Ok(())
    }
}
