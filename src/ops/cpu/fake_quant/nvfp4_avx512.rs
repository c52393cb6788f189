//! The AVX-512 side of nvfp4: strips of 16 blocks of 16, whose 16 scales fill one vector.
//!
//! The code of a scaled magnitude a <= 6 is what a sum leaves in its low bits: a + C where C = 1.5 * 2^23 steps of the
//! grid at a (.5, 1 or 2) plus the codes below it (0, 2 or 4 units in the last place, all even, so that ties still go to
//! even codes). A code's value is then looked up among the block's 8, which were scaled and rounded once. Stochastically,
//! C is added to a + u step and the sum cut; C and the step are still those at a, whose grid goes on at the same step
//! until the next code.
#![allow(unsafe_code)]

use super::element::Element;
use super::scales::Scales;
use crate::numerics::e2m1::MAGNITUDES;
use std::arch::x86_64::*;

const BLOCKS: usize = 16;
const STRIP: usize = 16 * BLOCKS;

/// y of whole strips of blocks of known scales; how many elements saturated. `uniforms` [cols] in units of 2^-16, used where
/// `DRAWS`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
pub(super) fn row<T: Element, const DRAWS: bool>(x: &[T], scales: &Scales, uniforms: &[u16], out: &mut [T]) -> usize {
    let strips = x.as_chunks::<STRIP>().0.iter().zip(out.as_chunks_mut::<STRIP>().0);
    let strips = strips.zip(uniforms.as_chunks::<STRIP>().0);
    let scales = scales.encode.as_chunks::<BLOCKS>().0.iter().zip(scales.decode.as_chunks::<BLOCKS>().0);
    let mut saturated = 0usize;
    for (((x, out), u), (encode, decode)) in strips.zip(scales) {
        let (encode, decode) = (load(encode), load(decode));
        let above = match T::IS_BF16 {
            true => quantize_bf16::<T, DRAWS>(x, encode, decode, u, out),
            false => quantize_f32::<T, DRAWS>(x, encode, decode, u, out),
        };
        saturated = saturated.wrapping_add(above);
    }
    saturated
}

/// Codes 0..7 in the low 3 bits of every lane, from magnitudes scaled by E, and how many exceed 6. u: as numbers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
fn codes<const DRAWS: bool>(a: __m512, u: __m512i) -> (__m512i, u32) {
    let six = _mm512_set1_ps(6.0);
    let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, six).count_ones();
    let a = _mm512_min_ps(a, six);
    let from_one = _mm512_max_epu32(_mm512_castps_si512(a), _mm512_set1_epi32(0x3F80_0000));
    // By the low 4 bits of the exponent field: 127 (below 2) -> 15, 128 (below 4) -> 0, 129 -> 1.
    let grid = _mm512_srli_epi32::<23>(from_one);
    let table = |fine: f32, middle: f32, coarse: f32| {
        let mut table = [0.0; 16];
        (table[15], table[0], table[1]) = (fine, middle, coarse);
        _mm512_permutexvar_ps(grid, load(&table))
    };
    let c = table(6_291_456.0, f32::from_bits(0x4B40_0002), f32::from_bits(0x4BC0_0004));
    if !DRAWS {
        return (_mm512_castps_si512(_mm512_add_ps(a, c)), above);
    }
    let unit = table(0.5 / 65_536.0, 1.0 / 65_536.0, 2.0 / 65_536.0);
    let target = _mm512_fmadd_ps(_mm512_cvtepi32_ps(u), unit, a);
    let cut = _mm512_add_round_ps::<{ _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC }>(target, c);
    (_mm512_castps_si512(cut), above)
}

