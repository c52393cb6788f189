//! The difference of two arms whose runs (seeds) answered the same questions: its error, test and bootstrap.
//!
//! Seeds and questions are both samples, and crossed: another seed and another question would have given other marks. A
//! group is a matrix [seeds, questions] of which the difference is made: one of differences where the arms have the same
//! seeds, else one of either arm, the baseline's negated. With S_g seeds in group g and n questions:
//!
//!   d    = sum over g of the mean of group g
//!   V_s  = sum over g of var(means of rows) / S_g               from seed to seed
//!   V_q  = var(sum over g of means of columns) / n              from question to question
//!   V_e  = sum over g of var(what rows and columns leave) / (S_g n), counted in either of the above
//!   SE^2 = V_s + V_q - V_e, but at least V_s and V_q            two crossed random effects (Clark 1973)
//!
//! d / SE is held against Student's t with S - 1 degrees of freedom; two groups: Welch's V_s^2 / sum V_sg^2/(S_g - 1). Few
//! seeds that agree by chance thus never look like many. The price is an interval about a quarter wider than need be for 3
//! seeds that do not differ at all.
//!
//! The bootstrap resamples seeds and questions with replacement (Owen 2007, "The pigeonhole bootstrap") and reports
//! percentiles. With few seeds it is too narrow where seeds differ, so it decides nothing here: `tests/analysis/coverage.rs`
//! has the figures of both.

use rayon::prelude::*;

use super::student::{student_quantile, student_two_sided};
use crate::Result;
use crate::numerics::generator::uniform_u32;
use crate::numerics::noise_key::{Phase, Purpose, row_key, stream};

/// [seeds][questions]
pub type Marks<'a> = [&'a [bool]];

/// [seeds, questions], row after row.
struct Group {
    values: Vec<f64>,
    questions: usize,
}

/// Two arms, ready to be compared.
pub struct TwoWay {
    groups: Vec<Group>,
    questions: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Difference {
    pub difference: f64,
    pub standard_error: f64,
    pub degrees_of_freedom: f64,
}

impl TwoWay {
    /// `paired`: row i of both is of the same seed. None where there are fewer than 2 seeds or questions, or where the
    /// numbers of questions differ.
    pub fn new(arm: &Marks, baseline: &Marks, paired: bool) -> Option<TwoWay> {
        let questions = arm.first()?.len();
        let alike = arm.iter().chain(baseline).all(|row| row.len() == questions);
        if arm.len() < 2 || baseline.len() < 2 || questions < 2 || !alike || (paired && arm.len() != baseline.len()) {
            return None;
        }
        let number = |mark: &bool| f64::from(u8::from(*mark));
        let signed = |marks: &Marks, sign: f64| Group {
            values: marks.iter().flat_map(|row| row.iter().map(move |mark| sign * number(mark))).collect(),
            questions,
        };
        let (mut first, second) = (signed(arm, 1.0), signed(baseline, -1.0));
        let groups = if paired {
            first.values.iter_mut().zip(&second.values).for_each(|(a, b)| *a += b);
            vec![first]
        } else {
            vec![first, second]
        };
        Some(TwoWay { groups, questions })
    }

    pub fn difference(&self) -> Difference {
        let n = self.questions as f64;
        let effects = self.question_effects();
        let difference = effects.iter().sum::<f64>() / n;
        let of_questions = variance(&effects) / n;
        let (mut of_seeds, mut interaction, mut spread) = (0.0, 0.0, 0.0);
        for group in &self.groups {
            let seeds = group.seeds() as f64;
            let rows = group.row_means();
            let own = variance(&rows) / seeds;
            of_seeds += own;
            interaction += group.interaction(&rows) / (seeds * n);
            spread += own * own / (seeds - 1.0);
        }
        let total = (of_seeds + of_questions - interaction).max(of_seeds).max(of_questions);
        let fewest = self.groups.iter().map(Group::seeds).min().unwrap_or(2);
        let degrees_of_freedom = if spread > 0.0 { of_seeds * of_seeds / spread } else { fewest as f64 - 1.0 };
        Difference { difference, standard_error: total.sqrt(), degrees_of_freedom }
    }

