//! How often the 95 % intervals of a difference hold the true one, on made marks whose truth is known: no difference.

use temper::analysis::statistics::two_way::TwoWay;
use temper::numerics::generator::normal;
use temper::numerics::noise_key::{Phase, Purpose, row_key, stream};

/// How far arms differ from seed to seed, and question by question.
struct World {
    seeds: usize,
    of_seed: f32,
    of_question: f32,
}

const QUESTIONS: usize = 96;
const TRIALS: u32 = 300;

/// Shares of trials in which (t interval, bootstrap interval) hold 0.
fn coverage(world: &World) -> (f64, f64) {
    let stream = stream(Purpose::Other, Phase::Update, 0, 0).unwrap();
    let (mut by_t, mut by_bootstrap) = (0, 0);
    for trial in 0..TRIALS {
        let z = |kind: u32, place: usize| normal(7, stream, row_key(trial, kind), place as u32);
        let arm = |side: u32| -> Vec<Vec<bool>> {
            let row = |seed: usize| {
                let of_seed = world.of_seed * z(10 + side, seed);
                let mark = |q: usize| {
                    let of_question = world.of_question * z(20 + side, q);
                    let noise = 0.5 * z(30 + side, seed * QUESTIONS + q);
                    1.5 * z(1, q) + of_seed + of_question + noise > -0.8
                };
                (0..QUESTIONS).map(mark).collect()
            };
            (0..world.seeds).map(row).collect()
        };
        let (one, other) = (arm(0), arm(1));
        let one: Vec<&[bool]> = one.iter().map(Vec::as_slice).collect();
        let other: Vec<&[bool]> = other.iter().map(Vec::as_slice).collect();
        let two_way = TwoWay::new(&one, &other, true).unwrap();
        let holds = |(low, high): (f64, f64)| u32::from(low <= 0.0 && 0.0 <= high);
        by_t += holds(two_way.difference().interval().unwrap());
        by_bootstrap += holds(two_way.bootstrap(200).unwrap());
    }
    let share = |count: u32| f64::from(count) / f64::from(TRIALS);
    (share(by_t), share(by_bootstrap))
}

#[test]
fn the_intervals_hold_the_truth() {
    let mut lines = Vec::new();
    for (seeds, of_seed, of_question) in
        [(2, 0.0, 0.0), (3, 0.0, 0.3), (3, 0.0, 1.0), (3, 0.4, 0.3), (5, 0.4, 0.3), (12, 0.4, 0.3)]
    {
        let (t, bootstrap) = coverage(&World { seeds, of_seed, of_question });
        lines.push(format!("{seeds} seeds, spread {of_seed} {of_question}: t {t:.3}, bootstrap {bootstrap:.3}"));
        // 300 trials at 95 % have a standard error of 1.3 points.
        assert!(t >= 0.93, "{}", lines.join("\n"));
        // Why the bootstrap is not what decides: seeds that differ, and few of them.
        match (seeds, of_seed > 0.0) {
            (3, true) => assert!(bootstrap < 0.88, "{}", lines.join("\n")),
            (12, _) | (_, false) => assert!(bootstrap >= 0.90, "{}", lines.join("\n")),
            _ => {}
        }
    }
    println!("{}", lines.join("\n"));
}

#[test]
fn the_bootstrap_repeats_itself_and_follows_the_difference() {
    let rows = |share: usize| -> Vec<Vec<bool>> {
        (0..3).map(|seed| (0..60).map(|q| (q * 7 + seed * 3) % 60 < share).collect()).collect()
    };
    let (better, worse) = (rows(45), rows(30));
    let (better, worse): (Vec<&[bool]>, Vec<&[bool]>) =
        (better.iter().map(Vec::as_slice).collect(), worse.iter().map(Vec::as_slice).collect());
    let of =
        |one: &[&[bool]], other: &[&[bool]], paired| TwoWay::new(one, other, paired).unwrap().bootstrap(2000).unwrap();
    let (low, high) = of(&better, &worse, true);
    assert_eq!(of(&better, &worse, true), (low, high));
    assert!(low > 0.0 && low < 0.25 && 0.25 < high, "{low} {high}");
    // The other way round: the resamples are the same, so the interval is, mirrored.
    let (low_other, high_other) = of(&worse, &better, true);
    assert!((low + high_other).abs() < 1e-12 && (high + low_other).abs() < 1e-12);
    // Pairing matters: without it, what the arms share is counted as noise.
    let (low_unpaired, high_unpaired) = of(&better, &worse, false);
    assert!((high_unpaired - low_unpaired) > (high - low) * 0.5);
    assert_ne!((low, high), (low_unpaired, high_unpaired));
}
