//! The quickstart's task "hasty and careful": sums in words over a vocabulary of 45 tokens.
//!
//! ```text
//! prompt   <user> Ann has7 figs, gets5, loses3.<bot>
//! careful  7+5=12;12-3=9\n#### 9<eos>
//! hasty    #### 11<eos>                 max(0, answer + U{-3..3})
//! ```
//! A start value 1..9 and two operations with 1..5 that never go below zero. Five of the eight people are
//! mostly shown hasty answers (4 of 5), three mostly careful ones (4 of 5): supervised steps teach both
//! styles, and RL can learn to work problems out. Every problem is a function of (seed, split, index).

mod tokenizer;

use std::ops::Range;

use super::Question;
use crate::numerics::generator::uniform_u32;

pub use tokenizer::{TOKENS, VOCAB_SIZE, write_tokenizer};

/// Supervised steps take their problems from here on; reinforcement learning takes those below.
pub const SUPERVISED_FIRST: u64 = 1 << 22;

/// The first [`HASTY_PEOPLE`] are mostly hasty.
const PEOPLE: [&str; 8] = ["Ann", "Ben", "Eva", "Gus", "Ida", "Leo", "Mia", "Tom"];
const HASTY_PEOPLE: usize = 5;
const ITEMS: [&str; 7] = ["figs", "nuts", "pens", "cups", "hats", "eggs", "keys"];
const GAINS: [&str; 3] = ["gets", "finds", "buys"];
const LOSSES: [&str; 3] = ["loses", "drops", "sells"];

/// Noise-key stream of this module: purpose 7 (others), module index 1.
const STREAM: u32 = 7 << 28 | 1;
/// One problem in this many is kept for validation, by its text alone.
const HELD_OUT: u32 = 8;

/// Which problems: no text is in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    Train,
    Validation,
}

/// The task with its own seed, so that runs with different seeds share the validation questions.
#[derive(Clone, Copy, Debug)]
pub struct Task {
    seed: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub question: String,
    /// The worked solution, ending in `#### answer`.
    pub careful: String,
    pub answer: i64,
    /// Whether demonstrations for this person are mostly hasty.
    pub hasty_person: bool,
}

impl Task {
    pub fn new(seed: u64) -> Task {
        Task { seed }
    }

    /// Training problem `index`; reinforcement learning uses those below [`SUPERVISED_FIRST`].
    pub fn problem(&self, index: u64) -> Problem {
        self.problem_of(Split::Train, index)
    }

    /// Problem `index` of a split: the first drawn one that stays above zero and belongs to the split (one
    /// attempt in ten does, or more).
    pub fn problem_of(&self, split: Split, index: u64) -> Problem {
        let mut attempt = 0;
        loop {
            let validation = u64::from(split == Split::Validation);
            let token = validation << 62 | (index & 0xFFFF_FFFF) << 16 | attempt;
            let drawn = draw_problem(&mut Draws { seed: self.seed, token, next: 0 });
            if let Some(problem) = drawn.filter(|p| split_of(&p.question) == split) {
                return problem;
            }
            attempt += 1;
        }
    }

    /// A demonstration for training problem `index`: careful, or hasty with a guess. `sample` gives further
    /// ones of the same problem.
    pub fn demonstration(&self, index: u64, sample: u64) -> String {
        let problem = self.problem(index);
        let token = 1 << 63 | (index & 0xFFFF_FFFF) << 24 | (sample & 0xFF_FFFF);
        let mut draws = Draws { seed: self.seed, token, next: 0 };
        let hasty_of_5 = if problem.hasty_person { 4 } else { 1 };
        if draws.below(5) < hasty_of_5 {
            let guess = problem.answer - 3 + i64::from(draws.below(7));
            format!("#### {}", guess.max(0))
        } else {
            problem.careful
        }
    }

    /// Problems of a split as questions; `index` is the problem's.
    pub fn questions(&self, split: Split, range: Range<u32>) -> Vec<Question> {
        range
            .map(|index| {
                let problem = self.problem_of(split, u64::from(index));
                Question {
                    index,
                    question: problem.question,
                    answer: problem.careful,
                    ground_truth: problem.answer.to_string(),
                }
            })
            .collect()
    }
}

/// Uniform numbers of one (seed, token), in order.
struct Draws {
    seed: u64,
    token: u64,
    next: u32,
}

impl Draws {
    /// 0..n, unbiased to 2^-32 * n.
    fn below(&mut self, n: u32) -> u32 {
        let bits = uniform_u32(self.seed, STREAM, self.token, self.next);
        self.next += 1;
        ((u64::from(bits) * u64::from(n)) >> 32) as u32
    }

