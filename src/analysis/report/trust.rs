//! The head of the page: what was run, and what speaks against believing it.

use std::collections::BTreeSet;

use serde::Serialize;

use super::arms::{Arm, Run};
use crate::analysis::warnings::{About, Warning};

/// What a reader wants to know first.
#[derive(Serialize)]
pub(super) struct Fact {
    name: &'static str,
    value: String,
}

#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Good,
    Note,
    Bad,
}

#[derive(Serialize)]
pub(super) struct Check {
    level: Level,
    text: String,
    /// One line per run that it concerns.
    details: Vec<String>,
}

/// A row of the table of runs.
#[derive(Serialize)]
pub(super) struct RunLine {
    arm: String,
    colour: usize,
    seed: u64,
    directory: String,
    state: String,
    finished: bool,
    started: String,
    device: String,
    commit: String,
    seconds: String,
}

pub(super) fn facts(arms: &[Arm]) -> Vec<Fact> {
    let seeds: BTreeSet<usize> = arms.iter().map(|arm| arm.runs.len()).collect();
    let seeds = seeds.iter().map(usize::to_string).collect::<Vec<_>>().join(" or ");
    let runs: usize = arms.iter().map(|arm| arm.runs.len()).sum();
    let texts = |of: &dyn Fn(&Run) -> String| {
        let found: BTreeSet<String> = all(arms).map(|(_, run)| of(run)).filter(|text| !text.is_empty()).collect();
        if found.is_empty() { "unknown".to_string() } else { found.into_iter().collect::<Vec<_>>().join(", ") }
    };
    let day = |(_, run): (&Arm, &Run)| field(run, "time_utc").chars().take(10).collect::<String>();
    let days: BTreeSet<String> = all(arms).map(day).filter(|day| !day.is_empty()).collect();
    let days = match (days.first(), days.last()) {
        (Some(first), Some(last)) if first != last => format!("{first} to {last}"),
        (Some(day), _) => day.clone(),
        _ => "unknown".to_string(),
    };
    vec![
        Fact { name: "arms × seeds", value: format!("{} × {seeds} ({runs} runs)", arms.len()) },
        Fact { name: "model", value: texts(&model) },
        Fact {
            name: "steps",
            value: texts(&|run| run.files.planned_steps().unwrap_or_else(|| run.files.last_step()).to_string()),
        },
        Fact { name: "device", value: texts(&device) },
        Fact { name: "commit", value: texts(&commit) },
        Fact { name: "date", value: days },
    ]
}

pub(super) fn checks(arms: &[Arm], warnings: &[Warning]) -> Vec<Check> {
    let mut checks = vec![
        noise(arms, texts(warnings, About::Noise)),
        skipped(arms),
        console(arms),
        unfinished(arms, texts(warnings, About::Progress)),
    ];
    let stopped = all(arms).filter(|(_, run)| run.files.stopped.is_some()).count();
    for (about, text) in [
        (About::Stopped, format!("Ended by a stop rule: {stopped} of {}", all(arms).count())),
        (About::Seeds, "Arms have different seeds".to_string()),
        (About::Inputs, "Runs of different inputs".to_string()),
        (About::Machines, "Runs of different machines or versions".to_string()),
    ] {
        let details = texts(warnings, about);
        checks.extend((!details.is_empty()).then_some(Check { level: Level::Note, text, details }));
    }
    // What they are stands above the comparison.
    let against = texts(warnings, About::Comparison).len();
    let text = format!("Against comparing these runs: {against}, see Comparison");
    checks.extend((against > 0 && all(arms).count() > 1).then_some(Check {
        level: Level::Bad,
        text,
        details: Vec::new(),
    }));
    checks.extend(resumed(arms));
    checks
}

pub(super) fn texts(warnings: &[Warning], about: About) -> Vec<String> {
    warnings.iter().filter(|warning| warning.0 == about).map(|warning| warning.1.clone()).collect()
}

pub(super) fn runs(arms: &[Arm]) -> Vec<RunLine> {
    let mut lines = Vec::new();
    for (colour, arm) in arms.iter().enumerate() {
        lines.extend(arm.runs.iter().map(|run| RunLine {
            arm: arm.label.clone(),
            colour,
            seed: run.files.seed,
            directory: run.files.path.file_name().unwrap_or(run.files.path.as_os_str()).to_string_lossy().into_owned(),
            state: state(run),
            finished: run.files.finished(),
            started: field(run, "time_utc"),
            device: device(run),
            commit: commit(run),
            seconds: format!("{:.0}", run.timing.iter().filter_map(|row| row["step_s"].as_f64()).sum::<f64>()),
        }));
    }
    lines
}

