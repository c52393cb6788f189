//! Tests and intervals of small tables, worked out by hand.

use temper::analysis::statistics::mcnemar::{mcnemar, mcnemar_of_counts, paired_interval};
use temper::analysis::statistics::student::{student_quantile, student_two_sided};
use temper::analysis::statistics::two_way::{TwoWay, minimum_detectable_difference};
use temper::analysis::statistics::{holm, mean_and_standard_error};

pub fn close(got: f64, expected: f64, tolerance: f64) {
    assert!((got - expected).abs() <= tolerance, "got {got}, expected {expected}");
}

fn marks(text: &str) -> Vec<bool> {
    text.bytes().map(|mark| mark == b'1').collect()
}

#[test]
fn mcnemar_of_small_counts() {
    // 8 against 2: P(X <= 2) of Bin(10, 1/2) = (1 + 10 + 45)/1024; P(X = 2) = 45/1024.
    let test = mcnemar_of_counts(8, 2);
    close(test.p_exact, 112.0 / 1024.0, 1e-14);
    close(test.p_mid, 67.0 / 1024.0, 1e-14);
    assert_eq!(mcnemar_of_counts(2, 8).p_mid, test.p_mid);
    close(mcnemar_of_counts(0, 5).p_exact, 2.0 / 32.0, 1e-15);
    close(mcnemar_of_counts(0, 5).p_mid, 1.0 / 32.0, 1e-15);
    for equal in [0, 3, 700] {
        let test = mcnemar_of_counts(equal, equal);
        assert_eq!((test.p_mid, test.p_exact), (1.0, 1.0), "{equal}");
    }
    // Only questions that one side alone answered count, each on its side.
    let test = mcnemar(&marks("1110010"), &marks("1001100"));
    assert_eq!((test.first_only, test.second_only), (3, 2));
    // 2^-2000 is no f64, the p-value is: P(|X - 1000| >= 100), 4.5 standard deviations.
    let p = mcnemar_of_counts(900, 1100).p_exact;
    assert!((7e-6..9e-6).contains(&p), "{p}");
}

#[test]
fn the_paired_interval_of_agresti_and_min() {
    // b = 8, c = 2, n = 20: (8.5 - 2.5)/22 +- 1.959964 sqrt(11 - 36/22)/22.
    let (low, high) = paired_interval(8, 2, 20);
    close(0.5 * (low + high), 6.0 / 22.0, 1e-14);
    close(0.5 * (high - low), 1.959_963_984_540_054 * (11.0 - 36.0 / 22.0f64).sqrt() / 22.0, 1e-14);
    let (low, high) = paired_interval(0, 0, 20);
    assert!(low < 0.0 && high > 0.0 && low == -high);
}

#[test]
fn students_law_has_its_closed_forms() {
    for t in [0.0f64, 0.1, 1.0, 3.0, 50.0, 1e6] {
        // 1 degree of freedom is Cauchy's law; 2: P(|T| > t) = 1 - t/sqrt(2 + t^2).
        close(student_two_sided(t, 1.0), 1.0 - 2.0 / std::f64::consts::PI * t.atan(), 1e-13);
        close(student_two_sided(t, 2.0), 1.0 - t / (2.0 + t * t).sqrt(), 1e-13);
        assert_eq!(student_two_sided(-t, 2.0), student_two_sided(t, 2.0));
    }
    close(student_quantile(0.975, 2.0), 4.302_652_729_749_463, 1e-12);
    close(student_quantile(0.975, f64::INFINITY), 1.959_963_984_540_054, 1e-12);
    close(student_quantile(0.5, 3.0), 0.0, 1e-12);
    // Accuracies .60, .62, .67: mean .63, variance (.0009 + .0001 + .0016)/2, t with 2 degrees of freedom.
    let mean = mean_and_standard_error(&[0.60, 0.62, 0.67]).unwrap();
    let (low, high) = mean.interval().unwrap();
    close(0.5 * (low + high), 0.63, 1e-15);
    close(0.5 * (high - low), 4.302_652_729_749_463 * (0.0013f64 / 3.0).sqrt(), 1e-13);
    assert!(mean_and_standard_error(&[0.5]).unwrap().interval().is_none());
}

#[test]
fn holm_steps_down() {
    // Sorted .01 .02 .03 .04 with 4 tests: .04, .06, .06, .06; the order of the input stays.
    let adjusted = holm(&[0.04, 0.01, 0.03, 0.02]);
    for (got, expected) in adjusted.iter().zip([0.06, 0.04, 0.06, 0.06]) {
        close(*got, expected, 1e-15);
    }
    assert_eq!(holm(&[0.9, 0.8]), [1.0, 1.0]);
    assert!(holm(&[]).is_empty());
}

