//! The rules that score a completion: 1 when the answer found in it is the ground truth, else 0. What a configuration makes
//! of them, of commands and of sums: scorer.rs.
//!
//! Three ways to find and compare it (numerics.md section 7):
//! - strict: in the last 300 characters, the last `#### ` followed by an optional minus, digits, dots and
//!   commas; commas and `$` removed; the strings must be equal. The same as verl's `gsm8k.py`.
//! - flexible: in the last 300 characters, the last run of digits, dots and commas with an optional minus,
//!   compared as a string as it stands. verl's too: `1,234` is not `1234` here.
//! - numeric: the last `####`, else the last `\boxed{}`, else the last number; `$ , %` and a trailing dot
//!   dropped; compared as exact rationals, so `18.0`, `36/2` and `\frac{36}{2}` are 18.

mod command;
mod number;
pub mod scorer;

use std::sync::LazyLock;

use regex::Regex;

pub use super::section::RewardMode;
use number::Rational;

/// strict and flexible look at the end of a completion only.
const CLIP_CHARACTERS: usize = 300;

static STRICT: LazyLock<Regex> = LazyLock::new(|| constant_pattern(r"#### (-?[0-9.,]+)"));
static FLEXIBLE: LazyLock<Regex> = LazyLock::new(|| constant_pattern(r"-?[0-9.,]+"));

/// All three scores of one completion, each 0 or 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RewardScore {
    pub strict: f64,
    pub flexible: f64,
    pub numeric: f64,
}

impl RewardScore {
    pub fn new(completion: &str, ground_truth: &str) -> RewardScore {
        let score = |mode| score(mode, completion, ground_truth);
        RewardScore {
            strict: score(RewardMode::Strict),
            flexible: score(RewardMode::Flexible),
            numeric: score(RewardMode::Numeric),
        }
    }

    pub fn get(&self, mode: RewardMode) -> f64 {
        match mode {
            RewardMode::Strict => self.strict,
            RewardMode::Flexible => self.flexible,
            RewardMode::Numeric => self.numeric,
        }
    }
}

/// 1 when the answer that `mode` finds in `completion` is `ground_truth`, else 0.
pub fn score(mode: RewardMode, completion: &str, ground_truth: &str) -> f64 {
    let right = match mode {
        RewardMode::Strict => strict_answer(completion).is_some_and(|a| a == ground_truth),
        RewardMode::Flexible => flexible_answer(completion).is_some_and(|a| a == ground_truth),
        RewardMode::Numeric => {
            let answer = numeric_answer(completion);
            answer.is_some() && answer == number::first_in(ground_truth)
        }
    };
    f64::from(u8::from(right))
}

pub fn strict_answer(completion: &str) -> Option<String> {
    let found = STRICT.captures_iter(last_characters(completion)).last()?;
    Some(found[1].replace([',', '$'], ""))
}

/// The last match that is not a lone dot; if all are, the first of them, as verl has it.
fn flexible_answer(completion: &str) -> Option<&str> {
    let mut matches: Vec<&str> = FLEXIBLE.find_iter(last_characters(completion)).map(|m| m.as_str()).collect();
    matches.reverse();
    matches.iter().find(|m| **m != ".").or(matches.last()).copied()
}

/// A marker with no number after it does not count, so that a stray `####` cannot hide an answer.
fn numeric_answer(completion: &str) -> Option<Rational> {
    let after_marker = completion.rmatch_indices("####").find_map(|(at, marker)| {
        let line = completion[at + marker.len()..].lines().next()?;
        number::first_in(line)
    });
    after_marker.or_else(|| last_boxed(completion)).or_else(|| number::last_in(completion))
}

fn last_boxed(completion: &str) -> Option<Rational> {
    completion
        .rmatch_indices("\\boxed{")
        .find_map(|(at, opening)| number::first_in(until_closing_brace(&completion[at + opening.len()..])))
}

/// The text before the brace that closes the one just opened (all of it when none does).
fn until_closing_brace(text: &str) -> &str {
    let mut depth = 0usize;
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => return &text[..at],
            '}' => depth -= 1,
            _ => {}
        }
    }
    text
}

fn last_characters(text: &str) -> &str {
    let start = text.char_indices().rev().nth(CLIP_CHARACTERS - 1).map_or(0, |(at, _)| at);
    &text[start..]
}