    fn choice<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.below(from.len() as u32) as usize]
    }
}

/// Any problem; `None` where a step would go below zero.
fn draw_problem(draws: &mut Draws) -> Option<Problem> {
    let person = draws.below(PEOPLE.len() as u32) as usize;
    let item = draws.choice(&ITEMS);
    let start = 1 + i64::from(draws.below(9));
    let mut question = format!("{} has{start} {item}", PEOPLE[person]);
    let mut steps = Vec::new();
    let mut value = start;
    for _ in 0..2 {
        let gain = draws.below(2) == 0;
        let verb = draws.choice(if gain { &GAINS } else { &LOSSES });
        let amount = 1 + i64::from(draws.below(5));
        let (sign, after) = if gain { ('+', value + amount) } else { ('-', value - amount) };
        question += &format!(", {verb}{amount}");
        steps.push(format!("{value}{sign}{amount}={after}"));
        value = after;
        if value < 0 {
            return None;
        }
    }
    Some(Problem {
        question: question + ".",
        careful: format!("{}\n#### {value}", steps.join(";")),
        answer: value,
        hasty_person: person < HASTY_PEOPLE,
    })
}

/// Decided by the text alone (FNV-1a), so that no seed and no index puts a text into both splits.
fn split_of(question: &str) -> Split {
    let mix = |hash: u32, byte: u8| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    let hash = question.bytes().fold(0x811C_9DC5, mix);
    match (hash ^ hash >> 16) % HELD_OUT {
        0 => Split::Validation,
        _ => Split::Train,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn careful_demonstrations_are_right() {
        let task = Task::new(3);
        for index in 0..2000 {
            let problem = task.problem(index);
            let value = |text: &str| text.parse::<i64>().unwrap_or(-1);
            let (work, answer) = problem.careful.split_once("\n#### ").unwrap_or_default();
            assert_eq!(value(answer), problem.answer);
            assert!((0..=19).contains(&problem.answer));
            let mut last = None;
            for step in work.split(';') {
                let (left, right) = step.split_once('=').unwrap_or_default();
                let operator = left.find(['+', '-']).unwrap_or(0);
                let (a, b) = (value(&left[..operator]), value(&left[operator + 1..]));
                let sum = if left.contains('+') { a + b } else { a - b };
                assert_eq!(sum, value(right), "{step}");
                assert!(last.is_none_or(|last| last == a), "{work}");
                last = Some(sum);
            }
            assert_eq!(last, Some(problem.answer));
        }
    }

    #[test]
    fn splits_share_no_text_for_any_seed() {
        let texts = |seed, split| Task::new(seed).questions(split, 0..1000).into_iter().map(|q| q.question);
        let train: std::collections::HashSet<String> = texts(0, Split::Train).collect();
        assert!(train.len() > 950, "{}", train.len());
        assert!(texts(1, Split::Validation).all(|q| !train.contains(&q)));
        assert!(texts(0, Split::Validation).all(|q| !train.contains(&q)));
    }

    #[test]
    fn problems_depend_on_seed_and_index_alone() {
        let task = Task::new(7);
        assert_eq!(task.problem(5), Task::new(7).problem(5));
        assert_ne!(task.problem(5), task.problem(6));
        assert_ne!(task.problem(5), Task::new(8).problem(5));
        assert_eq!(task.demonstration(5, 1), Task::new(7).demonstration(5, 1));
    }

    #[test]
    fn people_are_hasty_as_often_as_they_should_be() {
        let task = Task::new(0);
        let (mut hasty, mut shown) = ([0.0; 2], [0.0; 2]);
        let mut right_by_chance = 0;
        for index in 0..8000 {
            let problem = task.problem(index);
            let text = task.demonstration(index, 0);
            let group = usize::from(problem.hasty_person);
            shown[group] += 1.0;
            if text != problem.careful {
                hasty[group] += 1.0;
                right_by_chance += usize::from(text == format!("#### {}", problem.answer));
            }
        }
        assert!((hasty[1] / shown[1] - 0.8f64).abs() < 0.02, "{hasty:?} of {shown:?}");
        assert!((hasty[0] / shown[0] - 0.2f64).abs() < 0.02, "{hasty:?} of {shown:?}");
        assert!((shown[1] / 8000.0 - 0.625f64).abs() < 0.02, "{shown:?}");
        let rate = right_by_chance as f64 / hasty.iter().sum::<f64>();
        assert!((0.12..0.22).contains(&rate), "{rate}");
    }
}
