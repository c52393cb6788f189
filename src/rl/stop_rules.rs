//! Stop rules: a run ends early when a metric leaves its bound in `patience` consecutive rows after a step.
//!
//! A rule looks at the rows of metrics.jsonl that have its metric: training rows, or validations for `val/...`. The
//! counters are a function of these rows, so a resume replays the file and no state is saved. A value that is not a
//! finite number (null in the file) violates every rule on it.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::evaluation::Condition;
use super::section::{AlgorithmSection, RewardSection};
use crate::inject::section::{FakeQuantSection, InjectPhase, NoiseInjectionSection, NoisyOpsSection};
use crate::run::stopped::{Comparison, Stopped};
use crate::{Error, Result, input_error};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct StopRule {
    /// null: the metric and its bound.
    pub name: Option<String>,
    /// A number of metrics.jsonl, e.g. `entropy` or `val/acc_noisy`.
    pub metric: String,
    /// Violated by larger values. A rule has `above` or `below`.
    pub above: Option<f64>,
    /// Violated by smaller values.
    pub below: Option<f64>,
    /// Rows of this step and earlier ones do not count.
    pub after_step: u64,
    /// Consecutive violations that it takes.
    pub patience: u64,
}

impl Default for StopRule {
    fn default() -> StopRule {
        StopRule { name: None, metric: String::new(), above: None, below: None, after_step: 0, patience: 1 }
    }
}

impl StopRule {
    /// None unless exactly one side is given.
    pub fn bound(&self) -> Option<(Comparison, f64)> {
        match (self.above, self.below) {
            (Some(bound), None) => Some((Comparison::Above, bound)),
            (None, Some(bound)) => Some((Comparison::Below, bound)),
            _ => None,
        }
    }

    /// None where the row does not have the metric.
    fn violation(&self, row: &Map<String, Value>) -> Option<bool> {
        let value = value_of(row.get(&self.metric)?);
        let (side, bound) = self.bound()?;
        let beyond = match side {
            Comparison::Above => value > bound,
            Comparison::Below => value < bound,
        };
        Some(beyond || !value.is_finite())
    }
}

fn value_of(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

/// The rules of a run and what the rows up to now did to them.
pub struct StopRules {
    /// With the number of violations in a row.
    rules: Vec<(StopRule, u64)>,
    fired: Option<Stopped>,
}

impl StopRules {
    /// In the state after the rows of `metrics`; no file is no row.
    ///
    /// # Errors
    /// `Input`: a line that is no object.
    pub fn replay(rules: &[StopRule], metrics: &Path) -> Result<StopRules> {
        let mut replayed = StopRules { rules: rules.iter().map(|rule| (rule.clone(), 0)).collect(), fired: None };
        let text = match std::fs::read_to_string(metrics) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            read => read.map_err(|e| Error::io(metrics, e))?,
        };
        for (number, line) in text.lines().enumerate() {
            let row = serde_json::from_str(line)
                .map_err(|e| input_error!("{} line {}: {e}", metrics.display(), number + 1))?;
            replayed.observe(&row);
        }
        Ok(replayed)
    }

    /// Takes the next row. The first rule that fires, in the order of rows and rules, stays the one.
    pub fn observe(&mut self, row: &Map<String, Value>) {
        let step = row.get("step").and_then(Value::as_u64).unwrap_or(0);
        for (rule, violations) in self.rules.iter_mut().filter(|(rule, _)| step > rule.after_step) {
            let Some(violated) = rule.violation(row) else { continue };
            *violations = if violated { *violations + 1 } else { 0 };
            if let (Some((comparison, bound)), None) = (rule.bound(), &self.fired)
                && *violations >= rule.patience
            {
                let unnamed = || format!("{} {} {bound}", rule.metric, comparison.name());
                self.fired = Some(Stopped {
                    rule: rule.name.clone().unwrap_or_else(unnamed),
                    metric: rule.metric.clone(),
                    value: Some(value_of(&row[&rule.metric])).filter(|value| value.is_finite()),
                    comparison,
                    bound,
                    step,
                });
            }
        }
    }

    pub fn fired(&self) -> Option<&Stopped> {
        self.fired.as_ref()
    }
}