fn constant_pattern(pattern: &str) -> Regex {
    Regex::new(pattern).expect("the two patterns above are constant and compiled by the tests")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (completion, ground truth, strict, flexible, numeric)
    const TABLE: &[(&str, &str, u8, u8, u8)] = &[
        ("7+5=12;12-3=9\n#### 9", "9", 1, 1, 1),
        ("#### 9", "9", 1, 1, 1),
        ("#### 11", "9", 0, 0, 0),
        ("", "9", 0, 0, 0),
        ("no number at all", "9", 0, 0, 0),
        ("####9", "9", 0, 1, 1),
        ("####  9", "9", 0, 1, 1),
        ("### 9", "9", 0, 1, 1),
        ("##### 9", "9", 1, 1, 1),
        ("#### 9.", "9", 0, 0, 1),
        ("#### 9 apples", "9", 1, 1, 1),
        ("#### 9\n", "9", 1, 1, 1),
        ("#### 9\nthat is 9 of 12", "9", 1, 0, 1),
        ("#### 3\n#### 9", "9", 1, 1, 1),
        ("#### 9\n#### 3", "9", 0, 0, 0),
        ("#### 9\n#### ", "9", 1, 1, 1),
        ("#### 9 ####", "9", 1, 1, 1),
        ("#### $9", "9", 0, 1, 1),
        ("#### 9$", "9", 1, 1, 1),
        ("#### 9%", "9", 1, 1, 1),
        ("#### -9", "-9", 1, 1, 1),
        ("#### - 9", "-9", 0, 0, 0),
        ("#### -9", "9", 0, 0, 0),
        ("#### −9", "-9", 0, 0, 1),
        ("#### -$9", "-9", 0, 0, 1),
        ("#### 1,234", "1234", 1, 0, 1),
        ("#### 1,2,3,4", "1234", 1, 0, 1),
        ("#### 1,234,567.50", "1234567.5", 0, 0, 1),
        ("#### 9.00", "9", 0, 0, 1),
        ("#### 09", "9", 0, 0, 1),
        ("#### 0", "-0", 0, 0, 1),
        ("#### .5", "0.5", 0, 0, 1),
        ("#### 1/2", "0.5", 0, 0, 1),
        ("#### 36/4", "9", 0, 0, 1),
        ("#### 9/0", "9", 1, 0, 0),
        ("#### 0.1", "0.10000000000000000001", 0, 0, 0),
        ("#### 100000000000000000000000001", "100000000000000000000000000", 0, 0, 0),
        ("#### 9e3", "9000", 0, 0, 0),
        ("#### nine", "9", 0, 0, 0),
        ("the answer is 9", "9", 0, 1, 1),
        ("the answer is 9.", "9", 0, 0, 1),
        ("the answer is 9 .", "9", 0, 1, 1),
        ("the answer is 9, I think", "9", 0, 0, 1),
        ("12-3=9", "9", 0, 1, 1),
        ("so 12-9", "9", 0, 0, 1),
        ("\\boxed{9}", "9", 0, 1, 1),
        ("\\boxed{9} after 3 steps", "9", 0, 0, 1),
        ("\\boxed{\\frac{1}{2}}", "0.5", 0, 0, 1),
        ("\\boxed{-\\dfrac{9}{3}}", "-3", 0, 0, 1),
        ("\\boxed{\\text{9 figs}} or 8", "9", 0, 0, 1),
        ("\\boxed{\\$1{,}234}", "1234", 0, 0, 1),
        ("\\boxed{9", "9", 0, 1, 1),
        ("\\boxed{} 9", "9", 0, 1, 1),
        ("\\boxed{3}\n#### 9", "9", 1, 1, 1),
        ("#### 9\n\\boxed{3}", "9", 1, 0, 1),
        ("\u{FF03}#### \u{FF19}", "9", 0, 0, 0),
        ("#### 9", "", 0, 0, 0),
        ("#### ", "", 0, 0, 0),
    ];

    #[test]
    fn nasty_answers() {
        for &(completion, truth, strict, flexible, numeric) in TABLE {
            let found = RewardScore::new(completion, truth);
            let expected = RewardScore { strict: strict.into(), flexible: flexible.into(), numeric: numeric.into() };
            assert_eq!(found, expected, "{completion:?} against {truth:?}");
        }
    }

    #[test]
    fn strict_and_flexible_see_the_last_300_characters() {
        // Characters, not bytes: each é is two bytes.
        for (padding, expected) in [(294, 1.0), (295, 0.0)] {
            let completion = format!("#### 9{}", "é".repeat(padding));
            assert_eq!(score(RewardMode::Strict, &completion, "9"), expected, "{padding}");
        }
        let completion = format!("#### 9{}", "é".repeat(299));
        assert_eq!(score(RewardMode::Flexible, &completion, "9"), 1.0);
        let completion = format!("9{}", "é".repeat(300));
        assert_eq!(score(RewardMode::Flexible, &completion, "9"), 0.0);
        assert_eq!(score(RewardMode::Numeric, &completion, "9"), 1.0);
    }

    #[test]
    fn lone_dots_and_commas_are_no_answer() {
        assert_eq!(flexible_answer("well . . ."), Some("."));
        assert_eq!(flexible_answer("9 . ."), Some("9"));
        assert_eq!(flexible_answer("9 , then"), Some(","));
    }
}
