//! The law on a share of one row of matmul_error.rs: out = round(law(y, s, z) + bias), and the sums of what it did.
//! One source, compiled with AVX2 and FMA and without; Rust never contracts a product and a sum by itself.
#![allow(unsafe_code)]

use super::normals::Path;
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

/// The kernel for a law, with or without bias.
pub(super) fn segment<T: Output>(path: Path, law: ErrorLaw, bias: bool) -> Segment<T> {
    match (law, bias) {
        (ErrorLaw::RelativeGaussian, false) => segment_for::<T, RELATIVE, false>(path),
        (ErrorLaw::RelativeGaussian, true) => segment_for::<T, RELATIVE, true>(path),
        (ErrorLaw::AbsoluteGaussian, false) => segment_for::<T, ABSOLUTE, false>(path),
        (ErrorLaw::AbsoluteGaussian, true) => segment_for::<T, ABSOLUTE, true>(path),
        (ErrorLaw::SystematicBias, false) => segment_for::<T, SYSTEMATIC, false>(path),
        (ErrorLaw::SystematicBias, true) => segment_for::<T, SYSTEMATIC, true>(path),
    }
}

/// (scale, clean, z, bias, out, lanes) over a share of one row that begins at a multiple of 64 columns.
pub(super) type Segment<T> = fn(f32, &[f32], &[f32], &[f32], &mut [T], &mut Lanes);

const RELATIVE: u8 = 0;
const ABSOLUTE: u8 = 1;
const SYSTEMATIC: u8 = 2;

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
}

fn segment_for<T: Output, const LAW: u8, const BIAS: bool>(path: Path) -> Segment<T> {
    #[cfg(target_arch = "x86_64")]
    if path.or_below() >= Path::Avx2 {
        // SAFETY: the CPU has AVX2 and FMA, as just detected.
        return |scale, clean, z, bias, out, lanes| unsafe {
            segment_avx2::<T, LAW, BIAS>(scale, clean, z, bias, out, lanes)
        };
    }
    let _ = path;
    segment_portable::<T, LAW, BIAS>
}

/// Compiled with FMA, in which `mul_add` is one instruction. Rust never contracts a product and a sum by itself.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn segment_avx2<T: Output, const LAW: u8, const BIAS: bool>(
    scale: f32,
    clean: &[f32],
    z: &[f32],
    bias: &[f32],
    out: &mut [T],
    lanes: &mut Lanes,
) {
    segment_portable::<T, LAW, BIAS>(scale, clean, z, bias, out, lanes);
}

#[inline(always)]
fn segment_portable<T: Output, const LAW: u8, const BIAS: bool>(
    scale: f32,
    clean: &[f32],
    z: &[f32],
    bias: &[f32],
    out: &mut [T],
    lanes: &mut Lanes,
) {
    let whole = out.len() / LANES * LANES;
    let mut local = *lanes;
    for start in (0..whole).step_by(LANES) {
        let (y, z) = (&clean[start..start + LANES], &z[start..start + LANES]);
        let out = &mut out[start..start + LANES];
        let (mut noisy, mut exact) = ([0f32; LANES], [0f32; LANES]);
        for l in 0..LANES {
            noisy[l] = law::<LAW>(y[l], scale, z[l]);
            exact[l] = y[l];
        }
        if BIAS {
            let bias = &bias[start..start + LANES];
            for l in 0..LANES {
                noisy[l] += bias[l];
                exact[l] += bias[l];
            }
        }
        for l in 0..LANES {
            out[l] = T::round(noisy[l]);
        }
        for l in 0..LANES {
            local.add(l, T::round(noisy[l]).widen(), T::round(exact[l]).widen(), y[l]);
        }
    }
    for i in whole..out.len() {
        let (mut noisy, mut exact) = (law::<LAW>(clean[i], scale, z[i]), clean[i]);
        if BIAS {
            noisy += bias[i];
            exact += bias[i];
        }
        out[i] = T::round(noisy);
        local.add(i - whole, out[i].widen(), T::round(exact).widen(), clean[i]);
    }
    *lanes = local;
}

impl Lanes {
    #[inline(always)]
    fn add(&mut self, lane: usize, noisy: f32, exact: f32, clean: f32) {
        let (error, square) = (noisy as f64 - exact as f64, clean as f64 * clean as f64);
        self.error[lane] += error;
        self.error_sq[lane] += error * error;
        self.clean_sq[lane] += square;
        self.clean_fourth[lane] += square * square;
    }
}

#[inline(always)]
fn law<const LAW: u8>(y: f32, s: f32, z: f32) -> f32 {
    match LAW {
        RELATIVE => ErrorLaw::RelativeGaussian.apply(y, s, z),
        ABSOLUTE => ErrorLaw::AbsoluteGaussian.apply(y, s, z),
        _ => ErrorLaw::SystematicBias.apply(y, s, z),
    }
}