/// The metrics that a run under these sections has.
pub fn metrics(
    algorithm: &AlgorithmSection,
    reward: &RewardSection,
    aqn: &NoiseInjectionSection,
    ops: &NoisyOpsSection,
    quant: &FakeQuantSection,
) -> Vec<String> {
    const ALWAYS: [&str; 19] = [
        "reward/mean",
        "reward/strict",
        "reward/numeric",
        "reward/zero_std_groups",
        "response_tokens/mean",
        "response_tokens/clipped_ratio",
        "entropy",
        "loss/policy",
        "loss/kl",
        "kl/ref",
        "ratio/clipped_low",
        "ratio/clipped_high",
        "ratio/max",
        "ratio/first_minibatch_max",
        "logprob_gap/mean_abs",
        "grad_norm",
        "lr",
        "skipped_steps",
        "injection/disagreements",
    ];
    const AQN: [&str; 4] = ["aqn/sigma", "aqn/modules", "aqn/measured_std", "aqn/output_changed_ratio"];
    const NOISY_OPS: [&str; 4] = [
        "noisy_ops/forward_calls",
        "noisy_ops/backward_calls",
        "noisy_ops/measured_std_forward",
        "noisy_ops/measured_std_backward",
    ];
    let mut names: Vec<&str> = ALWAYS.to_vec();
    if aqn.enabled {
        names.extend(AQN);
    }
    if ops.enabled {
        names.extend(NOISY_OPS);
    }
    if quant.enabled {
        names.push("quant/sqnr_db");
        names.extend(quant.activations.map(|_| "quant/activation_sqnr_db"));
    }
    let mut names: Vec<String> = names.into_iter().map(str::to_string).collect();
    names.extend(super::metrics::optional(algorithm, reward));
    let noisy = ops.enabled && ops.error_scale != 0.0 && ops.phases.contains(InjectPhase::Validation);
    let quantized = quant.enabled && quant.phases.contains(InjectPhase::Validation);
    for condition in Condition::ALL.into_iter().filter(|condition| condition.applies(noisy, quantized)) {
        names.extend(["acc", "correct"].map(|what| format!("val/{what}_{}", condition.name())));
    }
    names
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rule(metric: &str, above: Option<f64>, below: Option<f64>, after_step: u64, patience: u64) -> StopRule {
        StopRule { name: None, metric: metric.into(), above, below, after_step, patience }
    }

    /// The step after which `rule` fires on training rows of step 1, 2, ... with these values of `x`.
    fn fires(rule: &StopRule, values: &[Option<f64>]) -> Option<u64> {
        let mut rules = StopRules { rules: vec![(rule.clone(), 0)], fired: None };
        for (i, value) in values.iter().enumerate() {
            let row = json!({"step": i + 1, "kind": "train", "x": value});
            row.as_object().into_iter().for_each(|row| rules.observe(row));
        }
        rules.fired.map(|stopped| stopped.step)
    }

    #[test]
    fn bounds_are_strict_and_count_after_the_step() {
        let values = [1.0, 2.0, 1.0, 3.0].map(Some);
        assert_eq!(fires(&rule("x", Some(1.0), None, 0, 1), &values), Some(2));
        assert_eq!(fires(&rule("x", Some(2.0), None, 0, 1), &values), Some(4));
        assert_eq!(fires(&rule("x", Some(3.0), None, 0, 1), &values), None);
        assert_eq!(fires(&rule("x", Some(1.0), None, 2, 1), &values), Some(4));
        assert_eq!(fires(&rule("x", Some(1.0), None, 1, 1), &values), Some(2));
        assert_eq!(fires(&rule("x", None, Some(1.0), 0, 1), &values), None);
        assert_eq!(fires(&rule("x", None, Some(1.5), 1, 1), &values), Some(3));
        assert_eq!(fires(&rule("y", None, Some(1.5), 0, 1), &values), None, "not a metric of these rows");
    }

    #[test]
    fn patience_counts_violations_in_a_row_after_the_step() {
        let values = [2.0, 2.0, 0.0, 2.0, 2.0, 2.0].map(Some);
        assert_eq!(fires(&rule("x", Some(1.0), None, 0, 2), &values), Some(2));
        assert_eq!(fires(&rule("x", Some(1.0), None, 0, 3), &values), Some(6));
        assert_eq!(fires(&rule("x", Some(1.0), None, 1, 2), &values), Some(5));
        assert_eq!(fires(&rule("x", Some(1.0), None, 0, 4), &values), None);
    }

    #[test]
    fn what_is_no_number_violates_either_side() {
        for one in [rule("x", Some(1e9), None, 0, 1), rule("x", None, Some(-1e9), 0, 1)] {
            assert_eq!(fires(&one, &[Some(0.0), None]), Some(2));
        }
        assert_eq!(fires(&rule("x", Some(1.0), None, 0, 2), &[None, Some(0.0), None, Some(5.0)]), Some(4));
    }

    #[test]
    fn replayed_rows_give_the_state_that_they_were_observed_into() -> std::result::Result<(), Box<dyn std::error::Error>>
    {
        let rules = [rule("x", Some(1.0), None, 0, 3), rule("val/y", None, Some(0.5), 1, 2)];
        let rows = [
            json!({"step": 0, "kind": "val", "val/y": 0.0}),
            json!({"step": 1, "kind": "train", "x": 2.0}),
            json!({"step": 2, "kind": "train", "x": 2.0}),
            json!({"step": 2, "kind": "val", "val/y": 0.1}),
            json!({"step": 3, "kind": "train", "x": null}),
            json!({"step": 3, "kind": "val", "val/y": 0.2}),
        ];
        let path = tempfile::tempdir()?;
        let path = path.path().join("metrics.jsonl");
        let stopped = |rows: &[Value], seen: usize| -> Result<Option<Stopped>> {
            let text: String = rows[..seen].iter().map(|row| format!("{row}\n")).collect();
            std::fs::write(&path, text).map_err(|e| Error::io(&path, e))?;
            let mut rules = StopRules::replay(&rules, &path)?;
            rows[seen..].iter().filter_map(Value::as_object).for_each(|row| rules.observe(row));
            Ok(rules.fired)
        };
        for seen in 0..=rows.len() {
            let found = stopped(&rows, seen)?.ok_or("no rule fired")?;
            assert_eq!((found.rule.as_str(), found.step, found.value), ("x above 1", 3, None), "{seen}");
        }
        let calm: Vec<Value> =
            rows.iter().filter(|row| row["x"] != Value::Null || row["kind"] == "val").cloned().collect();
        assert_eq!(stopped(&calm[..5], 2)?.map(|s| s.rule), Some("val/y below 0.5".to_string()));
        Ok(())
    }
}
