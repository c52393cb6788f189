//! The sums of numerics::tensor_error of y against x, in f64 lanes: column c of a row adds to lane c mod 8, rows and chunks
//! merge in order, so neither threads nor instruction sets change a bit.
#![allow(unsafe_code)]

use crate::ops::cpu::arrays::from_fn;

use rayon::prelude::*;

use super::element::{Element, Word};
#[cfg(target_arch = "x86_64")]
use super::error_sums_x86;
use super::{CHUNK_ELEMENTS, Storage};
use crate::numerics::tensor_error::TensorErrorSums;
use crate::ops::cpu::path::{Path, for_each_path};

pub(super) const LANES: usize = 8;
pub(super) type Wide = [f64; LANES];

/// x^2, q^2, x q, error^2, error / (|x| + 1e-10), and the largest error.
#[derive(Clone, Copy, Default)]
pub(super) struct Lanes(pub [Wide; 6]);

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

/// The sums of a row, or of a share of a tensor that is cut the same way every time.
pub(super) fn row_sums<T: Element>(path: Path, x: &[T], y: &[T]) -> TensorErrorSums {
    let [finite, nonzero, deadzone] = counts(path, x, y).map(u64::from);
    let mut lanes = Lanes::default();
    let ((groups, tail), (y_groups, y_tail)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    lanes.add_groups(if finite == x.len() as u64 { path } else { Path::Portable }, groups, y_groups);
    let padded = |tail: &[T]| from_fn(|l| tail.get(l).copied().unwrap_or(T::ZERO));
    lanes.add(&padded(tail), &padded(y_tail));
    let [x_sq, q_sq, x_q, error_sq, relative, _] =
        lanes.0.map(|lanes| lanes.into_iter().fold(0.0, |total, lane| total + lane));
    TensorErrorSums {
        elements: finite,
        x_sq,
        q_sq,
        x_q,
        error_sq,
        relative,
        max_abs_error: lanes.0[5].into_iter().fold(0.0, f64::max),
        nonzero,
        deadzone,
        saturated: 0,
        nonfinite: x.len() as u64 - finite,
    }
}

for_each_path! {
    /// How many elements are finite, of these not zero, and of these zero in y.
    fn counts<T: Element>(x: &[T], y: &[T]) -> [u32; 3] {
        let [mut finite, mut nonzero, mut deadzone] = [0u32; 3];
        for (x, y) in x.iter().zip(y) {
            let (x, y) = (x.magnitude(), y.magnitude());
            let (is_finite, is_zero) = (x.max(y) < T::Word::of(T::INFINITY), x == T::Word::ZERO);
            finite = finite.wrapping_add(is_finite as u32);
            nonzero = nonzero.wrapping_add((is_finite & !is_zero) as u32);
            deadzone = deadzone.wrapping_add((is_finite & !is_zero & (y == T::Word::ZERO)) as u32);
        }
        [finite, nonzero, deadzone]
    }
}

impl Lanes {
    /// By a path other than the portable: of finite elements.
    fn add_groups<T: Element>(&mut self, path: Path, x: &[[T; LANES]], q: &[[T; LANES]]) {
        #[cfg(target_arch = "x86_64")]
        match path.or_below() {
            Path::Portable => {}
            // SAFETY: or_below gives a path only where the CPU has its instructions.
            Path::Avx2 => return unsafe { error_sums_x86::add_avx2(self, x, q) },
            // SAFETY: as above.
            Path::Avx512 => return unsafe { error_sums_x86::add_avx512(self, x, q) },
        }
        let _ = path;
        x.iter().zip(q).for_each(|(x, q)| self.add(x, q));
    }

    /// What is not finite adds nothing.
    fn add<T: Element>(&mut self, x: &[T; LANES], q: &[T; LANES]) {
        let [x_sq, q_sq, x_q, error_sq, relative, largest] = &mut self.0;
        for l in 0..LANES {
            let (x, q) = (f64::from(x[l].read()), f64::from(q[l].read()));
            let (x, q) = if x.is_finite() && q.is_finite() { (x, q) } else { (0.0, 0.0) };
            let error = (q - x).abs();
            x_sq[l] += x * x;
            q_sq[l] += q * q;
            x_q[l] += x * q;
            error_sq[l] += error * error;
            relative[l] += error / (x.abs() + 1e-10);
            largest[l] = largest[l].max(error);
        }
    }
}
