//! Times of several runners taken in turns, and what is said about them: median, minimum, distance of the quartiles.

use std::time::Instant;

use crate::Result;
use crate::ops::cuda::timer::Timer;

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

/// What times a piece of work.
pub trait Clock {
    /// Microseconds.
    fn time_us(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64>;

    /// Calls shorter than this are timed several at a time.
    fn least_us(&self) -> f64;

    /// Rounds last this long together, but at least `LEAST_ROUNDS` and at most `MOST_ROUNDS` are made.
    fn seconds(&self) -> f64 {
        3.0
    }
}

/// The wall's: for the CPU.
pub struct WallClock;

impl Clock for WallClock {
    fn time_us(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        let start = Instant::now();
        work()?;
        Ok(start.elapsed().as_secs_f64() * 1e6)
    }

    fn least_us(&self) -> f64 {
        0.0
    }
}

impl Clock for Timer {
    fn time_us(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        Timer::time_us(self, work)
    }

    /// An event is good to half a microsecond, and the first launch after a wait begins late.
    fn least_us(&self) -> f64 {
        200.0
    }
}

const LEAST_ROUNDS: usize = 20;
const MOST_ROUNDS: usize = 300;
/// Calls that are timed at once.
const MOST_CALLS: f64 = 100.0;

/// Runs all runners in turns, some untimed calls first; the times of each, in their order.
pub fn in_turns(clock: &dyn Clock, mut runners: Vec<Runner>) -> Result<Vec<Times>> {
    let mut times = vec![Vec::new(); runners.len()];
    let mut calls = vec![1; runners.len()];
    for (runner, calls) in runners.iter_mut().zip(&mut calls) {
        (runner.run)(0)?;
        let one = clock.time_us(&mut || (runner.run)(1))?;
        *calls = (clock.least_us() / one.max(1e-3)).ceil().clamp(1.0, MOST_CALLS) as usize;
    }
    let begin = Instant::now();
    for round in 0..MOST_ROUNDS {
        if round >= LEAST_ROUNDS && begin.elapsed().as_secs_f64() > clock.seconds() {
            break;
        }
        for ((runner, times), &calls) in runners.iter_mut().zip(&mut times).zip(&calls) {
            if round % runner.every == 0 {
                let us = clock.time_us(&mut || (0..calls).try_for_each(|call| (runner.run)(round * calls + call)))?;
                times.push(us / calls as f64);
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
        let runners = vec![Runner::new(note('a')), Runner::slow(note('b'))];
        let times = in_turns(&WallClock, runners).unwrap_or_default();
        assert_eq!(times.iter().map(Times::rounds).collect::<Vec<_>>(), [MOST_ROUNDS, MOST_ROUNDS / 10]);
        let warm_up = [('a', 0), ('a', 1), ('b', 0), ('b', 1)];
        assert_eq!(order.borrow()[..4], warm_up);
        assert_eq!(order.borrow()[4..8], [('a', 0), ('b', 0), ('a', 1), ('a', 2)]);
    }

    /// A clock on which every call takes 8 us.
    struct EightEach(std::cell::Cell<usize>);

    impl Clock for EightEach {
        fn time_us(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
            let before = self.0.get();
            work()?;
            Ok(8.0 * (self.0.get() - before) as f64)
        }

        fn least_us(&self) -> f64 {
            100.0
        }
    }

    #[test]
    fn short_calls_are_timed_several_at_a_time() {
        let clock = EightEach(std::cell::Cell::new(0));
        let count = |_: usize| {
            clock.0.set(clock.0.get() + 1);
            Ok(())
        };
        let times = in_turns(&clock, vec![Runner::new(count)]).unwrap_or_default();
        assert_eq!((times[0].min_us(), times[0].median_us()), (8.0, 8.0));
        assert_eq!(clock.0.get(), 2 + 13 * MOST_ROUNDS);
    }
}
