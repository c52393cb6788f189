//! Numbers in running text, as exact rationals of any length.
//!
//! A number is `sign? $? digits[,digits]*[.digits]` with an optional `/denominator`, or LaTeX's
//! `\frac{a}{b}`; `$`, `%` and LaTeX's `{,}` and `\,` around and between digits do not count. A minus after a
//! digit or a closing bracket is a subtraction, not a sign.

use std::sync::LazyLock;

use regex::{Captures, Regex};

const DECIMAL: &str = r"\\?\$?(?:[0-9](?:[0-9]|,[0-9]|\{,\}[0-9]|\\,[0-9])*(?:\.[0-9]+)?|\.[0-9]+)";

static NUMBER: LazyLock<Regex> = LazyLock::new(|| {
    let pattern = format!(
        r"(?P<sign>[-−])?(?:\\[dt]?frac\{{(?P<a>-?{DECIMAL})\}}\{{(?P<b>{DECIMAL})\}}|(?P<n>-?{DECIMAL})(?:/(?P<d>{DECIMAL}))?)"
    );
    Regex::new(&pattern).expect("a constant pattern, compiled by the tests")
});

/// numerator / denominator as decimal digits; equality is exact.
#[derive(Clone, Debug)]
pub(super) struct Rational {
    negative: bool,
    /// Most significant digit first, no leading zeros; empty is zero.
    numerator: Vec<u8>,
    denominator: Vec<u8>,
}

impl PartialEq for Rational {
    fn eq(&self, other: &Rational) -> bool {
        let (a, b) = (&self.numerator, &other.numerator);
        if a.is_empty() || b.is_empty() {
            return a.is_empty() && b.is_empty();
        }
        self.negative == other.negative && product(a, &other.denominator) == product(b, &self.denominator)
    }
}

/// The first number in `text`; `None` without one, or when its denominator is zero.
pub(super) fn first_in(text: &str) -> Option<Rational> {
    NUMBER.captures(text).and_then(|found| rational(text, &found))
}

/// The last number in `text`.
pub(super) fn last_in(text: &str) -> Option<Rational> {
    NUMBER.captures_iter(text).last().and_then(|found| rational(text, &found))
}

fn rational(text: &str, found: &Captures) -> Option<Rational> {
    let group = |name| found.name(name).map(|m| m.as_str());
    let numerator = group("a").or(group("n"))?;
    let denominator = group("b").or(group("d")).unwrap_or("1");
    let before = text[..found.get(0)?.start()].chars().next_back();
    let subtraction = before.is_some_and(|c| c.is_ascii_alphanumeric() || ")]}".contains(c));
    let negative = group("sign").is_some() && !subtraction;
    let (top, top_scale) = digits(numerator);
    let (bottom, bottom_scale) = digits(denominator);
    if bottom.is_empty() {
        return None;
    }
    // a*10^-s / (b*10^-t) = a*10^t / (b*10^s)
    Some(Rational {
        negative: negative != numerator.starts_with('-'),
        numerator: shifted(top, bottom_scale),
        denominator: shifted(bottom, top_scale),
    })
}

/// Significant digits and how many of them follow the point.
fn digits(decimal: &str) -> (Vec<u8>, usize) {
    let after_point = decimal.rsplit_once('.').map_or(0, |(_, fraction)| fraction.len());
    let all = decimal.bytes().filter(u8::is_ascii_digit).map(|b| b - b'0');
    (all.skip_while(|&d| d == 0).collect(), after_point)
}

fn shifted(mut number: Vec<u8>, zeros: usize) -> Vec<u8> {
    if !number.is_empty() {
        number.resize(number.len() + zeros, 0);
    }
    number
}

/// Long multiplication; neither factor has leading zeros, nor has the product.
fn product(a: &[u8], b: &[u8]) -> Vec<u8> {
    let mut sums = vec![0u32; a.len() + b.len()];
    for (i, &x) in a.iter().enumerate() {
        let mut carry = 0;
        for (j, &y) in b.iter().enumerate().rev() {
            let at = &mut sums[i + j + 1];
            carry += *at + u32::from(x) * u32::from(y);
            *at = carry % 10;
            carry /= 10;
        }
        sums[i] += carry;
    }
    // Carries that the last row of additions left above 9.
    for i in (1..sums.len()).rev() {
        sums[i - 1] += sums[i] / 10;
        sums[i] %= 10;
    }
    sums.into_iter().map(|d| d as u8).skip_while(|&d| d == 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_those_of_integers() {
        let of = |n: u128| -> Vec<u8> { n.to_string().bytes().map(|b| b - b'0').collect() };
        let numbers = [1u128, 7, 9, 10, 99, 101, 999_999, 1_000_000_007, 99_999_999_999_999];
        for a in numbers {
            for b in numbers {
                assert_eq!(product(&of(a), &of(b)), of(a * b), "{a} * {b}");
            }
        }
    }

    #[test]
    fn equality_is_exact() {
        let equal = |a: &str, b: &str| first_in(a).is_some() && first_in(a) == first_in(b);
        assert!(equal("1/3", "2/6"));
        assert!(equal("0.5/1.5", "1/3"));
        assert!(equal("-0", "0.00"));
        assert!(equal("-1/2", "-0.5"));
        assert!(!equal("1/3", "0.3333333333333333"));
        assert!(!equal("1/2", "-1/2"));
    }
}
