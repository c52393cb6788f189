//! The sums of numerics::tensor_error of y against x, in f64 lanes: column c of a row adds to lane c mod 8, rows and chunks
//! merge in order, so neither threads nor instruction sets change a bit.

use std::array::from_fn;

use rayon::prelude::*;

use super::element::Element;
use super::{CHUNK_ELEMENTS, Storage};
use crate::numerics::tensor_error::TensorErrorSums;
use crate::ops::cpu::path::{Path, for_each_path};

const LANES: usize = 8;
type Wide = [f64; LANES];

#[derive(Clone, Copy, Default)]
struct Lanes {
    x_sq: Wide,
    q_sq: Wide,
    x_q: Wide,
    error_sq: Wide,
    relative: Wide,
    max_abs_error: Wide,
    finite: [u32; LANES],
    nonzero: [u32; LANES],
    deadzone: [u32; LANES],
}

/// The sums of y against x, equally long; `saturated` comes from the quantizer.
pub fn error_sums<T: Storage>(x: &[T], y: &[T]) -> TensorErrorSums {
    let of_chunk = |(x, y): (&[T], &[T])| {
        let (mut wide_x, mut wide_y) = (vec![0.0; x.len()], vec![0.0; y.len()]);
        T::widen(x, &mut wide_x);
        T::widen(y, &mut wide_y);
        row_sums::<f32>(Path::best(), &wide_x, &wide_y)
    };
    let chunks: Vec<TensorErrorSums> =
        x.par_chunks(CHUNK_ELEMENTS).zip(y.par_chunks(CHUNK_ELEMENTS)).map(of_chunk).collect();
    let mut sums = TensorErrorSums::default();
    chunks.iter().for_each(|chunk| sums.merge(chunk));
    sums
}

for_each_path! {
    /// The sums of a row, or of a share of a tensor that is cut the same way every time.
    pub(super) fn row_sums<T: Element>(x: &[T], y: &[T]) -> TensorErrorSums {
        let mut lanes = Lanes::default();
        let (groups, tail) = x.as_chunks::<LANES>();
        let (y_groups, y_tail) = y.as_chunks::<LANES>();
        for (x, y) in groups.iter().zip(y_groups) {
            lanes.add(from_fn(|l| x[l].read()), from_fn(|l| y[l].read()));
        }
        let padded = |tail: &[T]| -> [f32; LANES] { from_fn(|l| tail.get(l).map_or(0.0, |v| v.read())) };
        if !tail.is_empty() {
            lanes.add(padded(tail), padded(y_tail));
        }
        lanes.finish(x.len())
    }
}

impl Lanes {
    #[inline(always)]
    fn add(&mut self, x: [f32; LANES], q: [f32; LANES]) {
        let finite: [bool; LANES] = from_fn(|l| x[l].abs() < f32::INFINITY && q[l].abs() < f32::INFINITY);
        let x: Wide = from_fn(|l| if finite[l] { f64::from(x[l]) } else { 0.0 });
        let q: Wide = from_fn(|l| if finite[l] { f64::from(q[l]) } else { 0.0 });
        let error: Wide = from_fn(|l| (q[l] - x[l]).abs());
        self.x_sq = from_fn(|l| self.x_sq[l] + x[l] * x[l]);
        self.q_sq = from_fn(|l| self.q_sq[l] + q[l] * q[l]);
        self.x_q = from_fn(|l| self.x_q[l] + x[l] * q[l]);
        self.error_sq = from_fn(|l| self.error_sq[l] + error[l] * error[l]);
        self.relative = from_fn(|l| self.relative[l] + error[l] / (x[l].abs() + 1e-10));
        self.max_abs_error =
            from_fn(|l| if error[l] > self.max_abs_error[l] { error[l] } else { self.max_abs_error[l] });
        self.finite = from_fn(|l| self.finite[l].wrapping_add(finite[l] as u32));
        self.nonzero = from_fn(|l| self.nonzero[l].wrapping_add((x[l] != 0.0) as u32));
        self.deadzone = from_fn(|l| self.deadzone[l].wrapping_add((x[l] != 0.0 && q[l] == 0.0) as u32));
    }

    /// Of `elements`: a padded group has counted zeros as finite.
    fn finish(&self, elements: usize) -> TensorErrorSums {
        let sum = |lanes: Wide| lanes.into_iter().fold(0.0, |total, lane| total + lane);
        let count = |lanes: [u32; LANES]| lanes.into_iter().map(u64::from).sum::<u64>();
        let padding = (elements.next_multiple_of(LANES) - elements) as u64;
        let finite = count(self.finite) - padding;
        TensorErrorSums {
            elements: finite,
            x_sq: sum(self.x_sq),
            q_sq: sum(self.q_sq),
            x_q: sum(self.x_q),
            error_sq: sum(self.error_sq),
            relative: sum(self.relative),
            max_abs_error: self.max_abs_error.into_iter().fold(0.0, f64::max),
            nonzero: count(self.nonzero),
            deadzone: count(self.deadzone),
            saturated: 0,
            nonfinite: elements as u64 - finite,
        }
    }
}
