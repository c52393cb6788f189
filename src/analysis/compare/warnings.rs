//! What speaks against comparing runs, or for doubt in the result: one line each, with the runs that it is about.

use serde_json::Value;

use super::arms::{Arm, RunResult};
use super::config_differences::KeyDifference;
use crate::analysis::run_files::RunFiles;
use crate::rl::evaluation::Condition;

/// A run, and the arm it is of.
struct Member<'a> {
    arm: &'a Arm,
    result: &'a RunResult,
    files: &'a RunFiles,
}

pub fn of(arms: &[Arm], runs: &[RunFiles], differences: &[KeyDifference]) -> Vec<String> {
    let files = |result: &RunResult| runs.iter().find(|run| run.path == result.path);
    let members: Vec<Member> = arms
        .iter()
        .flat_map(|arm| arm.runs.iter().map(move |result| (arm, result)))
        .filter_map(|(arm, result)| Some(Member { arm, result, files: files(result)? }))
        .collect();
    let unvalidated = runs.iter().filter(|run| run.conditions().is_empty());
    let mut warnings: Vec<String> =
        unvalidated.map(|run| format!("{}: no validation yet, left out", run.path.display())).collect();
    warnings.extend(progress(&members));
    warnings.extend(seeds(arms));
    warnings.extend(questions(arms, &members, differences));
    warnings.extend(defects(&members));
    warnings.extend(injection(&members, differences));
    warnings.extend(machines(&members));
    warnings
}

/// Unfinished runs, and different numbers of steps.
fn progress(members: &[Member]) -> Vec<String> {
    let mut warnings = Vec::new();
    for member in members {
        let (step, name) = (member.result.last_step, member.name());
        match member.result.total_steps {
            Some(total) if step < total => warnings.push(format!("{name} is not finished: step {step} of {total}")),
            _ => {}
        }
        let validated = member.result.conditions.first().map_or(0, |condition| condition.step);
        if validated < step {
            warnings.push(format!("{name}: trained to step {step}, but its last validation is of step {validated}"));
        }
    }
    warnings.extend(differing("the last validation's step", members, |member| {
        member.result.conditions.first().map(|condition| condition.step.to_string())
    }));
    warnings
}

/// Seeds that some arms lack; arms with one.
fn seeds(arms: &[Arm]) -> Vec<String> {
    let mut all: Vec<u64> = arms.iter().flat_map(|arm| arm.runs.iter().map(|run| run.seed)).collect();
    all.sort_unstable();
    all.dedup();
    let mut warnings = Vec::new();
    for arm in arms {
        let missing: Vec<String> =
            all.iter().filter(|seed| arm.run(**seed).is_none()).map(|seed| seed.to_string()).collect();
        if !missing.is_empty() {
            warnings.push(format!("{} has no run of seed {}", arm.arm, missing.join(", ")));
        }
        if arm.runs.len() == 1 {
            warnings.push(format!("{} has one seed only: a difference from one seed is not evidence", arm.arm));
        }
    }
    warnings
}

/// Whether the arms answered the same questions, in the same conditions, and were scored alike.
fn questions(arms: &[Arm], members: &[Member], differences: &[KeyDifference]) -> Vec<String> {
    let mut warnings = Vec::new();
    let conditions = |member: &Member| {
        let names: Vec<&str> = member.result.conditions.iter().map(|c| c.condition.name()).collect();
        Some(names.join(" "))
    };
    warnings.extend(differing("what the last validation has", members, conditions));
    warnings.extend(differing("the number of validation questions", members, |member| {
        member.result.conditions.first().map(|condition| condition.n.to_string())
    }));
    let names: std::collections::BTreeSet<&String> =
        members.iter().filter_map(|member| member.files.run["inputs"].as_object()).flat_map(|map| map.keys()).collect();
    for name in names {
        warnings.extend(differing(&format!("the content of {name}"), members, |member| {
            Some(shown(&member.files.run["inputs"][name]))
        }));
    }
    for key in [
        "data.kind",
        "data.generated.seed",
        "data.generated.train_problems",
        "data.train_limit",
        "data.prompt_suffix",
        "data.max_response_tokens",
        "reward.mode",
    ] {
        if differences.iter().any(|difference| difference.key == key) {
            warnings.extend(differing(key, members, |member| Some(shown(value_at(&member.files.config, key)))));
        }
    }
    for arm in &arms[1..] {
        if arm.runs.iter().any(|run| arms[0].runs.iter().any(|other| other.questions != run.questions)) {
            warnings.push(format!("{} and {} answered different questions: no paired test", arm.arm, arms[0].arm));
        }
    }
    for member in members {
        if member.result.conditions.iter().any(|condition| condition.marks.is_none()) {
            warnings.push(format!("{}: no marks per question in metrics.jsonl: no paired test", member.name()));
        }
    }
    warnings
}

/// Known defects of the original that some runs reproduce and others do not.
fn defects(members: &[Member]) -> Vec<String> {
    const SWITCHES: [&str; 4] = [
        "noise_injection.compat",
        "noisy_ops.exclude_modules",
        "noisy_ops.dw_draw",
        "fake_quant", // by format
    ];
    let of = |switch: &str| {
        let what = format!("{switch}, which can reproduce a defect of the original,");
        let value = |member: &Member| Some(defect(&member.files.config, switch).unwrap_or("no defect".to_string()));
        differing(&what, members, value)
    };
    SWITCHES.into_iter().filter_map(of).collect()
}

