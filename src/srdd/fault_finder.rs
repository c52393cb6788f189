//! Which layers of a device are faulty, and how: each layer's statistics against the median of the others'. What all layers suffer
//! alike, as a format or noise everywhere, is no fault.
//!
//! A test's value is a statistic over its limit: a multiple of the others' median that no healthy device reached in trials (bf16,
//! weights and inputs in MXFP4, 5 % noise on every linear), but at least a floor above rounding. From 1 on it speaks. Errors are
//! compared over y and over u = y - x, since healthy ones scale with either; a fault stands out in both.

use serde::Serialize;

use super::fault_statistics::Statistics;
use super::planted::FaultKind;
use super::robust::median;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Suspicion {
    Deadzone,
    Clip,
    Bias,
    Noise,
    Spikes,
    Nonfinite,
    /// Something, but none of these.
    Outlier,
}

impl Suspicion {
    pub fn is(self, kind: FaultKind) -> bool {
        let same = match kind {
            FaultKind::Deadzone => Suspicion::Deadzone,
            FaultKind::Clip => Suspicion::Clip,
            FaultKind::Bias => Suspicion::Bias,
            FaultKind::Noise => Suspicion::Noise,
            FaultKind::Spikes => Suspicion::Spikes,
        };
        self == same
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct Suspect {
    pub layer: usize,
    pub kind: Suspicion,
    /// The largest test's value: 1 is the limit.
    pub score: f64,
    pub reasons: Vec<String>,
}

/// A test of a layer.
struct Test {
    name: &'static str,
    value: f64,
    found: f64,
    others: f64,
}

/// What moves no healthy device: f32 sums in another order move 1e-6.
const LEAST_ERROR: f64 = 1e-4;

/// Suspects, the likeliest first; none for a healthy device.
pub fn suspects(layers: &[Statistics]) -> Vec<Suspect> {
    // Of the device, since a fault may hide the grid in its own layer.
    let is_grid = layers.iter().map(|l| l.grid_ratio).sum::<f64>() >= 0.5 * layers.len() as f64;
    let mut found: Vec<Suspect> = (0..layers.len()).filter_map(|layer| suspect(layers, layer, is_grid)).collect();
    found.sort_by(|a, b| b.score.total_cmp(&a.score).then(a.layer.cmp(&b.layer)));
    found
}

fn suspect(layers: &[Statistics], layer: usize, is_grid: bool) -> Option<Suspect> {
    let own = &layers[layer];
    if own.nonfinite > 0 {
        let reasons = vec![format!("{} values are NaN or infinite", own.nonfinite)];
        return Some(Suspect { layer, kind: Suspicion::Nonfinite, score: f64::INFINITY, reasons });
    }
    let tests = tests(layers, layer, is_grid);
    let hits: Vec<&Test> = tests.iter().filter(|test| test.value >= 1.0).collect();
    let score = hits.iter().map(|test| test.value).fold(0.0, f64::max);
    let hit = |name: &str| hits.iter().any(|test| test.name == name);
    let [zeros, maxima, between] = own.of_largest;
    let kind = match () {
        _ if hits.is_empty() => return None,
        _ if hit("spikes") => Suspicion::Spikes,
        _ if hit("zeros") => Suspicion::Deadzone,
        _ if hit("common shift") || hit("error") && own.token_constant > 3.0 => Suspicion::Bias,
        _ if hit("equal maxima") => Suspicion::Clip,
        _ if hit("random") || between > 0.5 => Suspicion::Noise,
        _ if zeros >= 0.5 => Suspicion::Deadzone,
        _ if maxima >= 0.5 => Suspicion::Clip,
        _ if hit("error") => Suspicion::Noise,
        _ => Suspicion::Outlier,
    };
    let reason = |test: &&Test| format!("{} {:.3e}, others {:.3e}", test.name, test.found, test.others);
    Some(Suspect { layer, kind, score, reasons: hits.iter().map(reason).collect() })
}

fn tests(layers: &[Statistics], layer: usize, is_grid: bool) -> Vec<Test> {
    let own = &layers[layer];
    let others = |value: &dyn Fn(&Statistics) -> f64| {
        let rest = layers.iter().enumerate().filter(|(l, _)| *l != layer).map(|(_, s)| value(s));
        median(rest.collect())
    };
    let test = |name, value: &dyn Fn(&Statistics) -> f64, floor: f64, times: f64| {
        let (found, others) = (value(own), others(value));
        Test { name, value: found / floor.max(times * others), found, others }
    };
    // The same over y and over u, whichever stands out less.
    let both = |name, values: fn(&Statistics) -> [f64; 2], times: f64| {
        let [a, b] = [0, 1].map(|i| test(name, &|s: &Statistics| values(s)[i], LEAST_ERROR, times));
        if a.value < b.value { a } else { b }
    };
    let grid = |of_grid: f64| if is_grid { of_grid } else { 0.0 };
    // On a grid of 8 bits values meet, and differences vanish, by chance.
    let zeros = grid(1.5e-3 * own.elements as f64).max(3.0);
    let ties = grid(own.prompts as f64 * (1.0 + own.hidden as f64 / 128.0)).max(3.0);
    let shift = if own.error[0] > LEAST_ERROR { own.common / 8.0 } else { 0.0 };
    let mut all = vec![
        test("spikes", &|s| s.spikes, 1.0, 4.0),
        test("zeros", &|s| s.zeros, zeros, 4.0),
        test("equal maxima", &|s| s.ties, ties, 4.0),
        Test { name: "common shift", value: shift, found: own.common, others: others(&|s| s.common) },
    ];
    if layers.len() > 1 {
        all.push(both("error", |s| s.error, 2.5));
        all.push(both("random", |s| s.random, 2.0));
        all.push(both("largest error", |s| s.tail, 8.0));
    } else {
        // One layer: nothing to compare with, so only what no healthy error looks like.
        let absolute = |name, found: f64, small: f64| {
            let value = if found > 0.01 && small < 0.15 { found / 0.01 } else { 0.0 };
            Test { name, value, found, others: 0.0 }
        };
        let is_constant = own.error[0] > LEAST_ERROR && own.token_constant > 10.0;
        all.push(match is_constant {
            true => Test { name: "error", value: own.token_constant / 10.0, found: own.error[0], others: 0.0 },
            false => absolute("error", own.error[0], own.of_small[0]),
        });
        all.push(absolute("random", own.random[0], own.of_small[1]));
    }
    all
}
