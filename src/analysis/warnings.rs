//! What speaks against comparing runs, or for doubt in the result: one line each, with the runs that it is about. `compare`
//! prints the list, a page has it in its head and above its comparison.

use std::collections::BTreeSet;

use serde_json::Value;

use super::arms::{Arm, KeyDifference, config_differences, plain};
use super::run_files::RunFiles;
use crate::rl::evaluation::Condition;

#[derive(Debug)]
pub struct Warning(pub About, pub String);

/// Where a page says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum About {
    /// Noise that was not what was planned.
    Noise,
    Progress,
    /// A stop rule ended a run.
    Stopped,
    Seeds,
    Inputs,
    /// What ran the runs: devices and versions.
    Machines,
    /// What matters only once the arms' results are held against each other.
    Comparison,
}

/// A run, and the arm it is of.
struct Member<'a> {
    arm: &'a Arm<&'a RunFiles>,
    files: &'a RunFiles,
}

/// The first arm with a validation is what the others are held against. Runs without one may be among them.
pub fn of(arms: &[Arm<&RunFiles>]) -> Vec<Warning> {
    let members: Vec<Member> =
        arms.iter().flat_map(|arm| arm.runs.iter().map(move |files| Member { arm, files })).collect();
    let differences = config_differences(arms);
    let mut warnings = not_validated(members.iter().map(|member| member.files));
    warnings.extend(members.iter().flat_map(progress));
    warnings.extend(differing(About::Comparison, "the last validation's step", &members, |member| {
        member.files.validated_step().map(|step| step.to_string())
    }));
    warnings.extend(seeds(arms));
    warnings.extend(questions(arms, &members, &differences));
    warnings.extend(defects(&members));
    warnings.extend(injection(&members, &differences));
    warnings.extend(machines(&members));
    warnings
}

/// Runs that no comparison holds.
pub fn not_validated<'a>(runs: impl Iterator<Item = &'a RunFiles>) -> Vec<Warning> {
    let text = |run: &RunFiles| format!("{}: no validation yet, left out of comparisons", run.path.display());
    let found = runs.filter(|run| run.conditions().is_empty());
    found.map(|run| Warning(About::Progress, text(run))).collect()
}

/// Whether a run came to its end, and was validated there.
fn progress(member: &Member) -> Vec<Warning> {
    let (run, name, step) = (member.files, member.name(), member.files.last_step());
    let mut warnings = Vec::new();
    match (&run.stopped, run.planned_steps()) {
        (Some(by), _) => warnings.push(Warning(About::Stopped, format!("{name}: ended by {by}"))),
        (None, Some(total)) if step < total => {
            warnings.push(Warning(About::Progress, format!("{name} is not finished: step {step} of {total}")));
        }
        (None, None) if step == 0 => warnings.push(Warning(About::Progress, format!("{name} is not finished: step 0"))),
        _ => {}
    }
    if let Some(validated) = run.validated_step().filter(|validated| *validated < step) {
        let about = if run.finished() { About::Comparison } else { About::Progress };
        let text = format!("{name}: trained to step {step}, but its last validation is of step {validated}");
        warnings.push(Warning(about, text));
    }
    warnings
}

/// Seeds that some arms lack; arms with one.
fn seeds(arms: &[Arm<&RunFiles>]) -> Vec<Warning> {
    let all: BTreeSet<u64> = arms.iter().flat_map(|arm| &arm.runs).map(|run| run.seed).collect();
    let mut warnings = Vec::new();
    for arm in arms {
        let missing = all.iter().filter(|seed| !arm.runs.iter().any(|run| run.seed == **seed));
        let missing: Vec<String> = missing.map(u64::to_string).collect();
        if !missing.is_empty() {
            warnings.push(Warning(About::Seeds, format!("{} has no run of seed {}", arm.name, missing.join(", "))));
        }
        if arm.runs.len() == 1 {
            let text = format!("{} has one seed only: a difference from one seed is not evidence", arm.name);
            warnings.push(Warning(About::Comparison, text));
        }
    }
    warnings
}

