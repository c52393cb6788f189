//! Everything that has a value per step, as charts: the mean over an arm's seeds, the seeds as thin lines, the band from
//! the lowest to the highest of them.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::arms::{Arm, Run};
use super::shown::{MACHINE, Planned, Section, Shown, Source, gpu_title, gpu_unit};
use super::{Figure, Group, Plot};
use crate::analysis::plot::ticks::number;
use crate::analysis::plot::{LineChart, Series, Stroke};
use crate::analysis::run_files::correct;
use crate::analysis::statistics::wilson_interval;
use crate::rl::evaluation::Condition;

/// More steps than this are averaged in equal parts.
const MOST_POINTS: usize = 300;

/// One arm's values.
struct Curve {
    steps: Vec<u64>,
    /// By seed, at every step; NaN where a run has none.
    runs: Vec<Vec<f64>>,
    /// Steps that a value is the mean of.
    averaged: usize,
}

impl Curve {
    fn of(arm: &Arm, source: Source, value: impl Fn(&Run, &Value) -> Option<f64>) -> Curve {
        let by_step = |run: &Run| -> BTreeMap<u64, f64> {
            let known = |row: &Value| Some((row["step"].as_u64()?, value(run, row).filter(|v| v.is_finite())?));
            source.rows(run).iter().filter_map(known).collect()
        };
        let runs: Vec<BTreeMap<u64, f64>> = arm.runs.iter().map(by_step).collect();
        let steps: Vec<u64> =
            runs.iter().flat_map(|run| run.keys().copied()).collect::<BTreeSet<_>>().into_iter().collect();
        let at = |run: &BTreeMap<u64, f64>| steps.iter().map(|s| run.get(s).copied().unwrap_or(f64::NAN)).collect();
        Curve { runs: runs.iter().map(at).collect(), steps, averaged: 1 }.thinned()
    }

    fn thinned(self) -> Curve {
        let part = self.steps.len().div_ceil(MOST_POINTS).max(1);
        if part == 1 {
            return self;
        }
        let of_run = |values: &Vec<f64>| values.chunks(part).map(|values| mean(values.iter().copied())).collect();
        Curve {
            runs: self.runs.iter().map(of_run).collect(),
            steps: self.steps.chunks(part).map(|steps| steps[steps.len() / 2]).collect(),
            averaged: part,
        }
    }

    fn at(&self, place: usize) -> impl Iterator<Item = f64> {
        self.runs.iter().map(move |run| run[place]).filter(|v| !v.is_nan())
    }

    fn mean(&self) -> Vec<(f64, f64)> {
        self.steps.iter().enumerate().map(|(place, step)| (*step as f64, mean(self.at(place)))).collect()
    }

    fn band(&self) -> Vec<(f64, f64, f64)> {
        let span = |(place, step): (usize, &u64)| {
            let (low, high) =
                (self.at(place).fold(f64::INFINITY, f64::min), self.at(place).fold(f64::NEG_INFINITY, f64::max));
            (*step as f64, low, high)
        };
        if self.runs.len() > 1 { self.steps.iter().enumerate().map(span).collect() } else { Vec::new() }
    }

    /// For tooltips.
    fn json(&self, place: usize, arm: &Arm, planned: Option<&Curve>) -> Value {
        let short = |values: &Vec<f64>| values.iter().map(|v| rounded(*v, 6)).collect::<Vec<_>>();
        json!({
            "name": arm.label, "colour": place, "steps": self.steps, "seeds": arm.runs.iter().map(|r| r.files.seed).collect::<Vec<_>>(),
            "runs": self.runs.iter().map(short).collect::<Vec<_>>(),
            "planned": planned.map(|p| p.mean().iter().map(|(step, v)| json!([*step as u64, rounded(*v, 6)])).collect::<Vec<_>>()),
        })
    }
}

pub(super) fn group(arms: &[Arm], section: &Section) -> Group {
    let figures = section.curves.iter().filter_map(|shown| figure(arms, shown)).collect();
    Group { id: section.id, title: section.title, note: section.note.to_string(), figures }
}

/// Times of every run, and of a GPU whatever the run has sampled.
pub(super) fn machine(arms: &[Arm]) -> Group {
    let mut group = group(arms, &MACHINE);
    let rows = arms.iter().flat_map(|arm| &arm.runs).flat_map(|run| &run.timing).filter_map(Value::as_object);
    let keys: BTreeSet<&String> = rows.flat_map(|row| row.keys()).filter(|key| key.starts_with("gpu_")).collect();
    for key in keys {
        let (title, (unit, factor)) = (gpu_title(key), gpu_unit(key));
        group.figures.extend(figure(arms, &Shown { factor, ..Shown::timed(key, &title, unit, key) }));
    }
    group
}

fn figure(arms: &[Arm], shown: &Shown) -> Option<Figure> {
    let value = |row: &Value| row[shown.key].as_f64();
    let curve = |arm| Curve::of(arm, shown.source, |_, row| value(row).map(|v| v * shown.factor));
    let plan = |arm| Curve::of(arm, shown.source, |run, row| value(row).and_then(|_| shown.planned.value(run, row)));
    let planned = if shown.planned == Planned::Nothing { Vec::new() } else { arms.iter().map(plan).collect() };
    lines(arms, shown, arms.iter().map(curve).collect(), planned)
}