/// The defect that a switch reproduces; None where it does not, or its section is off.
fn defect(config: &Value, switch: &str) -> Option<String> {
    let section = &config[switch.split('.').next().unwrap_or(switch)];
    if section["enabled"] != true {
        return None;
    }
    let found = match switch {
        "noise_injection.compat" => section["compat"].as_str()?.to_string(),
        "noisy_ops.exclude_modules" => {
            let excluded = section["exclude_modules"].as_array()?;
            excluded.iter().all(|name| name != "lm_head").then(|| "lm_head is not excluded".to_string())?
        }
        "noisy_ops.dw_draw" => section["dw_draw"].as_str().filter(|draw| *draw == "per_microbatch")?.to_string(),
        _ => {
            let formats = [&section["weights"], &section["activations"]];
            let defective = |format: &&str| format.contains("nvfp4_single_level") || format.contains("half_away");
            formats.into_iter().filter_map(Value::as_str).find(defective)?.to_string()
        }
    };
    Some(found)
}

/// Noise that was not what was planned, and conditions of one name that are not the same.
fn injection(members: &[Member], differences: &[KeyDifference]) -> Vec<String> {
    let mut warnings = Vec::new();
    for member in members {
        let disagrees = |row: &&Value| row["injection/disagreements"].as_u64().unwrap_or(0) > 0;
        let steps = member.files.train.iter().filter(disagrees).count();
        if steps > 0 {
            warnings.push(format!(
                "{}: in {steps} steps the measured noise disagreed with the plan (see injection.jsonl)",
                member.name()
            ));
        }
    }
    // What a validation does not depend on.
    const TRAINING_ONLY: [&str; 4] = ["enabled", "phases", "draw", "dw_draw"];
    for (section, condition) in [("noisy_ops", Condition::Noisy), ("fake_quant", Condition::Quantized)] {
        let under: Vec<&Member> = members.iter().filter(|m| m.result.condition(condition).is_some()).collect();
        for difference in differences {
            let key = difference.key.strip_prefix(section).and_then(|rest| rest.strip_prefix('.'));
            if key.is_some_and(|key| !TRAINING_ONLY.contains(&key)) {
                let what = format!("{}: \"{}\" is not the same condition: it", difference.key, condition.name());
                warnings.extend(differing_of(&what, &under, |member| {
                    Some(shown(value_at(&member.files.config, &difference.key)))
                }));
            }
        }
    }
    warnings
}

/// What ran the runs: every start of a run counts.
fn machines(members: &[Member]) -> Vec<String> {
    let mut warnings = Vec::new();
    for (what, path) in [
        ("device", "device"),
        ("the number of threads", "threads"),
        ("CPU", "cpu.model"),
        ("SIMD", "cpu.simd"),
        ("temper's commit", "git_commit"),
        ("temper's version", "temper_version"),
        ("libtorch", "libtorch_version"),
        ("noise_version", "noise_version"),
    ] {
        warnings.extend(differing(what, members, |member| {
            let run = &member.files.run;
            let starts = std::iter::once(run).chain(run["resumes"].as_array().into_iter().flatten());
            let mut values: Vec<String> = starts.map(|start| shown(value_at(start, path))).collect();
            values.dedup();
            Some(values.join(", then "))
        }));
    }
    warnings
}

/// `WHAT differs: VALUE (RUNS); VALUE (RUNS)`, or None where it does not. Runs without a value do not count.
fn differing(what: &str, members: &[Member], value: impl Fn(&Member) -> Option<String>) -> Option<String> {
    differing_of(what, &members.iter().collect::<Vec<_>>(), value)
}

fn differing_of(what: &str, members: &[&Member], value: impl Fn(&Member) -> Option<String>) -> Option<String> {
    let mut groups: Vec<(String, Vec<&Member>)> = Vec::new();
    for member in members {
        let Some(value) = value(member) else { continue };
        match groups.iter_mut().find(|(of, _)| *of == value) {
            Some((_, group)) => group.push(member),
            None => groups.push((value, vec![member])),
        }
    }
    if groups.len() < 2 {
        return None;
    }
    let text = |(value, group): &(String, Vec<&Member>)| format!("{value} ({})", names(group));
    Some(format!("{what} differs: {}", groups.iter().map(text).collect::<Vec<_>>().join("; ")))
}

/// An arm by its name where all its runs are meant, else run by run.
fn names(group: &[&Member]) -> String {
    let mut names: Vec<String> = Vec::new();
    for member in group {
        let whole = group.iter().filter(|other| other.arm.arm == member.arm.arm).count() == member.arm.runs.len();
        let name = if whole { member.arm.arm.clone() } else { member.name() };
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.join(", ")
}

impl Member<'_> {
    fn name(&self) -> String {
        format!("{} seed {}", self.arm.arm, self.result.seed)
    }
}

fn value_at<'a>(value: &'a Value, path: &str) -> &'a Value {
    path.split('.').fold(value, |value, key| &value[key])
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "none".to_string(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
