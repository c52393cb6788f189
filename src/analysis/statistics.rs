//! Intervals and errors of measured results.
//!
//! Wilson's interval for a proportion p = k/n at the normal quantile z (Wilson 1927):
//! `center = (p + z^2/2n) / (1 + z^2/n)`, `half = z/(1 + z^2/n) * sqrt(p(1-p)/n + z^2/4n^2)`.

pub mod mcnemar;
pub mod student;
pub mod two_way;

use student::student_quantile;

/// Two-sided 95 %: `normal_quantile(0.975)`.
pub const Z_95: f64 = 1.959_963_984_540_054;

/// Wilson's 95 % interval of `correct` out of `n`, within 0..1. No data say nothing: n = 0 gives (0, 1).
pub fn wilson_interval(correct: u64, n: u64) -> (f64, f64) {
    wilson_interval_at(correct, n, Z_95)
}

/// Wilson's interval at normal quantile `z`.
pub fn wilson_interval_at(correct: u64, n: u64, z: f64) -> (f64, f64) {
    if n == 0 {
        return (0.0, 1.0);
    }
    let n = n as f64;
    let p = correct as f64 / n;
    let shrink = 1.0 + z * z / n;
    let center = (p + z * z / (2.0 * n)) / shrink;
    let half = z / shrink * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt();
    // At 0 and n the ends are exactly 0 and 1; the subtraction leaves a rounding error.
    let low = if p == 0.0 { 0.0 } else { (center - half).max(0.0) };
    let high = if p == 1.0 { 1.0 } else { (center + half).min(1.0) };
    (low, high)
}

/// Mean, sample standard deviation (n - 1) and standard error of the mean. `None` for no values; with one value the
/// spread is unknown and NaN.
pub fn mean_and_standard_error(values: &[f64]) -> Option<MeanError> {
    if values.is_empty() {
        return None;
    }
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    // Two passes: the differences from the mean do not cancel.
    let sum_sq: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    let standard_deviation = if values.len() > 1 { (sum_sq / (n - 1.0)).sqrt() } else { f64::NAN };
    Some(MeanError { n: values.len(), mean, standard_deviation, standard_error: standard_deviation / n.sqrt() })
}

#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct MeanError {
    pub n: usize,
    pub mean: f64,
    pub standard_deviation: f64,
    pub standard_error: f64,
}

impl MeanError {
    /// The 95 % interval of the mean by Student's t with n - 1 degrees of freedom; None for one value.
    pub fn interval(&self) -> Option<(f64, f64)> {
        let half = self.standard_error * student_quantile(0.975, self.n.checked_sub(1).filter(|v| *v > 0)? as f64);
        Some((self.mean - half, self.mean + half))
    }
}

/// Holm's step-down correction (Holm 1979): of m p-values in rising order, the i-th (from 0) becomes the largest of
/// (m - j) p_j over j <= i, at most 1. The chance that any true hypothesis falls below 5 % is then at most 5 %.
pub fn holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|a, b| p[*a].total_cmp(&p[*b]));
    let (mut adjusted, mut largest) = (vec![0.0; p.len()], 0f64);
    for (rank, place) in order.into_iter().enumerate() {
        largest = largest.max((p.len() - rank) as f64 * p[place]).min(1.0);
        adjusted[place] = largest;
    }
    adjusted
}

/// P(Z <= x) of the standard normal law. Below |x| = 3 the series
/// `1/2 + phi(x) * (x + x^3/3 + x^5/(3*5) + ...)`; beyond, Laplace's continued fraction for the tail
/// `phi(x) / (x + 1/(x + 2/(x + 3/...)))`, which keeps its relative accuracy (Abramowitz & Stegun 26.2.11, 26.2.14).
pub fn normal_cdf(x: f64) -> f64 {
    let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
    if x.abs() < 3.0 {
        let (mut term, mut sum) = (x, x);
        for k in 1..100 {
            term *= x * x / f64::from(2 * k + 1);
            sum += term;
        }
        return 0.5 + density * sum;
    }
    let tail = density / (1..200).rev().fold(x.abs(), |rest, k| x.abs() + f64::from(k) / rest);
    if x > 0.0 { 1.0 - tail } else { tail }
}