/// None where there is nothing to see.
fn lines(arms: &[Arm], shown: &Shown, curves: Vec<Curve>, planned: Vec<Curve>) -> Option<Figure> {
    let mut chart = LineChart {
        title: shown.title.into(),
        x_label: "step".into(),
        y_label: shown.unit.into(),
        whole_x: true,
        log_y: shown.log,
        series: Vec::new(),
    };
    let (mut last, mut values) = (Vec::new(), Vec::new());
    for (place, (arm, curve)) in arms.iter().zip(&curves).enumerate() {
        if curve.steps.is_empty() {
            continue;
        }
        if arm.runs.len() > 1 {
            for run in &curve.runs {
                let points = curve.steps.iter().zip(run).map(|(step, v)| (*step as f64, *v)).collect();
                chart.series.push(Series::new(None, place, Stroke::Thin, points));
            }
        }
        let mut line = Series::new(Some(arm.label.clone()), place, Stroke::Solid, curve.mean());
        line.band = curve.band();
        last.extend(curve.mean().last().map(|(_, v)| (place, arm.label.clone(), short(*v))));
        chart.series.push(line);
        let plan = planned.get(place).filter(|plan| !plan.steps.is_empty());
        values.push(curve.json(place, arm, plan));
    }
    chart.series.extend(plans(&planned, shown.planned.tolerance()));
    let averaged = curves.iter().map(|curve| curve.averaged).max().unwrap_or(1);
    let note = match averaged {
        1 => shown.note.to_string(),
        n => format!("{} Each point is the mean of {n} steps.", shown.note).trim().to_string(),
    };
    let values = json!({"unit": shown.unit, "arms": values});
    let figure = Figure {
        id: shown.id.to_string(),
        title: shown.title.to_string(),
        unit: shown.unit.to_string(),
        note,
        plot: Plot::Lines(chart),
        arm: None,
        last,
        values,
    };
    (!figure.plot.is_empty()).then_some(figure)
}

/// Each plan once: arms often share theirs.
fn plans(planned: &[Curve], tolerance: f64) -> Vec<Series> {
    let mut series: Vec<Series> = Vec::new();
    for points in planned.iter().filter(|plan| !plan.steps.is_empty()).map(Curve::mean) {
        if !series.iter().any(|known| known.points == points) {
            let name = series.is_empty().then(|| "planned".to_string());
            let mut line = Series::new(name, 0, Stroke::Dashed, points);
            if tolerance > 0.0 {
                line.band =
                    line.points.iter().map(|(x, y)| (*x, y * (1.0 - tolerance), y * (1.0 + tolerance))).collect();
            }
            series.push(line);
        }
    }
    series
}

/// A chart per condition: mean over seeds, each seed, and Wilson's interval of the mean for the questions of one run:
/// the seeds answer the same questions, so more seeds do not make it narrower.
pub(super) fn accuracy(arms: &[Arm]) -> Group {
    let figures = Condition::ALL.into_iter().filter_map(|condition| {
        let share = |_: &Run, row: &Value| correct(row, condition).map(|(k, n)| 100.0 * k as f64 / n.max(1) as f64);
        let curves: Vec<Curve> = arms.iter().map(|arm| Curve::of(arm, Source::Validations, share)).collect();
        let id = format!("accuracy_{}", condition.name());
        let title = format!("Accuracy, {}", condition.name());
        let last_step = curves.iter().filter_map(|curve| curve.steps.last()).max().copied().unwrap_or(0) as f64;
        let mut figure = lines(arms, &Shown::of(&id, &title, "%", ""), curves, Vec::new())?;
        let Plot::Lines(chart) = &mut figure.plot else { return None };
        for series in chart.series.iter_mut().filter(|series| series.stroke == Stroke::Solid) {
            let n = questions(&arms[series.colour], condition)?;
            // Beside each other, or the whiskers of several arms would lie upon each other.
            let shift = 0.007 * last_step * (series.colour as f64 - (arms.len() - 1) as f64 / 2.0);
            series.stroke = Stroke::Dotted;
            series.points.iter_mut().for_each(|point| point.0 += shift);
            series.band.clear();
            let whisker = |(step, percent): &(f64, f64)| {
                let (low, high) = wilson_interval((percent / 100.0 * n as f64).round() as u64, n);
                (*step, 100.0 * low, 100.0 * high)
            };
            series.whiskers = series.points.iter().filter(|p| p.1.is_finite()).map(whisker).collect();
        }
        Some(figure)
    });
    let note = "Greedy answers to the validation questions. Dots: mean over seeds; thin lines: each seed; whiskers: Wilson's \
                95 % interval for as many questions as one run was asked.";
    Group { id: "accuracy", title: "Accuracy", note: note.to_string(), figures: figures.collect() }
}

fn questions(arm: &Arm, condition: Condition) -> Option<u64> {
    arm.runs.iter().flat_map(|run| &run.files.validations).find_map(|row| Some(correct(row, condition)?.1))
}

/// NaN of no values.
fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, n) = values.filter(|v| !v.is_nan()).fold((0.0, 0usize), |(sum, n), v| (sum + v, n + 1));
    if n == 0 { f64::NAN } else { sum / n as f64 }
}

/// To `digits` significant digits; null for what JSON has no word for.
pub(super) fn rounded(value: f64, digits: usize) -> Value {
    let text = format!("{value:.*e}", digits - 1);
    json!(text.parse::<f64>().ok().filter(|v| v.is_finite()))
}

/// To three digits.
fn short(value: f64) -> String {
    number(format!("{value:.2e}").parse().unwrap_or(value))
}

/// An arm's label as part of a file's name.
pub(super) fn file_name(label: &str) -> String {
    label.chars().map(|c| if c.is_ascii_alphanumeric() || "._-+".contains(c) { c } else { '_' }).collect()
}
