//! Schedules against tables written by hand.

#![allow(clippy::unwrap_used)]
use super::*;
use crate::inject::section::LayerSigmaConfig;

fn section() -> NoiseInjectionSection {
    NoiseInjectionSection { enabled: true, ..Default::default() }
}

/// (first u, last u, sigma) covering the whole run.
fn expect(schedule: &SigmaSchedule, table: &[(u64, u64, f64)]) {
    let mut next = 0;
    for &(first, last, sigma) in table {
        assert_eq!(first, next, "the table has a gap");
        for u in first..=last {
            let found = schedule.sigma(u + 1);
            assert!((found - sigma).abs() <= sigma * 5e-4, "u = {u}: found {found}, expected {sigma}");
        }
        next = last + 1;
    }
    assert_eq!(next, schedule.total_steps());
}

const E5C: [(u64, u64, f64); 12] = [
    (0, 9, 0.0),
    (10, 19, 1e-2),
    (20, 28, 4.217e-3),
    (29, 38, 1.778e-3),
    (39, 48, 7.499e-4),
    (49, 57, 3.162e-4),
    (58, 67, 0.0),
    (68, 77, 3.162e-4),
    (78, 86, 1.334e-4),
    (87, 96, 5.623e-5),
    (97, 106, 2.371e-5),
    (107, 115, 1e-5),
];

#[test]
fn epoch_aware_is_the_table_of_e5c() {
    let schedule = SigmaSchedule::resolve(&section(), 58, 2).unwrap();
    expect(&schedule, &E5C);
    assert_eq!((schedule.epoch(58), schedule.epoch(59), schedule.stage(59)), (0, 1, 0));
}

#[test]
fn without_warm_up_the_noisy_stages_share_the_epoch() {
    let schedule = SigmaSchedule::resolve(&NoiseInjectionSection { warmup_stage: false, ..section() }, 10, 1).unwrap();
    let quarter = (1e-3f64).powf(0.25);
    expect(
        &schedule,
        &[
            (0, 1, 1e-2),
            (2, 3, 1e-2 * quarter),
            (4, 5, 1e-2 * quarter.powi(2)),
            (6, 7, 1e-2 * quarter.powi(3)),
            (8, 9, 1e-5),
        ],
    );
}

#[test]
fn step_based_by_hand() {
    let step =
        |stages| NoiseInjectionSection { num_stages: Some(stages), sigma_start: 0.05, sigma_end: 5e-4, ..section() };
    let schedule = SigmaSchedule::resolve(&step(2), 5, 2).unwrap();
    expect(&schedule, &[(0, 4, 0.0), (5, 9, 0.05)]);
    let schedule = SigmaSchedule::resolve(&step(4), 10, 1).unwrap();
    expect(&schedule, &[(0, 2, 0.0), (3, 4, 0.05), (5, 7, 5e-3), (8, 9, 5e-4)]);
    // K = 10 over 58 steps: j = floor(10u/58).
    let schedule = SigmaSchedule::resolve(&step(10), 58, 1).unwrap();
    let r = 0.01f64.powf(0.125);
    let s = |j: i32| 0.05 * r.powi(j - 1);
    expect(
        &schedule,
        &[
            (0, 5, 0.0),
            (6, 11, s(1)),
            (12, 17, s(2)),
            (18, 23, s(3)),
            (24, 28, s(4)),
            (29, 34, s(5)),
            (35, 40, s(6)),
            (41, 46, s(7)),
            (47, 52, s(8)),
            (53, 57, s(9)),
        ],
    );
    assert_eq!(schedule.sigma(58), 5e-4);
}

#[test]
fn one_stage_short_epochs_constant_and_off() {
    let one = NoiseInjectionSection { stages_per_epoch: Some(1), ..section() };
    let middle = 1e-2 * (1e-3f64).sqrt();
    expect(&SigmaSchedule::resolve(&one, 4, 2).unwrap(), &[(0, 1, 0.0), (2, 3, 1e-2), (4, 5, 0.0), (6, 7, middle)]);
    // One step per epoch never leaves the clean stage, and that is said.
    assert_eq!(
        SigmaSchedule::resolve(&section(), 1, 3).unwrap().notices(),
        ["noise_injection: an epoch has 1 steps for 6 stages: some stages of sigma are never used"]
    );
    assert!(SigmaSchedule::resolve(&section(), 6, 3).unwrap().notices().is_empty());
    expect(&SigmaSchedule::resolve(&section(), 1, 3).unwrap(), &[(0, 2, 0.0)]);
    let constant = NoiseInjectionSection { schedule: ScheduleKind::Constant, sigma_end: 0.0, ..section() };
    expect(&SigmaSchedule::resolve(&constant, 3, 1).unwrap(), &[(0, 2, 1e-2)]);
    let off = NoiseInjectionSection::default();
    expect(&SigmaSchedule::resolve(&off, 58, 2).unwrap(), &[(0, 115, 0.0)]);
    let original = NoiseInjectionSection { compat: Some(Compat::Original), ..section() };
    expect(&SigmaSchedule::resolve(&original, 58, 2).unwrap(), &[(0, 115, 0.0)]);
    let step = NoiseInjectionSection { epoch_aware: Some(false), ..original };
    assert!(SigmaSchedule::resolve(&step, 58, 2).unwrap().sigma(116) > 0.0);
}

#[test]
fn base_sigma_replaces_the_start_and_keeps_the_ratio() {
    let config = LayerSigmaConfig { base_sigma: Some(0.02), ..Default::default() };
    let scaled = NoiseInjectionSection { layer_sigma_config: Some(config), ..section() };
    let schedule = SigmaSchedule::resolve(&scaled, 58, 2).unwrap();
    expect(&schedule, &E5C.map(|(first, last, sigma)| (first, last, 2.0 * sigma)));
}

#[test]
fn keys_of_the_other_kind_are_unused_and_contradictions_refused() {
    let both = NoiseInjectionSection { epoch_aware: Some(true), num_stages: Some(10), ..section() };
    assert_eq!(SigmaSchedule::resolve(&both, 58, 2).unwrap().unused_keys(), ["noise_injection.num_stages"]);
    let unclear = NoiseInjectionSection { stages_per_epoch: Some(5), epoch_aware: None, ..both.clone() };
    assert!(SigmaSchedule::resolve(&unclear, 58, 2).is_err());
    let bad = [
        NoiseInjectionSection { sigma_end: 0.0, ..section() },
        NoiseInjectionSection { sigma_start: -1.0, ..section() },
        NoiseInjectionSection { sigma_start: 0.0, ..section() },
        NoiseInjectionSection { sigma_end: f64::NAN, ..section() },
        NoiseInjectionSection { num_stages: Some(1), ..section() },
        NoiseInjectionSection { stages_per_epoch: Some(0), ..section() },
        NoiseInjectionSection { schedule: ScheduleKind::EpochAware, epoch_aware: Some(false), ..section() },
    ];
    for section in bad {
        assert!(SigmaSchedule::resolve(&section, 58, 2).is_err(), "{section:?}");
    }
    assert!(SigmaSchedule::resolve(&section(), 0, 2).is_err());
}
