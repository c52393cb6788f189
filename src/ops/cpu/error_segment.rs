//! The law on a share of one row of matmul_error.rs: out = round(law(y, s, z) + bias), and the sums of what it did.
//! Rust never contracts a product and a sum by itself, so every path gives the same bits.

use super::arrays::from_fn;
use super::path::for_each_path;
use crate::numerics::error_law::ErrorLaw;
use half::bf16;

/// Partial sums of a row: column c adds to lane c mod 8.
const LANES: usize = 8;

/// An output dtype and its one rounding.
pub(super) trait Output: Copy + Send + Sync {
    fn round(value: f32) -> Self;
    fn widen(self) -> f32;
}

impl Output for f32 {
    #[inline(always)]
    fn round(value: f32) -> f32 {
        value
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Output for bf16 {
    /// Nearest, ties to even, without a branch so that it vectorises; NaN stays NaN (quiet).
    #[inline(always)]
    fn round(value: f32) -> bf16 {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
        bf16::from_bits(if value.is_nan() { bits >> 16 | 0x40 } else { rounded } as u16)
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
}

/// Sums of a row, or of rows merged in order.
#[derive(Clone, Copy, Default)]
pub(super) struct RowSums {
    pub error: f64,
    pub error_sq: f64,
    pub clean_sq: f64,
    pub clean_fourth: f64,
}

#[derive(Clone, Copy, Default)]
pub(super) struct Lanes {
    error: [f64; LANES],
    error_sq: [f64; LANES],
    clean_sq: [f64; LANES],
    clean_fourth: [f64; LANES],
}

impl Lanes {
    pub(super) fn finish(self) -> RowSums {
        let sum = |lanes: [f64; LANES]| lanes.into_iter().fold(0.0, |total, lane| total + lane);
        RowSums {
            error: sum(self.error),
            error_sq: sum(self.error_sq),
            clean_sq: sum(self.clean_sq),
            clean_fourth: sum(self.clean_fourth),
        }
    }

    /// Adds a group of 8 columns.
    #[inline(always)]
    fn add(&mut self, noisy: [f32; LANES], exact: [f32; LANES], clean: [f32; LANES]) {
        let wide = |v: [f32; LANES]| -> [f64; LANES] { from_fn(|l| f64::from(v[l])) };
        let times = |a: [f64; LANES], b: [f64; LANES]| -> [f64; LANES] { from_fn(|l| a[l] * b[l]) };
        let plus = |a: [f64; LANES], b: [f64; LANES]| -> [f64; LANES] { from_fn(|l| a[l] + b[l]) };
        let (noisy, exact, clean) = (wide(noisy), wide(exact), wide(clean));
        let error = from_fn(|l| noisy[l] - exact[l]);
        let square = times(clean, clean);
        self.error = plus(self.error, error);
        self.error_sq = plus(self.error_sq, times(error, error));
        self.clean_sq = plus(self.clean_sq, square);
        self.clean_fourth = plus(self.clean_fourth, times(square, square));
    }
}

/// What a share of a row is under.
#[derive(Clone, Copy)]
pub(super) struct Law {
    pub law: ErrorLaw,
    pub scale: f32,
    pub has_bias: bool,
    pub place: Place,
}

/// Where y comes from and the result goes.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Place {
    /// out = round(law(clean) + bias).
    Apart,
    /// out = round(law(out) + bias).
    Same,
    /// out += round(law(clean)), without bias.
    Added,
}

const RELATIVE: u8 = 0;
const ABSOLUTE: u8 = 1;
const SYSTEMATIC: u8 = 2;

const APART: u8 = 0;
const SAME: u8 = 1;
const ADDED: u8 = 2;

for_each_path! {
    /// A share of one row that begins at a multiple of 64 columns. `clean` is empty in place, `bias` where there is none.
    pub(super) fn segment<T: Output>(law: Law, clean: &[f32], z: &[f32], bias: &[f32], out: &mut [T], lanes: &mut Lanes) {
        match law.law {
            ErrorLaw::RelativeGaussian => segment_of::<T, RELATIVE>(law, clean, z, bias, out, lanes),
            ErrorLaw::AbsoluteGaussian => segment_of::<T, ABSOLUTE>(law, clean, z, bias, out, lanes),
            ErrorLaw::SystematicBias => segment_of::<T, SYSTEMATIC>(law, clean, z, bias, out, lanes),
        }
    }
}

#[inline(always)]
fn segment_of<T: Output, const LAW: u8>(
    law: Law,
    clean: &[f32],
    z: &[f32],
    bias: &[f32],
    out: &mut [T],
    lanes: &mut Lanes,
) {
    match (law.place, law.has_bias) {
        (Place::Apart, false) => groups::<T, LAW, APART, false>(law.scale, clean, z, bias, out, lanes),
        (Place::Apart, true) => groups::<T, LAW, APART, true>(law.scale, clean, z, bias, out, lanes),
        (Place::Same, false) => groups::<T, LAW, SAME, false>(law.scale, clean, z, bias, out, lanes),
        (Place::Same, true) => groups::<T, LAW, SAME, true>(law.scale, clean, z, bias, out, lanes),
        (Place::Added, _) => groups::<T, LAW, ADDED, false>(law.scale, clean, z, bias, out, lanes),
    }
}

#[inline(always)]
fn groups<T: Output, const LAW: u8, const PLACE: u8, const BIAS: bool>(
    scale: f32,
    clean: &[f32],
    z: &[f32],
    bias: &[f32],
    out: &mut [T],
    lanes: &mut Lanes,
) {
    let (y_groups, y_tail) = clean.as_chunks::<LANES>();
    let (z_groups, z_tail) = z.as_chunks::<LANES>();
    let (out_groups, out_tail) = out.as_chunks_mut::<LANES>();
    let (bias_groups, bias_tail) = bias.as_chunks::<LANES>();
    let mut local = *lanes;
    for (i, (z, out)) in z_groups.iter().zip(out_groups).enumerate() {
        let y = if PLACE == SAME { from_fn(|l| out[l].widen()) } else { y_groups[i] };
        let bias = if BIAS { bias_groups[i] } else { [0.0; LANES] };
        group::<T, LAW, PLACE, BIAS>(scale, y, *z, bias, out, &mut local);
    }
    if !out_tail.is_empty() {
        // A padded column is 0 with and without noise, and adds 0 to every sum.
        let padded = |tail: &[f32]| -> [f32; LANES] { from_fn(|l| tail.get(l).copied().unwrap_or(0.0)) };
        let (z, bias) = (padded(z_tail), padded(bias_tail));
        let mut out: [T; LANES] = from_fn(|l| out_tail.get(l).copied().unwrap_or(T::round(0.0)));
        let y = if PLACE == SAME { from_fn(|l| out[l].widen()) } else { padded(y_tail) };
        group::<T, LAW, PLACE, BIAS>(scale, y, z, bias, &mut out, &mut local);
        out_tail.copy_from_slice(&out[..out_tail.len()]);
    }
    *lanes = local;
}

#[inline(always)]
fn group<T: Output, const LAW: u8, const PLACE: u8, const BIAS: bool>(
    scale: f32,
    y: [f32; LANES],
    z: [f32; LANES],
    bias: [f32; LANES],
    out: &mut [T; LANES],
    lanes: &mut Lanes,
) {
    let mut noisy: [f32; LANES] = from_fn(|l| law::<LAW>(y[l], scale, z[l]));
    let mut exact = y;
    if BIAS {
        noisy = from_fn(|l| noisy[l] + bias[l]);
        exact = from_fn(|l| exact[l] + bias[l]);
    }
    let rounded: [T; LANES] = from_fn(|l| T::round(noisy[l]));
    lanes.add(from_fn(|l| rounded[l].widen()), from_fn(|l| T::round(exact[l]).widen()), y);
    *out = if PLACE == ADDED { from_fn(|l| T::round(out[l].widen() + rounded[l].widen())) } else { rounded };
}

#[inline(always)]
fn law<const LAW: u8>(y: f32, s: f32, z: f32) -> f32 {
    match LAW {
        RELATIVE => ErrorLaw::RelativeGaussian.apply(y, s, z),
        ABSOLUTE => ErrorLaw::AbsoluteGaussian.apply(y, s, z),
        _ => ErrorLaw::SystematicBias.apply(y, s, z),
    }
}