/// The check that the whole instrument is for.
fn noise(arms: &[Arm], details: Vec<String>) -> Check {
    let steps: usize = all(arms).map(|(_, run)| run.files.train.len()).sum();
    let wrong: usize = all(arms).map(|(_, run)| run.files.disagreeing_steps().len()).sum();
    let unchecked = |run: &Run| run.files.train.iter().filter(|row| row["injection/disagreements"].is_null()).count();
    let unchecked: usize = all(arms).map(|(_, run)| unchecked(run)).sum();
    let (level, text) = match wrong {
        _ if steps == 0 => (Level::Note, "No step was trained yet".to_string()),
        0 if unchecked > 0 => (Level::Bad, format!("Injected noise was not checked in {unchecked} of {steps} steps")),
        0 => (Level::Good, format!("Measured noise agrees with the plan in all {steps} steps")),
        wrong => (Level::Bad, format!("Measured noise disagrees with the plan in {wrong} of {steps} steps")),
    };
    Check { level, text, details }
}

fn skipped(arms: &[Arm]) -> Check {
    let of = |run: &Run| run.files.train.iter().filter_map(|row| row["skipped_steps"].as_f64()).sum::<f64>() as u64;
    let found = all(arms).filter(|(_, run)| of(run) > 0);
    let details: Vec<String> = found.map(|(arm, run)| format!("{}: {}", arm.name_of(&run.files), of(run))).collect();
    match all(arms).map(|(_, run)| of(run)).sum::<u64>() {
        0 => Check { level: Level::Good, text: "No update was skipped".to_string(), details },
        n => Check { level: Level::Note, text: format!("Skipped updates: {n}"), details },
    }
}

fn console(arms: &[Arm]) -> Check {
    let lines = |(arm, run): (&Arm, &Run)| {
        run.warnings.iter().map(|w| format!("{}: {w}", arm.name_of(&run.files))).collect::<Vec<_>>()
    };
    let details: Vec<String> = all(arms).flat_map(lines).collect();
    match details.len() {
        0 => Check { level: Level::Good, text: "No warnings".to_string(), details },
        n => Check { level: Level::Note, text: format!("Warnings: {n}"), details },
    }
}

fn unfinished(arms: &[Arm], details: Vec<String>) -> Check {
    match all(arms).filter(|(_, run)| !run.files.finished()).count() {
        0 => Check { level: Level::Good, text: "Every run is finished".to_string(), details },
        n => Check { level: Level::Bad, text: format!("Unfinished runs: {n} of {}", all(arms).count()), details },
    }
}

fn resumed(arms: &[Arm]) -> Option<Check> {
    let of = |run: &Run| run.files.run["resumes"].as_array().map_or(0, Vec::len);
    let found = all(arms).filter(|(_, run)| of(run) > 0);
    let details: Vec<String> =
        found.map(|(arm, run)| format!("{}: {} times", arm.name_of(&run.files), of(run))).collect();
    let text = format!("Resumed runs: {}", details.len());
    (!details.is_empty()).then_some(Check { level: Level::Note, text, details })
}

fn all(arms: &[Arm]) -> impl Iterator<Item = (&Arm, &Run)> {
    arms.iter().flat_map(|arm| arm.runs.iter().map(move |run| (arm, run)))
}

fn state(run: &Run) -> String {
    let (run, last) = (&run.files, run.files.last_step());
    if let Some(stopped) = &run.stopped {
        return stopped.to_string();
    }
    match (run.finished(), run.planned_steps()) {
        (true, _) => format!("finished, {last} steps"),
        (false, Some(planned)) => format!("unfinished: step {last} of {planned}"),
        (false, None) => format!("unfinished: step {last}"),
    }
}

fn field(run: &Run, key: &str) -> String {
    run.files.run[key].as_str().unwrap_or_default().to_string()
}

fn commit(run: &Run) -> String {
    field(run, "git_commit").chars().take(10).collect()
}

/// A CPU with its kind and threads, since its speed and rounding depend on them.
fn device(run: &Run) -> String {
    let device = field(run, "device");
    match (run.files.run["cpu"]["model"].as_str(), run.files.run["threads"].as_u64()) {
        (Some(cpu), Some(threads)) if device == "cpu" => {
            format!("CPU ({cpu}, {threads} thread{})", if threads == 1 { "" } else { "s" })
        }
        _ => device,
    }
}

fn model(run: &Run) -> String {
    let model = &run.files.config["model"];
    let path = model["path"].as_str().and_then(|path| std::path::Path::new(path).file_name()?.to_str());
    path.or(model["preset"].as_str()).unwrap_or_default().to_string()
}
