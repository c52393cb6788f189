//! What one layer's outputs on a device say, against the clean layer's on the same input: the numbers that the finder
//! (fault_finder.rs) compares over layers.
//!
//! x is the layer's clean input, y its clean output, d and d' the device's in two executions: [tokens, hidden] of several prompts.
//! e = d - y, u = y - x. Errors are taken by channel, as medians over tokens, so that an attention sink hides nothing; over
//! channels as their 95 % quantile, so that a fault in a tenth of them shows. A median of an even count is the lower one.

use std::collections::HashMap;
use std::ops::Range;

/// A layer's tensors, row by row.
pub struct Sample<'a> {
    pub x: &'a [f32],
    pub y: &'a [f32],
    pub d: [&'a [f32]; 2],
    pub hidden: usize,
    /// Rows of each prompt.
    pub prompts: &'a [Range<usize>],
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Statistics {
    pub elements: usize,
    pub hidden: usize,
    pub prompts: usize,
    /// NaN or infinity on the device alone.
    pub nonfinite: usize,
    /// Error over y, and over u.
    pub error: [f64; 2],
    /// Difference of the two executions over y, and over u.
    pub random: [f64; 2],
    /// Largest error over the rms of y, and of u.
    pub tail: [f64; 2],
    /// In channels with error: how constant over tokens it is.
    pub token_constant: f64,
    /// Mean over channels of each one's median error, in its standard errors.
    pub common: f64,
    /// Values beyond three times their channel's clean maximum, in both executions.
    pub spikes: f64,
    /// Zeros where the clean value is none.
    pub zeros: f64,
    /// Channel maxima of a prompt that are the same value, and less than the clean ones.
    pub ties: f64,
    /// Of the largest errors: how many are zeros, how many are such maxima, how far they differ between executions.
    pub of_largest: [f64; 3],
    /// Share of values whose f32 has 11 mantissa bits at most, as bf16's and f16's.
    pub grid_ratio: f64,
    /// Relative error of small values over that of large ones: 1 for multiplicative errors is less; and of `random`.
    pub of_small: [f64; 2],
}

impl Sample<'_> {
    pub fn statistics(&self) -> Statistics {
        let (x, y, d, h) = (self.x, self.y, self.d[0], self.hidden);
        let elements = y.len();
        let mut found = Statistics { elements, hidden: h, prompts: self.prompts.len(), ..Statistics::default() };
        found.nonfinite =
            self.d.iter().map(|d| d.iter().zip(y).filter(|(d, y)| !d.is_finite() && y.is_finite()).count()).sum();
        if elements == 0 || found.nonfinite > 0 {
            return found;
        }
        let u = |i: usize| y[i] - x[i];
        let e = |i: usize| d[i] - y[i];
        let between = |i: usize| (d[i] - self.d[1][i]).abs();
        let floored = |medians: &[f64]| -> Vec<f64> {
            let floor = 0.1 * median(medians.to_vec()) + 1e-30;
            medians.iter().map(|m| m + floor).collect()
        };
        let of_y = self.by_channel(&|i, _| y[i].abs());
        let (over_y, over_u) = (floored(&of_y), floored(&self.by_channel(&|i, _| u(i).abs())));
        let errors = self.by_channel(&|i, _| e(i).abs());
        let differences: Vec<f64> =
            self.by_channel(&|i, _| between(i)).iter().map(|m| m / std::f64::consts::SQRT_2).collect();
        let shift = self.by_channel(&|i, _| e(i));
        let around = self.by_channel(&|i, c| (e(i) - shift[c] as f32).abs());
        let ratio = |of: &[f64], over: &[f64]| -> Vec<f64> { of.iter().zip(over).map(|(a, b)| a / b).collect() };
        let by_y = ratio(&errors, &over_y);
        found.error = [upper(by_y.clone()), upper(ratio(&errors, &over_u))];
        let random_by_y = ratio(&differences, &over_y);
        found.random = [upper(random_by_y.clone()), upper(ratio(&differences, &over_u))];

        let rms = |value: &dyn Fn(usize) -> f32| {
            ((0..elements).map(|i| f64::from(value(i)).powi(2)).sum::<f64>() / elements as f64).sqrt()
        };
        let (rms_y, rms_u) = (rms(&|i| y[i]), rms(&u));
        let largest = (0..elements).map(|i| e(i).abs()).fold(0f32, f32::max);
        found.tail = [f64::from(largest) / (rms_y + 1e-30), f64::from(largest) / (rms_u + 0.1 * rms_y + 1e-30)];

        let affected =
            |of: &[f64], quantile: f64| -> Vec<usize> { (0..h).filter(|&c| of[c] >= 0.5 * quantile).collect() };
        let with_error = affected(&by_y, found.error[0]);
        let constant = with_error.iter().map(|&c| shift[c].abs() / (around[c] + 1e-6 * over_y[c]));
        found.token_constant = median(constant.collect());
        let mean = shift.iter().sum::<f64>() / h as f64;
        let variance = shift.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / (h.max(2) - 1) as f64;
        found.common = mean.abs() / ((variance / h as f64).sqrt() + 1e-6 * median(of_y) + 1e-30);

        let clean_maxima: Vec<f64> = (0..h).map(|c| f64::from(self.maximum(y, c, 0..elements / h))).collect();
        let limits: Vec<f64> = floored(&clean_maxima).iter().map(|limit| 3.0 * limit).collect();
        let typical = median((0..elements).map(|i| f64::from(e(i).abs())).collect());
        for d in self.d {
            found.spikes += (0..elements).filter(|&i| f64::from(d[i].abs()) > limits[i % h]).count() as f64;
            let is_lost = |&i: &usize| d[i] == 0.0 && y[i].abs() > (x[i].abs() + u(i).abs()) / 64.0;
            found.zeros += (0..elements).filter(is_lost).count() as f64 / 2.0;
            found.ties += self.ties(d, (4.0 * typical).max(1e-5 * rms_y) as f32) as f64 / 2.0;
        }
        self.of_largest(&mut found, largest, (1e-5 * rms_y) as f32);
        found.grid_ratio = d.iter().filter(|d| d.to_bits() & 0xFFF == 0).count() as f64 / elements as f64;
        let random_channels = affected(&random_by_y, found.random[0]);
        found.of_small = [
            self.of_small(&with_error, &over_y, &|i| e(i).abs(), y),
            if found.random[0] == 0.0 { 1.0 } else { self.of_small(&random_channels, &over_y, &between, d) },
        ];
        found
    }

    /// Of each channel, the median over rows of `value(element, channel)`.
    fn by_channel(&self, value: &dyn Fn(usize, usize) -> f32) -> Vec<f64> {
        let rows = self.y.len() / self.hidden;
        let of_channel = |c: usize| median((0..rows).map(|r| f64::from(value(r * self.hidden + c, c))).collect());
        (0..self.hidden).map(of_channel).collect()
    }

    fn maximum(&self, of: &[f32], channel: usize, rows: Range<usize>) -> f32 {
        rows.map(|row| of[row * self.hidden + channel].abs()).fold(0.0, f32::max)
    }

    /// Over prompts: how often the commonest value of a channel's maximum occurs beyond once, of maxima that are less than the
    /// clean value there by more than `least` and a 64th.
    fn ties(&self, d: &[f32], least: f32) -> usize {
        let of_prompt = |rows: &Range<usize>| {
            let mut counts: HashMap<u32, usize> = HashMap::new();
            for c in 0..self.hidden {
                let maximum = self.maximum(d, c, rows.clone());
                let at_maximum = rows.clone().map(|row| row * self.hidden + c).filter(|&i| d[i].abs() == maximum);
                let shrunk =
                    at_maximum.filter(|&i| maximum > 0.0 && self.y[i].abs() - maximum > least.max(maximum / 64.0));
                *counts.entry(maximum.to_bits()).or_default() += shrunk.count();
            }
            counts.values().copied().max().unwrap_or(0).saturating_sub(1)
        };
        self.prompts.iter().map(of_prompt).sum()
    }

    fn of_largest(&self, found: &mut Statistics, largest: f32, least: f32) {
        let (y, d, h) = (self.y, self.d[0], self.hidden);
        let error = |i: usize| (d[i] - y[i]).abs();
        let chosen: Vec<usize> = (0..y.len()).filter(|&i| error(i) > 0.25 * largest && error(i) > least).collect();
        if chosen.is_empty() {
            return;
        }
        let share = |is: &dyn Fn(usize) -> bool| chosen.iter().filter(|i| is(**i)).count() as f64 / chosen.len() as f64;
        let is_maximum = |i: usize| {
            let rows = self.prompts.iter().find(|rows| rows.contains(&(i / h))).cloned().unwrap_or(0..0);
            y[i].abs() > d[i].abs() && d[i].abs() == self.maximum(d, i % h, rows)
        };
        let between = median(chosen.iter().map(|&i| f64::from((d[i] - self.d[1][i]).abs())).collect());
        let typical = median(chosen.iter().map(|&i| f64::from(error(i))).collect());
        found.of_largest = [share(&|i| d[i] == 0.0), share(&is_maximum), between / typical];
    }

    /// Median of `value` over each channel's scale where |of| is small, over that where it is large.
    fn of_small(&self, channels: &[usize], scale: &[f64], value: &dyn Fn(usize) -> f32, of: &[f32]) -> f64 {
        let (mut small, mut large) = (Vec::new(), Vec::new());
        for row in 0..of.len() / self.hidden {
            for &c in channels {
                let i = row * self.hidden + c;
                let (size, relative) = (f64::from(of[i].abs()) / scale[c], f64::from(value(i)) / scale[c]);
                if size < 0.2 {
                    small.push(relative);
                } else if size > 1.0 {
                    large.push(relative);
                }
            }
        }
        match (small.len() < 16 || large.len() < 16, median(small), median(large)) {
            (false, small, large) if large > 0.0 => small / large,
            _ => 1.0,
        }
    }
}

/// The lower median; 0 of nothing.
fn median(values: Vec<f64>) -> f64 {
    let place = values.len().saturating_sub(1) / 2;
    at(values, place)
}

/// The 95 % quantile.
fn upper(values: Vec<f64>) -> f64 {
    let place = ((0.95 * values.len() as f64).ceil() as usize).saturating_sub(1);
    at(values, place)
}

fn at(mut values: Vec<f64>, place: usize) -> f64 {
    if values.is_empty() {
        return 0.0;
    }
    *values.select_nth_unstable_by(place, f64::total_cmp).1
}
