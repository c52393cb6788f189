//! From a scaled magnitude to a value of the element grid, without codes: numerics/e2m1.rs, e4m3.rs and original.rs in
//! arithmetic that vectorises.
//!
//! Adding and subtracting 1.5 * 2^23 steps rounds to a multiple of the step, ties to even multiples, which are the even
//! codes.

/// A rounding into an element grid.
pub(super) trait Rounder {
    /// The largest magnitude.
    const MAX: f32;
    /// Whether elements are x / s rather than x * E.
    const DIVIDES: bool;
    /// Whether `u` is used.
    const DRAWS: bool;
    /// A value of the grid; 0 <= a <= MAX, u in units of 2^-16.
    fn round(a: f32, u: f32) -> f32;
}

pub(super) struct E2m1<const HALF_AWAY: bool>;
pub(super) struct E2m1Stochastic;
/// Of x / s, with ties toward zero: nvfp4_single_level.
pub(super) struct E2m1TowardZero;
pub(super) struct E4m3;
/// Of x / s: fp8.
pub(super) struct E4m3Divided;
pub(super) struct E4m3Stochastic;

const EXPONENT: u32 = 0x7F80_0000;

/// The distance of the neighbours of a on the E2M1 grid: .5 below 2, 1 below 4, 2 from there.
#[inline(always)]
fn e2m1_step(a: f32) -> f32 {
    let from_one = if a > 1.0 { a } else { 1.0 };
    f32::from_bits((from_one.to_bits() & EXPONENT).wrapping_sub(1 << 23))
}

/// 2^-16 of a step, a power of two.
#[inline(always)]
fn parts(step: f32) -> f32 {
    f32::from_bits(step.to_bits().wrapping_sub(16 << 23))
}

#[inline(always)]
fn e2m1_nearest_even(a: f32) -> f32 {
    let steps = 12_582_912.0 * e2m1_step(a);
    (a + steps) - steps
}

/// The nearest multiple of 2^-9, ties to even.
#[inline(always)]
fn e4m3_subnormal(a: f32) -> f32 {
    (a + 24_576.0) - 24_576.0
}

const E4M3_SMALLEST_NORMAL: f32 = 1.0 / 64.0;

/// The E4M3 value nearest to a, 0 <= a <= 448, ties to even.
#[inline(always)]
pub(super) fn e4m3_nearest_even(a: f32) -> f32 {
    let bits = a.to_bits();
    let normal = f32::from_bits(bits.wrapping_add(0x7_FFFF).wrapping_add(bits >> 20 & 1) & !0xF_FFFF);
    if a < E4M3_SMALLEST_NORMAL { e4m3_subnormal(a) } else { normal }
}

impl<const HALF_AWAY: bool> Rounder for E2m1<HALF_AWAY> {
    const MAX: f32 = 6.0;
    const DIVIDES: bool = false;
    const DRAWS: bool = false;
    /// Half away, a tie that went down to the even code goes up.
    #[inline(always)]
    fn round(a: f32, _: f32) -> f32 {
        let (rounded, step) = (e2m1_nearest_even(a), e2m1_step(a));
        rounded + if HALF_AWAY && a - rounded == 0.5 * step { step } else { 0.0 }
    }
}

impl Rounder for E2m1TowardZero {
    const MAX: f32 = 6.0;
    const DIVIDES: bool = true;
    const DRAWS: bool = false;
    /// A tie that went up to the even code goes down.
    #[inline(always)]
    fn round(a: f32, _: f32) -> f32 {
        let (rounded, step) = (e2m1_nearest_even(a), e2m1_step(a));
        rounded - if rounded - a == 0.5 * step { step } else { 0.0 }
    }
}

impl Rounder for E2m1Stochastic {
    const MAX: f32 = 6.0;
    const DIVIDES: bool = false;
    const DRAWS: bool = true;
    /// Down from a + u step: from 1 on the grid has one mantissa bit.
    #[inline(always)]
    fn round(a: f32, u: f32) -> f32 {
        let target = a + u * parts(e2m1_step(a));
        let cut = f32::from_bits(target.to_bits() & !0x3F_FFFF);
        let below = if target >= 0.5 { 0.5 } else { 0.0 };
        if target >= 1.0 { cut } else { below }
    }
}

impl Rounder for E4m3 {
    const MAX: f32 = 448.0;
    const DIVIDES: bool = false;
    const DRAWS: bool = false;
    #[inline(always)]
    fn round(a: f32, _: f32) -> f32 {
        e4m3_nearest_even(a)
    }
}

impl Rounder for E4m3Divided {
    const MAX: f32 = 448.0;
    const DIVIDES: bool = true;
    const DRAWS: bool = false;
    #[inline(always)]
    fn round(a: f32, _: f32) -> f32 {
        e4m3_nearest_even(a)
    }
}

impl Rounder for E4m3Stochastic {
    const MAX: f32 = 448.0;
    const DIVIDES: bool = false;
    const DRAWS: bool = true;
    /// Down from a + u step, at most 448, to a multiple of the step there.
    #[inline(always)]
    fn round(a: f32, u: f32) -> f32 {
        let normal = if a > E4M3_SMALLEST_NORMAL { a } else { E4M3_SMALLEST_NORMAL };
        let target = a + u * parts(f32::from_bits((normal.to_bits() & EXPONENT).wrapping_sub(3 << 23)));
        let target = if target > 448.0 { 448.0 } else { target };
        let nearest = e4m3_subnormal(target);
        let subnormal = nearest - if nearest > target { 1.0 / 512.0 } else { 0.0 };
        let cut = f32::from_bits(target.to_bits() & !0xF_FFFF);
        if target < E4M3_SMALLEST_NORMAL { subnormal } else { cut }
    }
}
