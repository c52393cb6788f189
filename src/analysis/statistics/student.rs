//! Student's t law.
//!
//! With v degrees of freedom, not necessarily whole, and x = v / (v + t^2): P(|T| > |t|) = I_x(v/2, 1/2), the regularized
//! incomplete beta function (DLMF 8.17; Abramowitz & Stegun 26.7.1).

use super::{normal_cdf, normal_quantile};

/// P(|T| > |t|). Infinitely many degrees of freedom are the normal law.
pub fn student_two_sided(t: f64, degrees_of_freedom: f64) -> f64 {
    if degrees_of_freedom.is_infinite() {
        return 2.0 * normal_cdf(-t.abs());
    }
    if t.is_infinite() {
        return 0.0;
    }
    let v = degrees_of_freedom;
    // 1 - x is formed without cancellation, as the continued fraction needs it for small t.
    regularized_beta(v / (v + t * t), t * t / (v + t * t), 0.5 * v, 0.5)
}

/// The t that T exceeds with probability 1 - p, for p of at least 1/2: bisection of [`student_two_sided`].
pub fn student_quantile(p: f64, degrees_of_freedom: f64) -> f64 {
    if degrees_of_freedom.is_infinite() {
        return normal_quantile(p);
    }
    let outside = 2.0 * (1.0 - p);
    let (mut low, mut high) = (0.0, 1.0);
    while student_two_sided(high, degrees_of_freedom) > outside && high < 1e300 {
        high *= 2.0;
    }
    for _ in 0..200 {
        let middle = 0.5 * (low + high);
        if student_two_sided(middle, degrees_of_freedom) > outside { low = middle } else { high = middle }
    }
    0.5 * (low + high)
}

/// I_x(a, b) with y = 1 - x, by the continued fraction DLMF 8.17.22 on the side where it converges.
fn regularized_beta(x: f64, y: f64, a: f64, b: f64) -> f64 {
    if x <= 0.0 || y <= 0.0 {
        return if x <= 0.0 { 0.0 } else { 1.0 };
    }
    let front = (a * x.ln() + b * y.ln() + ln_gamma(a + b) - ln_gamma(a) - ln_gamma(b)).exp();
    if x <= (a + 1.0) / (a + b + 2.0) {
        front / a * beta_fraction(x, a, b)
    } else {
        1.0 - front / b * beta_fraction(y, b, a)
    }
}

/// 1 / (1 + d_1/(1 + d_2/(1 + ...))), d_2m = m (b-m) x / ((a+2m-1)(a+2m)),
/// d_2m+1 = -(a+m)(a+b+m) x / ((a+2m)(a+2m+1)); evaluated forwards (Lentz's method).
fn beta_fraction(x: f64, a: f64, b: f64) -> f64 {
    const LEAST: f64 = 1e-300; // in place of a 0 that would be divided by
    let away_from_0 = |value: f64| if value.abs() < LEAST { LEAST } else { value };
    let (mut value, mut c, mut d) = (1.0, 1.0, 0.0);
    for step in 1..100_000 {
        let m = f64::from(step / 2);
        let term = match step % 2 {
            0 => m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m)),
            _ => -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0)),
        };
        d = 1.0 / away_from_0(1.0 + term * d);
        c = away_from_0(1.0 + term / c);
        value *= c * d;
        if (c * d - 1.0).abs() < 1e-15 {
            break;
        }
    }
    1.0 / value
}

/// ln Gamma(x), x > 0: Stirling's series (DLMF 5.11.1) from x = 10 on, below it the recurrence Gamma(x+1) = x Gamma(x).
fn ln_gamma(x: f64) -> f64 {
    if x < 10.0 {
        return ln_gamma(x + 1.0) - x.ln();
    }
    let square = 1.0 / (x * x);
    let coefficients = [-691.0 / 360_360.0, 1.0 / 1188.0, -1.0 / 1680.0, 1.0 / 1260.0, -1.0 / 360.0, 1.0 / 12.0];
    let series = coefficients.iter().fold(0.0, |sum, k| sum * square + k) / x;
    (x - 0.5) * x.ln() - x + 0.5 * (2.0 * std::f64::consts::PI).ln() + series
}
