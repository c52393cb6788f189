//! Times of several runners taken in turns, and what is said about them: median, minimum, distance of the quartiles.

use std::time::Instant;

use crate::Result;

/// Something to time: `run(turn)` works on the buffers of that turn.
pub struct Runner<'a> {
    run: Box<dyn FnMut(usize) -> Result<()> + 'a>,
    /// Takes part in every so many rounds.
    every: usize,
}

impl<'a> Runner<'a> {
    pub fn new(run: impl FnMut(usize) -> Result<()> + 'a) -> Runner<'a> {
        Runner { run: Box::new(run), every: 1 }
    }

    /// One that is too slow for every round: it takes part in one of ten.
    pub fn slow(run: impl FnMut(usize) -> Result<()> + 'a) -> Runner<'a> {
        Runner { run: Box::new(run), every: 10 }
    }
}

/// Times of one runner, ascending, in microseconds.
#[derive(Clone, Debug)]
pub struct Times(Vec<f64>);

impl Times {
    pub fn rounds(&self) -> usize {
        self.0.len()
    }

    pub fn min_us(&self) -> f64 {
        self.quantile(0.0)
    }

    pub fn median_us(&self) -> f64 {
        self.quantile(0.5)
    }

    /// (upper quartile - lower quartile) / median.
    pub fn spread(&self) -> f64 {
        (self.quantile(0.75) - self.quantile(0.25)) / self.median_us()
    }

    /// Between the two nearest times, by distance.
    fn quantile(&self, q: f64) -> f64 {
        let place = q * (self.0.len() - 1) as f64;
        let (below, above) = (self.0[place.floor() as usize], self.0[place.ceil() as usize]);
        below + (above - below) * place.fract()
    }
}

/// Rounds last this long together, but at least `LEAST_ROUNDS` and at most `MOST_ROUNDS` are made.
const SECONDS: f64 = 3.0;
const LEAST_ROUNDS: usize = 20;
const MOST_ROUNDS: usize = 300;

/// Runs all runners in turns, one untimed turn first; the times of each, in their order.
pub fn in_turns(mut runners: Vec<Runner>) -> Result<Vec<Times>> {
    let mut times = vec![Vec::new(); runners.len()];
    let begin = Instant::now();
    for round in 0..=MOST_ROUNDS {
        if round > LEAST_ROUNDS && begin.elapsed().as_secs_f64() > SECONDS {
            break;
        }
        for (runner, times) in runners.iter_mut().zip(&mut times) {
            if round != 0 && (round - 1) % runner.every != 0 {
                continue;
            }
            let start = Instant::now();
            (runner.run)(round)?;
            if round != 0 {
                times.push(start.elapsed().as_secs_f64() * 1e6);
            }
        }
    }
    times.iter_mut().for_each(|t| t.sort_by(f64::total_cmp));
    Ok(times.into_iter().map(Times).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_the_times() {
        let times = Times(vec![1.0, 2.0, 4.0, 8.0]);
        assert_eq!((times.min_us(), times.median_us(), times.quantile(0.75)), (1.0, 3.0, 5.0));
        assert_eq!(times.spread(), (5.0 - 1.75) / 3.0);
        assert_eq!(Times(vec![7.0]).median_us(), 7.0);
    }

    #[test]
    fn runners_take_turns_and_slow_ones_sit_out() {
        let order = std::cell::RefCell::new(Vec::new());
        let note = |name: char| {
            let order = &order;
            move |turn: usize| {
                order.borrow_mut().push((name, turn));
                Ok(())
            }
        };
        let times = in_turns(vec![Runner::new(note('a')), Runner::slow(note('b'))]).unwrap_or_default();
        assert_eq!(times.iter().map(Times::rounds).collect::<Vec<_>>(), [MOST_ROUNDS, MOST_ROUNDS / 10]);
        assert_eq!(order.borrow()[..5], [('a', 0), ('b', 0), ('a', 1), ('b', 1), ('a', 2)]);
    }
}
