//! FP8: a row of E4M3 under one scale s, x / s -> value * s, without a division for each element.

use super::amaxes::largest;
use super::element::{Element, UNIT, Word};
use super::lanes;
use super::rounders::E4m3Divided;
use crate::numerics::block_scale::fp8_scale;
use crate::numerics::e4m3;
use crate::ops::cpu::path::{Path, for_each_path};

/// y of a row; (1 if it holds NaN or infinity, saturated elements). `tensor`: the amax that s follows from, if it is not
/// the row's.
pub(super) fn row<T: Element>(path: Path, x: &[T], tensor: Option<f32>, out: &mut [T]) -> (usize, usize) {
    let amax = largest::<T>(path, x);
    if amax >= T::Word::of(T::INFINITY) {
        out.fill(T::NAN);
        return (1, 0);
    }
    let amax = T::of_word(amax).read();
    let s = fp8_scale(tensor.unwrap_or(amax));
    // Where nothing that matters under- or overflows on the way to a quotient, and fused multiply-adds are instructions.
    let is_plain = (1e-24..1e24).contains(&s) && amax / s < 1e6 && path.or_below() != Path::Portable;
    let saturated = match (is_plain, amax / s > e4m3::MAX) {
        (false, _) => divided::<T>(path, x, s, out),
        (true, false) => within::<T>(path, x, s, out),
        (true, true) => saturating::<T>(path, x, s, out),
    };
    (0, saturated)
}

for_each_path! {
    /// Any row; how many elements saturate.
    fn divided<T: Element>(x: &[T], s: f32, out: &mut [T]) -> usize {
        map_row(x, out, |a| {
            let (value, above) = lanes::value::<E4m3Divided>(a, s, 0);
            (value * s, above)
        })
    }
}

for_each_path! {
    /// A plain row of which nothing saturates; 0.
    fn within<T: Element>(x: &[T], s: f32, out: &mut [T]) -> usize {
        let r = 1.0 / s;
        map_row(x, out, |a| (nearest(quotient(a, s, r)) * s, false))
    }
}

for_each_path! {
    /// A plain row; how many elements saturate.
    fn saturating<T: Element>(x: &[T], s: f32, out: &mut [T]) -> usize {
        let r = 1.0 / s;
        map_row(x, out, |a| {
            let q = quotient(a, s, r);
            (nearest(if q > e4m3::MAX { e4m3::MAX } else { q }) * s, q > e4m3::MAX)
        })
    }
}

/// The magnitudes of x through f(a) = (y, whether it saturates); how many do.
#[inline(always)]
fn map_row<T: Element>(x: &[T], out: &mut [T], f: impl Fn(f32) -> (f32, bool)) -> usize {
    let ((units, tail), (out_units, out_tail)) = (x.as_chunks::<UNIT>(), out.as_chunks_mut::<UNIT>());
    let mut lanes = [0u32; UNIT];
    for (x, out) in units.iter().zip(out_units) {
        *out = map_unit(x, &f, &mut lanes);
    }
    if !tail.is_empty() {
        let mut x = [T::ZERO; UNIT];
        x[..tail.len()].copy_from_slice(tail);
        out_tail.copy_from_slice(&map_unit(&x, &f, &mut lanes)[..tail.len()]);
    }
    lanes.iter().map(|lane| *lane as usize).sum()
}

#[inline(always)]
fn map_unit<T: Element>(x: &[T; UNIT], f: impl Fn(f32) -> (f32, bool), lanes: &mut [u32; UNIT]) -> [T; UNIT] {
    let mut words = T::words(x);
    for (word, lane) in words.as_mut().iter_mut().zip(lanes) {
        let mut count = *lane;
        *word = T::map(*word, 0, |a, _| {
            let (y, above) = f(a);
            count = count.wrapping_add(above as u32);
            y
        });
        *lane = count;
    }
    T::of_words(words)
}

/// a / s, correctly rounded, from r = 1 / s, rounded (Markstein, IBM J. Res. Dev. 34, 1990), a and s being normal.
///
/// The remainder a - q0 s is exact, where q0 is off by at most an ulp u of the quotient. Whether the last sum comes to
/// lie above or below the midpoint q0 + u/2 is as for the quotient: near it the remainder is s u/2 + k w with w half the
/// product of the ulps of q0 and s, k an integer and not 0, since no quotient is a midpoint; and times r that is
/// u/2 + k w r + (s r - 1) u/2, whose last term is less than w r. Below 1, with s near 2, q0 may be off by more than u, but
/// then the quotient is far from any other midpoint.
#[inline(always)]
fn quotient(a: f32, s: f32, r: f32) -> f32 {
    let q0 = a * r;
    q0.mul_add(-s, a).mul_add(r, q0)
}

/// The E4M3 value nearest to q, 0 <= q, of any size: adding and subtracting 1.5 * 2^20 times the binade rounds to its eighths.
#[inline(always)]
fn nearest(q: f32) -> f32 {
    let normal = if q > 1.0 / 64.0 { q } else { 1.0 / 64.0 };
    let binade = f32::from_bits(normal.to_bits() & 0x7F80_0000);
    binade.mul_add(-1_572_864.0, binade.mul_add(1_572_864.0, q))
}

#[cfg(test)]
mod tests {
    use super::quotient;

    #[test]
    fn quotients_are_correctly_rounded() {
        let significand = |bits: u32| f32::from_bits(0x3F80_0000 | bits & 0x7F_FFFF);
        let mut state = 1u64;
        for i in 0..1_000_000u32 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (high, low) = ((state >> 32) as u32, (state >> 9) as u32);
            // Any; all of bf16; near 2; near midpoints.
            let s = significand(if i % 2 == 0 { low } else { 0x7F_FFFF - (low & 0x3FFF) });
            let midpoint = f64::from(2 * (1 << 24 | high & 0x7F_FFFF) + 1) * f64::from(s);
            for a in [high, i << 16, 0x7F_FFFF - (high & 0x3FFF), (midpoint as f32).to_bits()] {
                let a = significand(a);
                assert_eq!(quotient(a, s, 1.0 / s), a / s, "{a:e} / {s:e}");
            }
        }
    }
}
