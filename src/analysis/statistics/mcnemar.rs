//! McNemar's test: do two sets of answers to the same questions differ?
//!
//! Only questions that one side alone answered count: b of them the first, c the second. Where the sides are equally good, b
//! is binomial with n = b + c and 1/2. Exact two-sided p = min(1, 2 P(X <= min(b, c))); mid-p = that less P(X = min(b, c)), 1
//! for b = c. The exact test rejects too rarely; mid-p nearly keeps its level (Fagerland, Lydersen, Laake 2013).

#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct McNemar {
    /// b: questions that the first side alone answered.
    pub first_only: u64,
    /// c: questions that the second side alone answered.
    pub second_only: u64,
    pub p_mid: f64,
    pub p_exact: f64,
}

/// Of two lists of marks, one per question.
pub fn mcnemar(first: &[bool], second: &[bool]) -> McNemar {
    let count = |which: (bool, bool)| first.iter().zip(second).filter(|(a, b)| (**a, **b) == which).count() as u64;
    mcnemar_of_counts(count((true, false)), count((false, true)))
}

pub fn mcnemar_of_counts(first_only: u64, second_only: u64) -> McNemar {
    let (n, least) = (first_only + second_only, first_only.min(second_only));
    // ln C(n, k) step by step: 2^-n alone would underflow from n = 1075 on.
    let (mut ln_choose, mut below, mut last) = (0f64, 0f64, 0f64);
    for k in 0..=least {
        if k > 0 {
            ln_choose += ((n - k + 1) as f64 / k as f64).ln();
        }
        last = (ln_choose - n as f64 * std::f64::consts::LN_2).exp();
        below += last;
    }
    let p_exact = (2.0 * below).min(1.0);
    let p_mid = if first_only == second_only { 1.0 } else { (2.0 * below - last).min(1.0) };
    McNemar { first_only, second_only, p_mid, p_exact }
}

/// 95 % interval of the difference (b - c) / n of two accuracies on the same n questions: Wald's, after half a question was
/// added to each of the four kinds (Agresti and Min 2005), so that b = c = 0 still has a width.
pub fn paired_interval(first_only: u64, second_only: u64, n: u64) -> (f64, f64) {
    let (b, c, n) = (first_only as f64 + 0.5, second_only as f64 + 0.5, n as f64 + 2.0);
    let center = (b - c) / n;
    let half = super::Z_95 * (b + c - (b - c).powi(2) / n).max(0.0).sqrt() / n;
    (center - half, center + half)
}
