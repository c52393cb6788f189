//! nvfp4:4over6: of two scales of a block, which map its amax to 6 or to 4, the one of smaller squared error; on a tie the
//! one for 6.

use std::array::from_fn;

use super::element::Element;
use super::lanes::{GROUP, values};
use super::rounders::E2m1;
use super::scales::{Nvfp4Scale, Scales, each};
use crate::ops::cpu::path::for_each_path;

/// Both scales of a row's blocks.
pub(super) struct Candidates {
    six: Scales,
    four: Scales,
}

impl Candidates {
    pub fn new(blocks: usize) -> Candidates {
        Candidates { six: Scales::new(blocks), four: Scales::new(blocks) }
    }
}

for_each_path! {
    /// y of a row of blocks of known amax under G, and how many elements saturated.
    pub(super) fn row<T: Element>(
        x: &[T],
        amaxes: &[T::Word],
        g: f32,
        candidates: &mut Candidates,
        out: &mut [T],
    ) -> usize {
        let six = Nvfp4Scale { factor: g / 6.0, times: 1.0, g };
        let four = Nvfp4Scale { times: 1.5, ..six };
        each::<T>(amaxes, &mut candidates.six, |amax| six.scales(amax));
        each::<T>(amaxes, &mut candidates.four, |amax| four.scales(amax));
        let mut saturated = 0usize;
        for (index, (x, out)) in x.chunks(GROUP).zip(out.chunks_mut(GROUP)).enumerate() {
            if candidates.six.decode[index].is_nan() {
                out.fill(T::NAN);
                continue;
            }
            let x: [f32; GROUP] = from_fn(|i| if i < x.len() { x[i].read() } else { 0.0 });
            let (six_y, six_error, six_saturated) = candidate(&x, &candidates.six, index);
            let (four_y, four_error, four_saturated) = candidate(&x, &candidates.four, index);
            let fours = four_error < six_error;
            saturated = saturated.wrapping_add(if fours { four_saturated } else { six_saturated });
            let y: [f32; GROUP] = from_fn(|i| if fours { four_y[i] } else { six_y[i] });
            let y: [T; GROUP] = from_fn(|i| T::round(y[i]));
            out.copy_from_slice(&y[..out.len()]);
        }
        saturated
    }
}

/// y, its squared error and how many elements saturated. The error is that of the definition: differences in f32,
/// squares in f64, summed in halves.
#[inline(always)]
fn candidate(x: &[f32; GROUP], scales: &Scales, block: usize) -> ([f32; GROUP], f64, usize) {
    let mut saturated = [0; GROUP];
    let values = values::<E2m1>(x, scales.encode[block], &[0; GROUP], &mut saturated);
    let y: [f32; GROUP] = from_fn(|i| values[i] * scales.decode[block]);
    let error: [f64; GROUP] = from_fn(|i| f64::from(y[i] - x[i]));
    let squares: [f64; 16] = from_fn(|i| error[i] * error[i]);
    let eight: [f64; 8] = from_fn(|i| squares[i] + squares[i + 8]);
    let four: [f64; 4] = from_fn(|i| eight[i] + eight[i + 4]);
    let sum = (four[0] + four[2]) + (four[1] + four[3]);
    (y, sum, saturated.iter().fold(0u32, |total, lane| total.wrapping_add(*lane)) as usize)
}
