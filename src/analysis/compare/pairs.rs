//! Every arm against the baseline, condition by condition, on the questions that both answered.

use serde::Serialize;

use super::arms::Arm;
use crate::Result;
use crate::analysis::statistics::holm;
use crate::analysis::statistics::mcnemar::{McNemar, mcnemar, paired_interval};
use crate::analysis::statistics::two_way::{TwoWay, minimum_detectable_difference};
use crate::rl::evaluation::Condition;

const BOOTSTRAP_REPLICATES: u32 = 10_000;

/// Where interval and p come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Student's t over the seeds that both arms have, and over questions.
    TwoWay,
    /// The same where they share fewer than two seeds, and have two or more each.
    TwoWayUnpaired,
    /// One seed.
    McNemar,
}

#[derive(Debug, Serialize)]
pub struct Pair {
    pub arm: String,
    pub condition: Condition,
    pub n: u64,
    #[serde(flatten)]
    pub figures: Figures,
    /// Holm-adjusted over every pair that has a p.
    pub p_holm: Option<f64>,
    /// Share of the questions that one of two runs of a seed alone answered, mean over shared seeds.
    pub discordance: Option<f64>,
    /// None where nothing varies.
    pub minimum_detectable_difference: Option<f64>,
    pub by_seed: Vec<SeedTest>,
}

#[derive(Debug, Serialize)]
pub struct Figures {
    pub method: Method,
    /// Used of the arm, of the baseline.
    pub seeds: (usize, usize),
    /// Accuracy of the arm less that of the baseline.
    pub difference: f64,
    /// None where nothing varies.
    pub ci95: Option<(f64, f64)>,
    pub standard_error: f64,
    /// None: the normal law.
    pub degrees_of_freedom: Option<f64>,
    pub p: Option<f64>,
    /// Over seeds and questions; None for one seed.
    pub bootstrap_ci95: Option<(f64, f64)>,
}

/// Two runs of one seed: the arm's comes first.
#[derive(Debug, Serialize)]
pub struct SeedTest {
    pub seed: u64,
    #[serde(flatten)]
    pub test: McNemar,
}

/// Of the arms after the first against the first.
pub fn against_baseline(arms: &[Arm]) -> Result<Vec<Pair>> {
    let mut pairs = Vec::new();
    for arm in &arms[1..] {
        for condition in Condition::ALL {
            pairs.extend(pair(arm, &arms[0], condition)?);
        }
    }
    let tested: Vec<usize> = (0..pairs.len()).filter(|&i| pairs[i].figures.p.is_some()).collect();
    let p: Vec<f64> = tested.iter().filter_map(|&i| pairs[i].figures.p).collect();
    tested.into_iter().zip(holm(&p)).for_each(|(i, adjusted)| pairs[i].p_holm = Some(adjusted));
    Ok(pairs)
}

/// A run that can be held against others.
#[derive(Clone, Copy)]
struct Marked<'a> {
    seed: u64,
    questions: &'a str,
    marks: &'a [bool],
}

fn marked(arm: &Arm, condition: Condition) -> Vec<Marked<'_>> {
    let marks = arm.runs.iter().map(|run| run.condition(condition).and_then(|found| found.marks.as_deref()));
    let with_marks = arm.runs.iter().zip(marks);
    with_marks
        .filter_map(|(run, marks)| Some(Marked { seed: run.seed, questions: &run.questions, marks: marks? }))
        .collect()
}

/// None where the two cannot be compared: no marks, other questions, or one run each of different seeds.
fn pair(arm: &Arm, baseline: &Arm, condition: Condition) -> Result<Option<Pair>> {
    let (mut of_arm, mut of_baseline) = (marked(arm, condition), marked(baseline, condition));
    // What most runs answered; one that differs is left out, not all others.
    let same = |a: &Marked, b: &Marked| a.questions == b.questions && a.marks.len() == b.marks.len();
    let votes = |run: &Marked| of_arm.iter().chain(&of_baseline).filter(|other| same(run, other)).count();
    let Some(reference) = of_baseline.iter().rev().max_by_key(|run| votes(run)).copied() else { return Ok(None) };
    let alike = |run: &Marked| same(run, &reference);
    of_arm.retain(alike);
    of_baseline.retain(alike);
    let partner = |run: &Marked| of_baseline.iter().find(|other| other.seed == run.seed).map(|other| other.marks);
    let shared: Vec<(u64, &[bool], &[bool])> =
        of_arm.iter().filter_map(|run| Some((run.seed, run.marks, partner(run)?))).collect();
    let tests: Vec<McNemar> = shared.iter().map(|(_, marks, other)| mcnemar(marks, other)).collect();
    let n = reference.marks.len() as f64;
    let discordant = tests.iter().map(|test| (test.first_only + test.second_only) as f64).sum::<f64>();

    let paired = shared.len() > 1;
    let (left, right): (Vec<&[bool]>, Vec<&[bool]>) = match paired {
        true => shared.iter().map(|(_, marks, other)| (*marks, *other)).unzip(),
        false => (of_arm.iter().map(|run| run.marks).collect(), of_baseline.iter().map(|run| run.marks).collect()),
    };
    let figures = match (TwoWay::new(&left, &right, paired), tests.first()) {
        (Some(two_way), _) => {
            let found = two_way.difference();
            Figures {
                method: if paired { Method::TwoWay } else { Method::TwoWayUnpaired },
                seeds: (left.len(), right.len()),
                difference: found.difference,
                ci95: found.interval(),
                standard_error: found.standard_error,
                degrees_of_freedom: Some(found.degrees_of_freedom),
                p: found.p(),
                bootstrap_ci95: Some(two_way.bootstrap(BOOTSTRAP_REPLICATES)?),
            }
        }
        (None, Some(test)) => Figures {
            method: Method::McNemar,
            seeds: (1, 1),
            difference: (test.first_only as f64 - test.second_only as f64) / n,
            ci95: Some(paired_interval(test.first_only, test.second_only, n as u64)),
            standard_error: discordant.sqrt() / n,
            degrees_of_freedom: None,
            p: Some(test.p_mid),
            bootstrap_ci95: None,
        },
        (None, None) => return Ok(None),
    };
    let by_seed = |((seed, ..), test): (&(u64, &[bool], &[bool]), McNemar)| SeedTest { seed: *seed, test };
    let minimum_detectable_difference = (figures.standard_error > 0.0).then(|| {
        minimum_detectable_difference(figures.standard_error, figures.degrees_of_freedom.unwrap_or(f64::INFINITY))
    });
    Ok(Some(Pair {
        arm: arm.arm.clone(),
        condition,
        n: reference.marks.len() as u64,
        figures,
        p_holm: None,
        discordance: (!tests.is_empty()).then(|| discordant / (tests.len() as f64 * n)),
        minimum_detectable_difference,
        by_seed: shared.iter().zip(tests).map(by_seed).collect(),
    }))
}
