//! The statistics against scipy and statsmodels on the same random counts and marks (statistics.py).

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use temper::analysis::statistics::mcnemar::mcnemar_of_counts;
use temper::analysis::statistics::student::{student_quantile, student_two_sided};
use temper::analysis::statistics::two_way::TwoWay;
use temper::analysis::statistics::{holm, mean_and_standard_error, wilson_interval};
use temper::numerics::generator::uniform_u32;

fn python() -> Command {
    let local = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python");
    let mut command = Command::new(std::env::var_os("TEMPER_PYTHON").unwrap_or(local.into()));
    // The Rust side's libtorch must not be mixed into Python's.
    command.env_remove("LD_LIBRARY_PATH").env("PYTHONDONTWRITEBYTECODE", "1");
    command
}

fn expected(cases: &Value) -> Option<Value> {
    let has = python().args(["-c", "import scipy, statsmodels"]).output();
    if !has.is_ok_and(|output| output.status.success()) {
        println!("skipped: no Python with scipy and statsmodels; set TEMPER_PYTHON");
        return None;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/analysis/statistics.py");
    let mut child = python().arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(cases.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

/// 0..below, the same in every run.
fn random(number: u32, below: u64) -> u64 {
    (u64::from(uniform_u32(11, 0, 0, number)) * below) >> 32
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value}"))
}

fn alike(got: f64, want: f64, what: &str) {
    assert!((got - want).abs() <= 1e-9 * want.abs().max(1e-6), "{what}: {got}, Python {want}");
}

/// [seeds][questions] with effects of either.
fn marks(number: u32, seeds: usize, questions: usize) -> Vec<Vec<bool>> {
    let row = |s: usize| {
        let mark = |q: usize| {
            let place = number + (s * questions + q) as u32;
            random(place, 100) + 40 * random(number + q as u32, 2) + 10 * s as u64 > 60
        };
        (0..questions).map(mark).collect()
    };
    (0..seeds).map(row).collect()
}

#[test]
fn agree_with_scipy_and_statsmodels() {
    let pair = |i: u32, below: u64| (random(2 * i, below), random(2 * i + 1, below));
    let counts: Vec<(u64, u64)> = (0..60).map(|i| pair(i, [4, 30, 300, 2000][i as usize % 4])).collect();
    let proportions: Vec<(u64, u64)> =
        (100..160).map(|i| pair(i, 1400)).map(|(a, b)| (a.min(b), a.max(b).max(1))).collect();
    let freedom = [1.0, 1.3, 2.0, 2.7, 4.0, 11.5, 57.0, 1318.0, 1e5];
    let places = [0.0, 1e-4, 0.03, 0.7, 1.96, 4.3, 12.7, 300.0];
    let two_sided: Vec<(f64, f64)> = freedom.iter().flat_map(|v| places.map(|t| (t, *v))).collect();
    let quantile: Vec<(f64, f64)> = freedom.iter().flat_map(|v| [0.6, 0.8, 0.975, 0.9999].map(|p| (p, *v))).collect();
    let share = |i: u32| random(i, 1_000_000) as f64 / 1e6;
    let families: Vec<Vec<f64>> = (1..8).map(|m| (0..m).map(|i| share(500 + 10 * m + i).powi(3)).collect()).collect();
    let samples: Vec<Vec<f64>> = (2..7).map(|n| (0..n).map(|i| share(700 + 10 * n + i)).collect()).collect();
    let worlds: Vec<[Vec<Vec<bool>>; 2]> = [(2, 9), (3, 20), (5, 14), (4, 40)]
        .into_iter()
        .enumerate()
        .map(|(i, (seeds, questions))| [2000, 6000].map(|from| marks(from + 1000 * i as u32, seeds, questions)))
        .collect();
    let cases = json!({
        "mcnemar": counts, "wilson": proportions, "two_sided": two_sided, "quantile": quantile, "holm": families,
        "t_interval": samples, "two_way": worlds,
    });
    let Some(expected) = expected(&cases) else { return };
    for (i, (b, c)) in counts.iter().enumerate() {
        let test = mcnemar_of_counts(*b, *c);
        alike(test.p_exact, number(&expected["mcnemar"][i][0]), &format!("exact p of {b}, {c}"));
        alike(test.p_mid, number(&expected["mcnemar"][i][1]), &format!("mid-p of {b}, {c}"));
    }
    for (i, (k, n)) in proportions.iter().enumerate() {
        let (low, high) = wilson_interval(*k, *n);
        alike(low, number(&expected["wilson"][i][0]), &format!("{k} of {n}"));
        alike(high, number(&expected["wilson"][i][1]), &format!("{k} of {n}"));
    }
    for (i, (t, v)) in two_sided.iter().enumerate() {
        alike(student_two_sided(*t, *v), number(&expected["two_sided"][i]), &format!("t {t}, {v} degrees of freedom"));
    }
    for (i, (p, v)) in quantile.iter().enumerate() {
        alike(student_quantile(*p, *v), number(&expected["quantile"][i]), &format!("quantile {p}, {v}"));
    }
    for (i, family) in families.iter().enumerate() {
        for (j, adjusted) in holm(family).into_iter().enumerate() {
            alike(adjusted, number(&expected["holm"][i][j]), &format!("Holm {family:?}"));
        }
    }
    for (i, sample) in samples.iter().enumerate() {
        let (low, high) = mean_and_standard_error(sample).unwrap().interval().unwrap();
        alike(low, number(&expected["t_interval"][i][0]), &format!("{sample:?}"));
        alike(high, number(&expected["t_interval"][i][1]), &format!("{sample:?}"));
    }
    for (i, [one, other]) in worlds.iter().enumerate() {
        let (one, other): (Vec<&[bool]>, Vec<&[bool]>) =
            (one.iter().map(Vec::as_slice).collect(), other.iter().map(Vec::as_slice).collect());
        let found = TwoWay::new(&one, &other, true).unwrap().difference();
        let two_way = &expected["two_way"][i];
        alike(found.difference, number(&two_way[0]), &format!("difference of world {i}"));
        alike(found.standard_error, number(&two_way[1]), &format!("standard error of world {i}"));
        assert_eq!(found.degrees_of_freedom, one.len() as f64 - 1.0);
        let welch = TwoWay::new(&one, &other, false).unwrap().difference();
        alike(welch.degrees_of_freedom, number(&expected["welch"][i][1]), &format!("Welch's of world {i}"));
        assert!(welch.standard_error >= number(&expected["welch"][i][0]).abs() * (1.0 - 1e-9));
    }
    println!(
        "{} McNemar tests, {} Wilson intervals, {} values of Student's law agree with scipy and statsmodels",
        counts.len(),
        proportions.len(),
        two_sided.len() + quantile.len()
    );
}