/// The x with `normal_cdf(x) = p`: bisection, so as accurate as the function it inverts. p outside (0, 1) gives the
/// infinite end or NaN.
pub fn normal_quantile(p: f64) -> f64 {
    if p.is_nan() || !(0.0..=1.0).contains(&p) {
        return f64::NAN;
    }
    if p == 0.0 || p == 1.0 {
        return if p == 0.0 { f64::NEG_INFINITY } else { f64::INFINITY };
    }
    if p > 0.5 {
        return -normal_quantile(1.0 - p); // the lower tail has the relative accuracy
    }
    let (mut low, mut high) = (-40.0, 0.0);
    for _ in 0..200 {
        let middle = 0.5 * (low + high);
        if normal_cdf(middle) < p { low = middle } else { high = middle }
    }
    0.5 * (low + high)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: f64, expected: f64, tolerance: f64) {
        assert!((got - expected).abs() <= tolerance, "got {got}, expected {expected}");
    }

    #[test]
    fn wilson_agrees_with_values_computed_by_hand() {
        // z^2 = 3.841459. 8/10: center (.8 + .1920729)/1.3841459 = .716740, half 1.959964/1.3841459 *
        // sqrt(.016 + .00960365) = .226577.
        let (low, high) = wilson_interval(8, 10);
        close(low, 0.490162, 1e-6);
        close(high, 0.943318, 1e-6);
        // 813 of 1319 (61.64 %): center (.616376 + .001456)/1.002912 = .616038, half .026206.
        let (low, high) = wilson_interval(813, 1319);
        close(low, 0.589832, 1e-6);
        close(high, 0.642244, 1e-6);
        // None right of 10: the upper end is z^2/(n + z^2) = 3.841459/13.841459.
        let (low, high) = wilson_interval(0, 10);
        assert_eq!(low, 0.0);
        close(high, 0.277533, 1e-6);
        let (low, high) = wilson_interval(10, 10);
        close(low, 1.0 - 0.277533, 1e-6);
        assert_eq!(high, 1.0);
        assert_eq!(wilson_interval(0, 0), (0.0, 1.0));
    }

    #[test]
    fn mean_and_error_of_small_samples() {
        // 1, 2, 3, 4: mean 2.5, squared deviations 2.25 + .25 + .25 + 2.25 = 5, sd sqrt(5/3), error sd/2.
        let result = mean_and_standard_error(&[1.0, 2.0, 3.0, 4.0]).unwrap_or_else(|| unreachable!());
        close(result.mean, 2.5, 0.0);
        close(result.standard_deviation, (5.0f64 / 3.0).sqrt(), 1e-15);
        close(result.standard_error, (5.0f64 / 12.0).sqrt(), 1e-15);
        assert!(mean_and_standard_error(&[]).is_none());
        assert!(mean_and_standard_error(&[1.0]).is_some_and(|r| r.mean == 1.0 && r.standard_error.is_nan()));
    }

    #[test]
    fn the_normal_law_agrees_with_its_tables() {
        for (x, p) in [
            (0.0, 0.5),
            (1.0, 0.841_344_746_068_542_9),
            (-1.0, 0.158_655_253_931_457_05),
            (2.5, 0.993_790_334_674_223_8),
            (-3.5, 2.326_290_790_355_250_4e-4),
            (-8.0, 6.220_960_574_271_785e-16),
        ] {
            close(normal_cdf(x) / p, 1.0, 1e-13);
        }
        for (p, x) in [
            (0.5, 0.0),
            (0.975, Z_95),
            (0.95, 1.644_853_626_951_472_7),
            (0.005, -2.575_829_303_548_901),
            (1e-9, -5.997_807_015_007_687),
        ] {
            close(normal_quantile(p), x, 1e-12);
        }
        assert!(normal_quantile(-0.1).is_nan() && normal_quantile(1.0).is_infinite());
    }
}
