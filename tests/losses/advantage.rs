//! Advantages by hand.

use temper::rl::advantage::{grpo_advantages, zero_std_groups};

/// R = 1 0 0 1 0: mean .4, deviations .6 -.4 -.4 .6 -.4, squares .36 .16 .16 .36 .16 = 1.2, / 4 = .3,
/// std = sqrt(.3) = .5477225575; A = .6/.5477235575 = 1.0954431 and -.4/.5477235575 = -.7302954.
#[test]
fn a_group_by_hand() {
    let a = grpo_advantages(&[1.0, 0.0, 0.0, 1.0, 0.0], 5).unwrap();
    let std = 0.3f64.sqrt() + 1e-6;
    for (got, want) in a.iter().zip([0.6 / std, -0.4 / std, -0.4 / std, 0.6 / std, -0.4 / std]) {
        assert!((got - want).abs() < 1e-15, "{got} {want}");
    }
    assert!((a[0] - 1.0954431).abs() < 1e-7 && (a[1] + 0.7302954).abs() < 1e-7);
}

/// Two groups do not see each other. R = 0 2: mean 1, squares 1 + 1 = 2, / 1 = 2, std sqrt 2, A = -+1/1.4142146.
#[test]
fn groups_are_separate() {
    let a = grpo_advantages(&[0.0, 2.0, 7.0, 7.0], 2).unwrap();
    let want = 1.0 / (2f64.sqrt() + 1e-6);
    assert!((a[0] + want).abs() < 1e-15 && (a[1] - want).abs() < 1e-15);
    assert_eq!(a[2..], [0.0, 0.0]);
    assert_eq!(zero_std_groups(&[0.0, 2.0, 7.0, 7.0], 2).unwrap(), 1);
}

/// The mean of three times 0.1 is not 0.1 in binary; the advantage is 0 all the same.
#[test]
fn equal_rewards_give_exactly_zero() {
    assert_eq!(grpo_advantages(&[0.1, 0.1, 0.1], 3).unwrap(), [0.0; 3]);
    assert_eq!(grpo_advantages(&[], 3).unwrap(), Vec::<f64>::new());
}

#[test]
fn bad_groups_are_refused() {
    for (rewards, group_size, says) in [
        (vec![1.0, 0.0], 1, "group_size"),
        (vec![1.0, 0.0, 1.0], 2, "multiple"),
        (vec![1.0, f64::NAN], 2, "completion 1"),
    ] {
        let error = grpo_advantages(&rewards, group_size).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(says), "{error}");
    }
}
