//! Magnitudes to the element grid without codes, branch-free: equal to numerics/e2m1.rs, e4m3.rs and original.rs.
//!
//! A magnitude is 0..=MAX already; `u` in [0, 1) is what stochastic rounding drew.

use crate::numerics::{e2m1, e4m3};

pub(super) trait ElementRounding {
    const MAX: f32;
    const STOCHASTIC: bool = false;
    fn round(a: f32, u: f32) -> f32;
}

pub(super) struct E2m1Nearest;
pub(super) struct E2m1Away;
pub(super) struct E2m1Stochastic;
pub(super) struct E4m3Nearest;
pub(super) struct E4m3Stochastic;

impl ElementRounding for E2m1Nearest {
    const MAX: f32 = e2m1::MAX;
    #[inline(always)]
    fn round(a: f32, _: f32) -> f32 {
        // 1.5 * 2^23 times the grid's step at a.
        let steps = step_e2m1(a) * 12_582_912.0;
        (a + steps) - steps
    }
}

impl ElementRounding for E2m1Away {
    const MAX: f32 = e2m1::MAX;
    #[inline(always)]
    fn round(a: f32, _: f32) -> f32 {
        // The grid's increments over its midpoints: four halves, two ones, a two.
        let over = |midpoint: f32, increment: f32| if a >= midpoint { increment } else { 0.0 };
        over(0.25, 0.5)
            + over(0.75, 0.5)
            + over(1.25, 0.5)
            + over(1.75, 0.5)
            + over(2.5, 1.0)
            + over(3.5, 1.0)
            + over(5.0, 2.0)
    }
}

impl ElementRounding for E2m1Stochastic {
    const MAX: f32 = e2m1::MAX;
    const STOCHASTIC: bool = true;
    #[inline(always)]
    fn round(a: f32, u: f32) -> f32 {
        let target = a + u * step_e2m1(a); // below 8
        down_to(target, step_e2m1(target))
    }
}

impl ElementRounding for E4m3Nearest {
    const MAX: f32 = e4m3::MAX;
    #[inline(always)]
    fn round(a: f32, _: f32) -> f32 {
        round_e4m3(a)
    }
}

impl ElementRounding for E4m3Stochastic {
    const MAX: f32 = e4m3::MAX;
    const STOCHASTIC: bool = true;
    #[inline(always)]
    fn round(a: f32, u: f32) -> f32 {
        let target = a + u * step_e4m3(a);
        let target = if target > e4m3::MAX { e4m3::MAX } else { target };
        down_to(target, step_e4m3(target))
    }
}

/// The E4M3 value nearest to v, 0 <= v <= 448: ties to even in the bits, without a library call.
#[inline(always)]
pub(super) fn round_e4m3(v: f32) -> f32 {
    // Below the smallest normal: multiples of 2^-9, 1.5 * 2^23 of them.
    let subnormal = (v + 24_576.0) - 24_576.0;
    let bits = v.to_bits();
    let normal = f32::from_bits(bits.wrapping_add(0x7_FFFF + (bits >> 20 & 1)) & !0xF_FFFF);
    if v < 1.0 / 64.0 { subnormal } else { normal }
}

/// The largest multiple of a power of two, well inside the normal range, that is not above `target`.
#[inline(always)]
fn down_to(target: f32, step: f32) -> f32 {
    let reciprocal = f32::from_bits(0x7F00_0000u32.wrapping_sub(step.to_bits()));
    (target * reciprocal).floor() * step
}

/// The distance of a's neighbours.
#[inline(always)]
fn step_e2m1(a: f32) -> f32 {
    let large = if a < 4.0 { 1.0 } else { 2.0 };
    if a < 2.0 { 0.5 } else { large }
}

#[inline(always)]
fn step_e4m3(a: f32) -> f32 {
    // 2^(e - 3), e the exponent of a but not below -6.
    let power = f32::from_bits(a.to_bits() & 0x7F80_0000);
    (if power < 1.0 / 64.0 { 1.0 / 64.0 } else { power }) * 0.125
}