    /// The 95 % percentile interval of `replicates` resamples; the same in every call.
    pub fn bootstrap(&self, replicates: u32) -> Result<(f64, f64)> {
        let stream = stream(Purpose::Other, Phase::Validation, 0, 0)?;
        // Draw `i` of replicate `r` for `what`: 0 the questions, 1 + g the seeds of group g.
        let place = |r: u32, what: u32, i: usize, of: usize| {
            ((u64::from(uniform_u32(0, stream, row_key(r, what), i as u32)) * of as u64) >> 32) as usize
        };
        let replicate = |r: u32| {
            let mut effects = vec![0.0; self.questions];
            for (g, group) in self.groups.iter().enumerate() {
                let seeds = group.seeds();
                for i in 0..seeds {
                    let row = group.row(place(r, 1 + g as u32, i, seeds));
                    effects.iter_mut().zip(row).for_each(|(sum, x)| *sum += x / seeds as f64);
                }
            }
            let drawn = (0..self.questions).map(|i| effects[place(r, 0, i, self.questions)]);
            drawn.sum::<f64>() / self.questions as f64
        };
        let mut differences: Vec<f64> = (0..replicates).into_par_iter().map(replicate).collect();
        differences.sort_by(f64::total_cmp);
        Ok((percentile(&differences, 0.025), percentile(&differences, 0.975)))
    }

    /// Per question the difference of the arms' means over seeds.
    fn question_effects(&self) -> Vec<f64> {
        let mut effects = vec![0.0; self.questions];
        for group in &self.groups {
            for row in group.rows() {
                effects.iter_mut().zip(row).for_each(|(sum, x)| *sum += x / group.seeds() as f64);
            }
        }
        effects
    }
}

impl Group {
    fn seeds(&self) -> usize {
        self.values.len() / self.questions
    }

    fn rows(&self) -> impl Iterator<Item = &[f64]> {
        self.values.chunks(self.questions)
    }

    fn row(&self, seed: usize) -> &[f64] {
        &self.values[seed * self.questions..][..self.questions]
    }

    fn row_means(&self) -> Vec<f64> {
        self.rows().map(|row| row.iter().sum::<f64>() / self.questions as f64).collect()
    }

    /// The mean square of x_sq - row mean - column mean + mean, with (S - 1)(n - 1) degrees of freedom.
    fn interaction(&self, row_means: &[f64]) -> f64 {
        let seeds = self.seeds() as f64;
        let mean = row_means.iter().sum::<f64>() / seeds;
        let column_means: Vec<f64> =
            (0..self.questions).map(|q| self.rows().map(|row| row[q]).sum::<f64>() / seeds).collect();
        let left = self.rows().zip(row_means).flat_map(|(row, row_mean)| {
            row.iter().zip(&column_means).map(move |(x, column_mean)| x - row_mean - column_mean + mean)
        });
        left.map(|x| x * x).sum::<f64>() / ((seeds - 1.0) * (self.questions as f64 - 1.0))
    }
}

impl Difference {
    /// Two-sided p of "the arms are equally good". None where nothing varies and yet they differ: there is no spread to
    /// judge by.
    pub fn p(&self) -> Option<f64> {
        if self.standard_error > 0.0 {
            return Some(student_two_sided(self.difference / self.standard_error, self.degrees_of_freedom));
        }
        (self.difference == 0.0).then_some(1.0)
    }

    /// The 95 % interval; None where nothing varies.
    pub fn interval(&self) -> Option<(f64, f64)> {
        let half = student_quantile(0.975, self.degrees_of_freedom) * self.standard_error;
        (self.standard_error > 0.0).then_some((self.difference - half, self.difference + half))
    }
}

/// The difference that a two-sided test at 5 % finds with probability 80 %, given its standard error:
/// (t_0.975 + t_0.80) SE (Bloom 1995). Infinitely many degrees of freedom: (1.960 + 0.842) SE.
pub fn minimum_detectable_difference(standard_error: f64, degrees_of_freedom: f64) -> f64 {
    (student_quantile(0.975, degrees_of_freedom) + student_quantile(0.8, degrees_of_freedom)) * standard_error
}

fn variance(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0)
}

/// Of sorted values, between neighbours by a straight line (numpy's and R's default, type 7).
fn percentile(sorted: &[f64], p: f64) -> f64 {
    let at = p * (sorted.len().max(1) - 1) as f64;
    let value = |i: usize| sorted.get(i).or(sorted.last()).copied().unwrap_or(f64::NAN);
    let low = at.floor();
    value(low as usize) + (at - low) * (value(low as usize + 1) - value(low as usize))
}