/// Whether the arms answered the same questions, in the same conditions, and were scored alike.
fn questions(arms: &[Arm<&RunFiles>], members: &[Member], differences: &[KeyDifference]) -> Vec<Warning> {
    let mut warnings = Vec::new();
    let conditions = |member: &Member| {
        let names: Vec<&str> = member.files.last_conditions().iter().map(|c| c.name()).collect();
        (!names.is_empty()).then(|| names.join(" "))
    };
    warnings.extend(differing(About::Comparison, "what the last validation has", members, conditions));
    warnings.extend(differing(About::Comparison, "the number of validation questions", members, |member| {
        member.files.validations.last().map(|row| shown(&row["val/n"]))
    }));
    let names: BTreeSet<&String> =
        members.iter().filter_map(|member| member.files.run["inputs"].as_object()).flat_map(|map| map.keys()).collect();
    for name in names {
        warnings.extend(differing(About::Inputs, &format!("the content of {name}"), members, |member| {
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
        "reward.kind",
        "reward.mode",
        "reward.command",
        "reward.sum",
    ] {
        if differences.iter().any(|difference| difference.key == key) {
            let value = |member: &Member| Some(shown(value_at(&member.files.config, key)));
            warnings.extend(differing(About::Comparison, key, members, value));
        }
    }
    let mut validated = arms.iter().filter(|arm| arm.runs.iter().any(|run| !run.validations.is_empty()));
    if let Some(baseline) = validated.next() {
        for arm in validated {
            if arm.runs.iter().any(|run| baseline.runs.iter().any(|other| other.questions() != run.questions())) {
                let text = format!("{} and {} answered different questions: no paired test", arm.name, baseline.name);
                warnings.push(Warning(About::Comparison, text));
            }
        }
    }
    for member in members {
        if member.files.last_conditions().into_iter().any(|condition| member.files.marks(condition).is_none()) {
            let text = format!("{}: no marks per question in metrics.jsonl: no paired test", member.name());
            warnings.push(Warning(About::Comparison, text));
        }
    }
    warnings
}

/// Known defects of the original that some runs reproduce and others do not.
fn defects(members: &[Member]) -> Vec<Warning> {
    const SWITCHES: [&str; 4] = [
        "noise_injection.compat",
        "noisy_ops.exclude_modules",
        "noisy_ops.dw_draw",
        "fake_quant", // by format
    ];
    let of = |switch: &str| {
        let what = format!("{switch}, which can reproduce a defect of the original,");
        let value = |member: &Member| Some(defect(&member.files.config, switch).unwrap_or("no defect".to_string()));
        differing(About::Comparison, &what, members, value)
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
fn injection(members: &[Member], differences: &[KeyDifference]) -> Vec<Warning> {
    let mut warnings = Vec::new();
    for member in members {
        let steps = member.files.disagreeing_steps();
        if let Some(first) = steps.first() {
            let text = format!(
                "{}: in {} steps the measured noise disagreed with the plan, the first is {first} (see injection.jsonl)",
                member.name(),
                steps.len()
            );
            warnings.push(Warning(About::Noise, text));
        }
    }
    // What a validation does not depend on.
    const TRAINING_ONLY: [&str; 4] = ["enabled", "phases", "draw", "dw_draw"];
    for (section, condition) in [("noisy_ops", Condition::Noisy), ("fake_quant", Condition::Quantized)] {
        let under = || members.iter().filter(|member| member.files.last_conditions().contains(&condition));
        for difference in differences {
            let key = difference.key.strip_prefix(section).and_then(|rest| rest.strip_prefix('.'));
            if key.is_some_and(|key| !TRAINING_ONLY.contains(&key)) {
                let what = format!("{}: \"{}\" is not the same condition: it", difference.key, condition.name());
                warnings.extend(differing(About::Comparison, &what, under(), |member| {
                    Some(shown(value_at(&member.files.config, &difference.key)))
                }));
            }
        }
    }
    warnings
}

/// What ran the runs: every start of a run counts.
fn machines(members: &[Member]) -> Vec<Warning> {
    let mut warnings = Vec::new();
    for (what, path) in [
        ("device", "device"),
        ("the number of threads", "threads"),
        ("CPU", "cpu.model"),
        ("SIMD", "cpu.simd"),
        ("temper's commit", "git_commit"),
        ("temper's sources", "sources"),
        ("temper's version", "temper_version"),
        ("libtorch", "libtorch_version"),
        ("noise_version", "noise_version"),
    ] {
        warnings.extend(differing(About::Machines, what, members, |member| {
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
fn differing<'a>(
    about: About,
    what: &str,
    members: impl IntoIterator<Item = &'a Member<'a>>,
    value: impl Fn(&Member) -> Option<String>,
) -> Option<Warning> {
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
    Some(Warning(about, format!("{what} differs: {}", groups.iter().map(text).collect::<Vec<_>>().join("; "))))
}

/// An arm by its name where all its runs are meant, else run by run.
fn names(group: &[&Member]) -> String {
    let mut names: Vec<String> = Vec::new();
    for member in group {
        let whole = group.iter().filter(|other| other.arm.name == member.arm.name).count() == member.arm.runs.len();
        let name = if whole { member.arm.name.clone() } else { member.name() };
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.join(", ")
}

impl Member<'_> {
    fn name(&self) -> String {
        self.arm.name_of(self.files)
    }
}

fn value_at<'a>(value: &'a Value, path: &str) -> &'a Value {
    path.split('.').fold(value, |value, key| &value[key])
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "none".to_string(),
        other => plain(other),
    }
}
