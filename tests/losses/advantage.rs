//! Advantages by hand.

use temper::rl::advantage::{advantages, zero_std_groups};
use temper::rl::section::Advantage;

/// Rewards that everybody could score.
fn known(rewards: &[f64]) -> Vec<Option<f64>> {
    rewards.iter().copied().map(Some).collect()
}

fn assert_near(got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    for (g, w) in got.iter().zip(want) {
        assert!((g - w).abs() < 1e-15, "{got:?}, expected {want:?}");
    }
}

/// R = 1 0 0 1 0: mean .4, deviations .6 -.4 -.4 .6 -.4, squares .36 .16 .16 .36 .16 = 1.2, / 4 = .3,
/// std = sqrt(.3) = .5477225575; A = .6/.5477235575 = 1.0954431 and -.4/.5477235575 = -.7302954.
#[test]
fn a_group_by_hand() {
    let a = advantages(Advantage::Grpo, &known(&[1.0, 0.0, 0.0, 1.0, 0.0]), 5).unwrap();
    let std = 0.3f64.sqrt() + 1e-6;
    assert_near(&a, &[0.6 / std, -0.4 / std, -0.4 / std, 0.6 / std, -0.4 / std]);
    assert!((a[0] - 1.0954431).abs() < 1e-7 && (a[1] + 0.7302954).abs() < 1e-7);
}

/// Two groups do not see each other. R = 0 2: mean 1, squares 1 + 1 = 2, / 1 = 2, std sqrt 2, A = -+1/1.4142146.
#[test]
fn groups_are_separate() {
    let rewards = known(&[0.0, 2.0, 7.0, 7.0]);
    let a = advantages(Advantage::Grpo, &rewards, 2).unwrap();
    let want = 1.0 / (2f64.sqrt() + 1e-6);
    assert_near(&a[..2], &[-want, want]);
    assert_eq!(a[2..], [0.0, 0.0]);
    assert_eq!(zero_std_groups(&rewards, 2).unwrap(), 1);
}

/// R = 1 0 0 | 1 1 0. Means 1/3 and 2/3; leave-one-out: 1 - 0, 0 - 1/2, 0 - 1/2 | 1 - 1/2, 1 - 1/2, 0 - 1.
/// Batch: mean .5, six squares of .25 = 1.5, / 5 = .3, std sqrt .3.
#[test]
fn the_other_rules_by_hand() {
    let rewards = known(&[1.0, 0.0, 0.0, 1.0, 1.0, 0.0]);
    let of = |rule| advantages(rule, &rewards, 3).unwrap();
    let deviations = [2.0, -1.0, -1.0, 1.0, 1.0, -2.0].map(|d| d / 3.0);
    assert_near(&of(Advantage::DrGrpo), &deviations);
    assert_near(&of(Advantage::Rloo), &[1.0, -0.5, -0.5, 0.5, 0.5, -1.0]);
    assert_near(&of(Advantage::BatchStd), &deviations.map(|d| d / (0.3f64.sqrt() + 1e-6)));
}

/// The mean of three times 0.1 is not 0.1 in binary; the advantage is 0 all the same, under every rule, also where other
/// groups give the batch a spread.
#[test]
fn equal_rewards_give_exactly_zero() {
    for rule in [Advantage::Grpo, Advantage::DrGrpo, Advantage::Rloo, Advantage::BatchStd] {
        let a = advantages(rule, &known(&[0.1, 0.1, 0.1, 5.0, 0.0, 0.0]), 3).unwrap();
        assert_eq!(a[..3], [0.0; 3], "{rule:?}");
        assert!(a[3] > 0.0 && a[4] < 0.0);
        assert_eq!(advantages(rule, &known(&[0.1; 3]), 3).unwrap(), [0.0; 3]);
        assert_eq!(advantages(rule, &[], 3).unwrap(), Vec::<f64>::new());
    }
}

/// R = 1 ? 0 0 is the group 1 0 0 with a hole; a group with one known reward compares nothing.
#[test]
fn what_nobody_could_score_is_no_member_of_its_group() {
    let rewards = [Some(1.0), None, Some(0.0), Some(0.0), None, Some(1.0), None, None];
    for rule in [Advantage::Grpo, Advantage::DrGrpo, Advantage::Rloo] {
        let a = advantages(rule, &rewards, 4).unwrap();
        let b = advantages(rule, &known(&[1.0, 0.0, 0.0]), 3).unwrap();
        assert_eq!(a, [b[0], 0.0, b[1], b[2], 0.0, 0.0, 0.0, 0.0], "{rule:?}");
    }
    // The batch: 1 0 0 1, mean .5, squares 4 * .25 = 1, / 3.
    let a = advantages(Advantage::BatchStd, &rewards, 4).unwrap();
    let std = (1.0f64 / 3.0).sqrt() + 1e-6;
    assert_near(&a[..4], &[2.0 / 3.0 / std, 0.0, -1.0 / 3.0 / std, -1.0 / 3.0 / std]);
    assert_eq!(zero_std_groups(&rewards, 4).unwrap(), 1);
}

#[test]
fn bad_groups_are_refused() {
    for (rewards, group_size, says) in [
        (vec![1.0, 0.0], 1, "group_size"),
        (vec![1.0, 0.0, 1.0], 2, "multiple"),
        (vec![1.0, f64::NAN], 2, "completion 1"),
    ] {
        let error = advantages(Advantage::Grpo, &known(&rewards), group_size).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(says), "{error}");
    }
}
