//! nvfp4:4over6: of two scales of a block, which map its amax to 6 or to 4, the one of smaller squared error; on a tie the
//! one for 6.

use crate::ops::cpu::arrays::from_fn;

use super::element::Element;
use super::lanes::value;
use super::rounders::E2m1;
use super::scales::{Nvfp4Scale, Scales, each};
use crate::ops::cpu::path::for_each_path;

const BLOCK: usize = 16;

/// Both scales of a segment's blocks, and what is wrong with each element under them, without its sign.
pub(super) struct Candidates {
    six: Scales,
    four: Scales,
    six_errors: Vec<f32>,
    four_errors: Vec<f32>,
    six_sums: Vec<f64>,
    four_sums: Vec<f64>,
}

impl Candidates {
    pub fn new(blocks: usize) -> Candidates {
        let errors = vec![0.0; BLOCK * blocks];
        Candidates {
            six: Scales::new(blocks),
            four: Scales::new(blocks),
            six_errors: errors.clone(),
            four_errors: errors,
            six_sums: vec![0.0; blocks],
            four_sums: vec![0.0; blocks],
        }
    }
}

for_each_path! {
    /// The better scales of whole blocks of known amax under G.
    pub(super) fn choose<T: Element>(
        x: &[T],
        amaxes: &[T::Word],
        g: f32,
        candidates: &mut Candidates,
        scales: &mut Scales,
    ) {
        let Candidates { six, four, six_errors, four_errors, six_sums, four_sums } = candidates;
        let of_six = Nvfp4Scale { factor: g / 6.0, times: 1.0, g };
        each::<T>(amaxes, six, |amax| of_six.scales(amax));
        each::<T>(amaxes, four, |amax| Nvfp4Scale { times: 1.5, ..of_six }.scales(amax));
        errors(x, six, six_errors);
        errors(x, four, four_errors);
        for (candidate, errors) in [(&mut *six_sums, &*six_errors), (&mut *four_sums, &*four_errors)] {
            let errors = errors.as_chunks::<BLOCK>().0;
            candidate.iter_mut().zip(errors).for_each(|(sum, errors)| *sum = sum_of_squares(errors));
        }
        better(&six.encode, &four.encode, six_sums, four_sums, &mut scales.encode);
        better(&six.decode, &four.decode, six_sums, four_sums, &mut scales.decode);
    }
}

/// Apart from the sums, so that it becomes a choice by lanes: a branch would be mispredicted every other time.
#[inline(always)]
fn better(six: &[f32], four: &[f32], six_sums: &[f64], four_sums: &[f64], out: &mut [f32]) {
    let sums = six_sums.iter().zip(four_sums);
    for (((six, four), (six_sum, four_sum)), out) in six.iter().zip(four).zip(sums).zip(out) {
        let (six, four) = (*six, *four);
        *out = if four_sum < six_sum { four } else { six };
    }
}

#[inline(always)]
fn errors<T: Element>(x: &[T], scales: &Scales, out: &mut [f32]) {
    let blocks = x.as_chunks::<BLOCK>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0);
    for ((x, out), (&encode, &decode)) in blocks.zip(scales.encode.iter().zip(&scales.decode)) {
        let mut error = [0.0; BLOCK];
        for i in 0..BLOCK {
            let a = T::of_word(x[i].magnitude()).read();
            error[i] = value::<E2m1<false>>(a, encode, 0).0 * decode - a;
        }
        *out = error;
    }
}

/// In f64, in halves, as the definition sums.
#[inline(always)]
fn sum_of_squares(error: &[f32; BLOCK]) -> f64 {
    let squares: [f64; BLOCK] = from_fn(|i| f64::from(error[i]) * f64::from(error[i]));
    let eight: [f64; 8] = from_fn(|i| squares[i] + squares[i + 8]);
    let four: [f64; 4] = from_fn(|i| eight[i] + eight[i + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}
