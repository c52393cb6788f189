//! The AVX2 side of nvfp4, block by block. Codes and values as in nvfp4_avx512.rs: a code is what a sum leaves in its low
//! bits, its value one of the block's 8.
#![allow(unsafe_code)]

use super::element::Element;
use super::scales::Scales;
use crate::numerics::e2m1::MAGNITUDES;
use std::arch::x86_64::*;

const BLOCK: usize = 16;

/// As in nvfp4_avx512.rs.
#[target_feature(enable = "avx2,fma,popcnt")]
pub(super) fn row<T: Element, const DRAWS: bool>(x: &[T], scales: &Scales, uniforms: &[u16], out: &mut [T]) -> usize {
    let blocks = x.as_chunks::<BLOCK>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0);
    let blocks = blocks.zip(uniforms.as_chunks::<BLOCK>().0);
    let mut saturated = 0usize;
    for (((x, out), u), (encode, decode)) in blocks.zip(scales.encode.iter().zip(&scales.decode)) {
        let (encode, decode) = (_mm256_set1_ps(*encode), _mm256_set1_ps(*decode));
        let values = _mm256_mul_ps(load(&MAGNITUDES), decode);
        let above = match T::IS_BF16 {
            true => quantize_bf16::<T, DRAWS>(x, encode, values, u, out),
            false => quantize_f32::<T, DRAWS>(x, encode, values, u, out),
        };
        saturated = saturated.wrapping_add(above as usize);
    }
    saturated
}

/// Codes 0..7 in the low 3 bits of every lane, from magnitudes scaled by E, and how many exceed 6. u: as numbers.
#[inline]
#[target_feature(enable = "avx2,fma,popcnt")]
fn codes<const DRAWS: bool>(a: __m256, u: __m256i) -> (__m256i, u32) {
    let six = _mm256_set1_ps(6.0);
    let above = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a, six)).count_ones();
    let a = _mm256_min_ps(a, six);
    let from_one = _mm256_castps_si256(_mm256_max_ps(a, _mm256_set1_ps(1.0)));
    // By the low 3 bits of the exponent field: 127 (below 2) -> 7, 128 (below 4) -> 0, 129 -> 1.
    let grid = _mm256_srli_epi32::<23>(from_one);
    let table = |fine: f32, middle: f32, coarse: f32| {
        _mm256_permutevar8x32_ps(load(&[middle, coarse, 0.0, 0.0, 0.0, 0.0, 0.0, fine]), grid)
    };
    let c = table(6_291_456.0, f32::from_bits(0x4B40_0002), f32::from_bits(0x4BC0_0004));
    if !DRAWS {
        return (_mm256_castps_si256(_mm256_add_ps(a, c)), above);
    }
    let unit = table(0.5 / 65_536.0, 1.0 / 65_536.0, 2.0 / 65_536.0);
    let target = _mm256_fmadd_ps(_mm256_cvtepi32_ps(u), unit, a);
    // Rounded to nearest, and one less where that went up.
    let sum = _mm256_add_ps(target, c);
    let up = _mm256_cmp_ps::<_CMP_GT_OQ>(_mm256_sub_ps(sum, c), target);
    (_mm256_add_epi32(_mm256_castps_si256(sum), _mm256_castps_si256(up)), above)
}

/// A block; returns how many elements exceed 6.
#[inline]
#[target_feature(enable = "avx2,fma,popcnt")]
fn quantize_f32<T: Element, const DRAWS: bool>(
    x: &[T; BLOCK],
    encode: __m256,
    values: __m256,
    uniforms: &[u16; BLOCK],
    out: &mut [T; BLOCK],
) -> u32 {
    debug_assert!(!T::IS_BF16);
    let sign = _mm256_set1_ps(-0.0);
    let mut saturated = 0u32;
    for at in [0, 8] {
        // SAFETY: 8 f32 values and uniforms from `at` on lie within the block; the loads need no alignment.
        let (v, u) =
            unsafe { (_mm256_loadu_ps(x.as_ptr().add(at).cast()), _mm_loadu_si128(uniforms.as_ptr().add(at).cast())) };
        let a = _mm256_andnot_ps(sign, _mm256_mul_ps(v, encode));
        let (codes, above) = codes::<DRAWS>(a, _mm256_cvtepu16_epi32(u));
        saturated = saturated.wrapping_add(above);
        let y = _mm256_or_ps(_mm256_permutevar8x32_ps(values, codes), _mm256_and_ps(v, sign));
        // SAFETY: as the load.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(at).cast(), y) };
    }
    saturated
}

/// A block: 16 values of 16 bits, widened as the even and the odd ones.
#[inline]
#[target_feature(enable = "avx2,fma,popcnt")]
fn quantize_bf16<T: Element, const DRAWS: bool>(
    x: &[T; BLOCK],
    encode: __m256,
    values: __m256,
    uniforms: &[u16; BLOCK],
    out: &mut [T; BLOCK],
) -> u32 {
    debug_assert!(T::IS_BF16);
    // The values to bf16, to nearest even, in the high halves.
    let bits = _mm256_castps_si256(values);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7FFF));
    let high = _mm256_set1_epi32(0xFFFF_0000u32 as i32);
    let values = _mm256_castsi256_ps(_mm256_and_si256(rounded, high));
    // SAFETY: 16 bf16 values and uniforms; the loads need no alignment.
    let (v, u) = unsafe { (_mm256_loadu_si256(x.as_ptr().cast()), _mm256_loadu_si256(uniforms.as_ptr().cast())) };
    let m = _mm256_and_si256(v, _mm256_set1_epi16(0x7FFF));
    let widened = |bits: __m256i| _mm256_mul_ps(_mm256_castsi256_ps(bits), encode);
    let (even, even_above) = codes::<DRAWS>(widened(_mm256_slli_epi32::<16>(m)), _mm256_andnot_si256(high, u));
    let (odd, odd_above) = codes::<DRAWS>(widened(_mm256_and_si256(m, high)), _mm256_srli_epi32::<16>(u));
    let even = _mm256_castps_si256(_mm256_permutevar8x32_ps(values, even));
    let odd = _mm256_castps_si256(_mm256_permutevar8x32_ps(values, odd));
    let y = _mm256_or_si256(_mm256_srli_epi32::<16>(even), odd);
    let y = _mm256_or_si256(y, _mm256_andnot_si256(_mm256_set1_epi16(0x7FFF), v));
    // SAFETY: as the load.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), y) };
    even_above.wrapping_add(odd_above)
}

#[inline]
#[target_feature(enable = "avx2,fma,popcnt")]
fn load(values: &[f32; 8]) -> __m256 {
    // SAFETY: 8 values; the load needs no alignment.
    unsafe { _mm256_loadu_ps(values.as_ptr()) }
}
