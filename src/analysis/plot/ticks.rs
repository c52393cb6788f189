//! Where an axis is labelled, and how numbers are written there.
//!
//! Steps of 1, 2 or 5 times a power of ten; on a logarithmic axis whole decades, or 1, 2 and 5 of each where there are
//! few.

/// About `wanted` round values within `low..=high`.
pub fn linear(low: f64, high: f64, wanted: usize) -> Vec<f64> {
    let rough = (high - low) / wanted.max(1) as f64;
    if !rough.is_finite() || rough <= 0.0 {
        return vec![low];
    }
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|step| *step >= rough).unwrap_or(rough);
    let (first, last) = ((low / step - 1e-9).ceil() as i64, (high / step + 1e-9).floor() as i64);
    (first..=last).map(|k| k as f64 * step).collect()
}

/// The same, without fractions: steps and layers.
pub fn whole(low: f64, high: f64, wanted: usize) -> Vec<f64> {
    let mut ticks: Vec<f64> = linear(low, high, wanted).into_iter().filter(|t| t.fract() == 0.0).collect();
    ticks.dedup();
    ticks
}

/// Exponents, for values from 10^low to 10^high.
pub fn logarithmic(low: f64, high: f64) -> Vec<f64> {
    let decades = || (low.floor() as i64..=high.ceil() as i64).map(|k| k as f64);
    let within = |t: &f64| *t >= low - 1e-9 && *t <= high + 1e-9;
    let whole: Vec<f64> = decades().filter(within).collect();
    if whole.len() >= 3 {
        return whole;
    }
    decades().flat_map(|k| [k, k + 2f64.log10(), k + 5f64.log10()]).filter(within).collect()
}

/// A value beside an axis, to about three digits and without useless zeros.
pub fn number(x: f64) -> String {
    let magnitude = x.abs();
    if magnitude < 1e-12 {
        return "0".to_string();
    }
    if !(1e-3..1e6).contains(&magnitude) {
        let text = format!("{x:.1e}");
        return text.replace(".0e", "e");
    }
    if magnitude >= 1e4 {
        return format!("{}k", trimmed(x / 1e3, 1));
    }
    trimmed(x, (3.0 - magnitude.log10().floor()).clamp(0.0, 6.0) as usize)
}

fn trimmed(x: f64, decimals: usize) -> String {
    let text = format!("{x:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_string() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        let near = |got: Vec<f64>, expected: &[f64]| {
            assert_eq!(got.len(), expected.len(), "{got:?}");
            assert!(got.iter().zip(expected).all(|(g, e)| (g - e).abs() < 1e-12), "{got:?}");
        };
        near(linear(0.03, 0.98, 5), &[0.2, 0.4, 0.6, 0.8]);
        near(linear(-1.0, 1.0, 4), &[-1.0, -0.5, 0.0, 0.5, 1.0]);
        near(whole(0.0, 3.0, 6), &[0.0, 1.0, 2.0, 3.0]);
        near(linear(2.0, 2.0, 5), &[2.0]);
        near(logarithmic(-5.0, -2.0), &[-5.0, -4.0, -3.0, -2.0]);
        near(logarithmic(-2.1, -1.9), &[-2.0]);
    }

    #[test]
    fn numbers_are_short() {
        for (x, text) in [
            (0.0, "0"),
            (0.25, "0.25"),
            (100.0, "100"),
            (1e-5, "1e-5"),
            (2.5e-4, "2.5e-4"),
            (12_000.0, "12k"),
            (-3.0, "-3"),
            (0.1 + 0.2, "0.3"),
            (3e7, "3e7"),
        ] {
            assert_eq!(number(x), text);
        }
    }
}