/// The 8 magnitudes, twice.
#[inline]
#[target_feature(enable = "avx512f")]
fn magnitudes() -> __m512 {
    let mut twice = [0.0; 16];
    twice[..8].copy_from_slice(&MAGNITUDES);
    twice[8..].copy_from_slice(&MAGNITUDES);
    load(&twice)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(values: &[f32; 16]) -> __m512 {
    // SAFETY: 16 values; the load needs no alignment.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
fn quantize_f32<T: Element, const DRAWS: bool>(
    x: &[T; STRIP],
    encode: __m512,
    decode: __m512,
    uniforms: &[u16; STRIP],
    out: &mut [T; STRIP],
) -> usize {
    debug_assert!(!T::IS_BF16);
    let mut saturated = 0usize;
    let mut block = _mm512_setzero_si512();
    for at in (0..STRIP).step_by(16) {
        // SAFETY: 16 f32 values and uniforms from `at` on lie within the strip; the loads need no alignment.
        let (v, u) = unsafe {
            (_mm512_loadu_ps(x.as_ptr().add(at).cast()), _mm256_loadu_si256(uniforms.as_ptr().add(at).cast()))
        };
        let (encode, decode) = (_mm512_permutexvar_ps(block, encode), _mm512_permutexvar_ps(block, decode));
        block = _mm512_add_epi32(block, _mm512_set1_epi32(1));
        let (codes, above) = codes::<DRAWS>(_mm512_abs_ps(_mm512_mul_ps(v, encode)), _mm512_cvtepu16_epi32(u));
        saturated = saturated.wrapping_add(above as usize);
        let y = _mm512_permutexvar_ps(codes, _mm512_mul_ps(magnitudes(), decode));
        let y = _mm512_or_ps(y, _mm512_and_ps(v, _mm512_set1_ps(-0.0)));
        // SAFETY: as the load.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(at).cast(), y) };
    }
    saturated
}

/// Two blocks at a time: 32 values of 16 bits, widened as the even and the odd ones.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
fn quantize_bf16<T: Element, const DRAWS: bool>(
    x: &[T; STRIP],
    encode: __m512,
    decode: __m512,
    uniforms: &[u16; STRIP],
    out: &mut [T; STRIP],
) -> usize {
    debug_assert!(T::IS_BF16);
    let (magnitude, lower) = (_mm512_set1_epi16(0x7FFF), _mm512_set1_epi32(0xFFFF));
    let mut saturated = 0usize;
    // Lanes 0-7 hold the first block of a pair, 8-15 the second.
    let second = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi16(8));
    let mut block = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi32(1));
    for at in (0..STRIP).step_by(32) {
        // SAFETY: 32 bf16 values and uniforms from `at` on lie within the strip; the loads need no alignment.
        let (v, u) = unsafe {
            (_mm512_loadu_si512(x.as_ptr().add(at).cast()), _mm512_loadu_si512(uniforms.as_ptr().add(at).cast()))
        };
        let m = _mm512_and_si512(v, magnitude);
        let (encode, decode) = (_mm512_permutexvar_ps(block, encode), _mm512_permutexvar_ps(block, decode));
        block = _mm512_add_epi32(block, _mm512_set1_epi32(2));
        let even = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(m));
        let odd = _mm512_castsi512_ps(_mm512_andnot_si512(lower, m));
        let (even, even_above) = codes::<DRAWS>(_mm512_mul_ps(even, encode), _mm512_and_si512(u, lower));
        let (odd, odd_above) = codes::<DRAWS>(_mm512_mul_ps(odd, encode), _mm512_srli_epi32::<16>(u));
        saturated = saturated.wrapping_add(even_above.wrapping_add(odd_above) as usize);
        let codes = _mm512_mask_blend_epi16(0xAAAA_AAAA, even, _mm512_slli_epi32::<16>(odd));
        // (codes & 7) | second
        let codes = _mm512_ternarylogic_epi32::<0xEA>(_mm512_set1_epi16(7), codes, second);
        let values = rounded_bf16(_mm512_mul_ps(magnitudes(), decode));
        let y = _mm512_permutexvar_epi16(codes, _mm512_castsi256_si512(values));
        // The sign of v.
        let y = _mm512_ternarylogic_epi32::<0xE4>(y, v, magnitude);
        // SAFETY: as the load.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().add(at).cast(), y) };
    }
    saturated
}

/// 16 finite values to bf16, to nearest even.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
fn rounded_bf16(v: __m512) -> __m256i {
    let bits = _mm512_castps_si512(v);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF));
    _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded))
}