/// Two seeds, four questions. Arm 1110, 1100; baseline 1000, 0100; differences
/// 0 1 1 0 | 1 0 0 0: rows 1/2, 1/4; columns 1/2 1/2 1/2 0; mean 3/8.
#[test]
fn two_way_errors_of_a_small_table() {
    let (arm, baseline) = ([marks("1110"), marks("1100")], [marks("1000"), marks("0100")]);
    let (arm, baseline) = ([&arm[0][..], &arm[1]], [&baseline[0][..], &baseline[1]]);
    let found = TwoWay::new(&arm, &baseline, true).unwrap().difference();
    close(found.difference, 3.0 / 8.0, 1e-15);
    // V_s = var(1/2, 1/4)/2 = (1/32)/2. V_q = var(1/2, 1/2, 1/2, 0)/4 = (1/16)/4. What is left: +-(5/8, 3/8, 3/8, 1/8)
    // with both signs once per column: 2 (25 + 9 + 9 + 1)/64 = 88/64 over 3, /8.
    let (seeds, questions): (f64, f64) = (1.0 / 64.0, 1.0 / 64.0);
    // = 11/192, which is more than they add up to: the larger of the two stands.
    close(found.standard_error, seeds.max(questions).sqrt(), 1e-15);
    assert_eq!(found.degrees_of_freedom, 1.0);
    // As two groups: V_s = var(3/4, 1/2)/2 + var(1/4, 1/4)/2 = 1/64 + 0; the difference is the same.
    let unpaired = TwoWay::new(&arm, &baseline, false).unwrap().difference();
    close(unpaired.difference, 3.0 / 8.0, 1e-15);
    close(unpaired.standard_error.powi(2), 1.0 / 64.0, 1e-15);
    // Welch's: the baseline's accuracies do not differ, so the arm's alone count.
    assert_eq!(unpaired.degrees_of_freedom, 1.0);

    // Where the interaction is small it is counted once: every question alike in both seeds leaves V_q alone.
    let (same, none) = ([marks("11100000"), marks("11100000")], [marks("00000000"), marks("00000000")]);
    let (same, none) = ([&same[0][..], &same[1]], [&none[0][..], &none[1]]);
    let found = TwoWay::new(&same, &none, true).unwrap().difference();
    close(found.standard_error, (3.0f64 / 8.0 * 5.0 / 8.0 * 8.0 / 7.0 / 8.0).sqrt(), 1e-15);
    let (low, high) = found.interval().unwrap();
    close(high - low, 2.0 * student_quantile(0.975, 1.0) * found.standard_error, 1e-14);
    close(found.p().unwrap(), student_two_sided(3.0 / 8.0 / found.standard_error, 1.0), 1e-15);

    // Differences 1 0 | 0 -1 are seed + question and nothing else: V_s = V_q = var(1/2, -1/2)/2 = 1/4, and both count.
    let (arm, baseline) = ([marks("10"), marks("00")], [marks("00"), marks("01")]);
    let found = TwoWay::new(&[&arm[0], &arm[1]], &[&baseline[0], &baseline[1]], true).unwrap().difference();
    assert_eq!((found.difference, found.standard_error, found.degrees_of_freedom), (0.0, 0.5f64.sqrt(), 1.0));

    // Nothing varies: no p where they differ, 1 where they do not.
    let all = [marks("1111"), marks("1111")];
    let none = [marks("0000"), marks("0000")];
    let (all, none) = ([&all[0][..], &all[1]], [&none[0][..], &none[1]]);
    let found = TwoWay::new(&all, &none, true).unwrap().difference();
    assert_eq!((found.p(), found.interval()), (None, None));
    assert_eq!(TwoWay::new(&all, &all, true).unwrap().difference().p(), Some(1.0));
    assert!(TwoWay::new(&all[..1], &none[..1], true).is_none());
    assert!(TwoWay::new(&all, &none[..1], false).is_none());
}

#[test]
fn what_could_have_been_detected() {
    // (1.959964 + 0.841621) SE.
    close(minimum_detectable_difference(0.01, f64::INFINITY), 0.028_015_852, 1e-9);
    assert!(minimum_detectable_difference(0.01, 2.0) > 0.05);
}
