//! Multipliers of AQN from a scan: a rule turns each layer's score into m_l, written as a `layer_sigma_config` file.
//!
//! A score is larger where the layer suffers more. The rules are numerics.md section 6's: `quantile` gives the top sixth of the
//! layers 1.5, the next third 1.2, the rest 1; `bands` does so by thresholds; `proportional` is score / mean, `inverse`
//! (1 / score) / mean(1 / score); `targeted` gives the top k layers 1 and the others 0, `healthy` the opposite.

use serde::de::{DeserializeOwned, IntoDeserializer, value};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{Result, bail_input, input_error};

/// What a layer's score is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Score {
    RelativeError,
    /// The best layer's SQNR minus this one's, in dB.
    SqnrDeficit,
    /// KL of the output when this layer alone is injected.
    OutputKl,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    Quantile,
    Bands,
    Proportional,
    Inverse,
    Targeted,
    Healthy,
}

/// A score or a rule by its name.
///
/// # Errors
/// `Input` that names `option` and what exists.
pub fn named<T: DeserializeOwned>(option: &str, name: &str) -> Result<T> {
    let parsed: std::result::Result<T, value::Error> = T::deserialize(name.into_deserializer());
    parsed.map_err(|e| input_error!("{option} {name}: {e}"))
}

#[derive(Clone, Debug)]
pub struct Choice {
    pub rule: Rule,
    /// Of `targeted` and `healthy`.
    pub top: usize,
    /// Of `bands`: scores above the first get 1.2, above the second 1.5.
    pub thresholds: [f64; 2],
}

/// m_l of every layer.
///
/// # Errors
/// `Input` for scores that are not finite, a rule that cannot be applied to them, and one that treats all layers alike.
pub fn multipliers(scores: &[f64], choice: &Choice) -> Result<Vec<f64>> {
    let n = scores.len();
    if let Some(layer) = scores.iter().position(|score| !score.is_finite()) {
        bail_input!("--rule: layer {layer} has the score {}, expected finite scores", scores[layer]);
    }
    let rule = format!("{:?}", choice.rule).to_lowercase();
    // The largest first; the earlier layer where two are equal.
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    let mut rank = vec![0; n];
    order.iter().enumerate().for_each(|(place, &layer)| rank[layer] = place);
    let part = |of: usize| (n + of / 2) / of; // n / of, to the nearest
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let made: Vec<f64> = match choice.rule {
        Rule::Quantile => {
            let (top, next) = (part(6), part(6) + part(3));
            rank.iter()
                .map(|&place| {
                    if place < top {
                        1.5
                    } else if place < next {
                        1.2
                    } else {
                        1.0
                    }
                })
                .collect()
        }
        Rule::Bands => {
            let [low, high] = choice.thresholds;
            scores
                .iter()
                .map(|&score| {
                    if score > high {
                        1.5
                    } else if score > low {
                        1.2
                    } else {
                        1.0
                    }
                })
                .collect()
        }
        Rule::Proportional | Rule::Inverse => {
            let weights: Vec<f64> = match choice.rule {
                Rule::Proportional => scores.to_vec(),
                _ => scores.iter().map(|score| 1.0 / score).collect(),
            };
            let mean = mean(&weights);
            if !(mean.is_finite() && mean > 0.0) {
                bail_input!("--rule {rule}: found scores whose mean is {mean}, expected one above 0");
            }
            weights.iter().map(|weight| weight / mean).collect()
        }
        Rule::Targeted => rank.iter().map(|&place| f64::from(u8::from(place < choice.top))).collect(),
        Rule::Healthy => rank.iter().map(|&place| f64::from(u8::from(place >= choice.top))).collect(),
    };
    // Equal scores are no ranking, whatever a rule made of them.
    let spread =
        scores.iter().copied().fold(f64::NEG_INFINITY, f64::max) - scores.iter().copied().fold(f64::INFINITY, f64::min);
    if spread <= 0.0 || made.iter().all(|m| *m == made[0]) {
        bail_input!(
            "--rule {rule}: puts all {n} layers in one band (scores {:.4} to {:.4}), expected layers that differ",
            scores.iter().copied().fold(f64::INFINITY, f64::min),
            scores.iter().copied().fold(f64::NEG_INFINITY, f64::max)
        );
    }
    Ok(made)
}

/// The text of a `layer_sigma_config` file, with where it came from in its comments (keys that begin with `_`).
pub fn config(multipliers: &[f64], source: Map<String, Value>) -> String {
    let rounded = |m: f64| (m * 1e6).round() / 1e6;
    let layers: Map<String, Value> =
        multipliers.iter().enumerate().map(|(layer, &m)| (layer.to_string(), json!(rounded(m)))).collect();
    let file = json!({"_scan": source, "default_multiplier": 1.0, "layer_multipliers": layers});
    format!("{file:#}\n")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn choice(rule: Rule) -> Choice {
        Choice { rule, top: 2, thresholds: [0.37, 0.408] }
    }

    #[test]
    fn quantile_bands_of_28_layers() {
        let scores: Vec<f64> = (0..28).map(f64::from).collect();
        let made = multipliers(&scores, &choice(Rule::Quantile)).unwrap();
        let count = |m: f64| made.iter().filter(|x| **x == m).count();
        assert_eq!((count(1.5), count(1.2), count(1.0)), (5, 9, 14));
        assert_eq!((made[27], made[22], made[13]), (1.5, 1.2, 1.0));
    }

    #[test]
    fn each_rule() {
        let scores = [0.3, 0.5, 0.4, 0.2];
        let made = |rule| multipliers(&scores, &choice(rule)).unwrap();
        assert_eq!(made(Rule::Bands), [1.0, 1.5, 1.2, 1.0]);
        assert_eq!(made(Rule::Targeted), [0.0, 1.0, 1.0, 0.0]);
        assert_eq!(made(Rule::Healthy), [1.0, 0.0, 0.0, 1.0]);
        let proportional = made(Rule::Proportional);
        let near = |a: f64, b: f64| (a - b).abs() < 1e-12;
        assert!(near(proportional.iter().sum(), 4.0) && near(proportional[1], 0.5 / 0.35));
        let inverse = made(Rule::Inverse);
        assert!(near(inverse.iter().sum(), 4.0) && inverse[3] > inverse[0]);
    }

    #[test]
    fn one_band_is_an_error() {
        for (scores, rule) in [
            (vec![0.2; 28], Rule::Quantile),
            (vec![0.2, 0.21, 0.22], Rule::Bands),
            (vec![0.2, 0.3], Rule::Targeted),
            (vec![0.2], Rule::Quantile),
            (vec![0.2, f64::NAN], Rule::Proportional),
            (vec![0.0, 0.0], Rule::Proportional),
            (vec![0.0, 0.1], Rule::Inverse),
        ] {
            let error = multipliers(&scores, &choice(rule)).unwrap_err().to_string();
            assert!(error.contains("--rule") && error.contains("expected"), "{error}");
        }
    }
}
