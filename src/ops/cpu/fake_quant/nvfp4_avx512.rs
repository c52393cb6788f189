//! The AVX-512 side of nvfp4: strips of 16 blocks of 16, whose 16 scales fill one vector.
//!
//! The code of a scaled magnitude a <= 6 is what a sum leaves in its low bits: a + C where C = 1.5 * 2^23 steps of the
//! grid at a (.5, 1 or 2) plus the codes below it (0, 2 or 4 units in the last place, all even, so that ties still go to
//! even codes). A code's value is then looked up among the block's 8, which were scaled and rounded once.
#![allow(unsafe_code)]

use super::element::{Element, Word};
use super::nvfp4::portable_row;
use crate::numerics::e2m1::MAGNITUDES;
use std::arch::x86_64::*;

const BLOCKS: usize = 16;
const STRIP: usize = 16 * BLOCKS;

/// The amax of every block of a row, as bits.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
pub(super) fn row_amaxes<T: Element>(x: &[T], amaxes: &mut [T::Word]) {
    let (strips, tail) = x.as_chunks::<STRIP>();
    let (whole, last) = amaxes.as_chunks_mut::<BLOCKS>();
    for (x, amaxes) in strips.iter().zip(&mut *whole) {
        strip_amaxes(x, amaxes);
    }
    if !tail.is_empty() {
        let mut of_padded = [T::Word::ZERO; BLOCKS];
        strip_amaxes(&padded(tail), &mut of_padded);
        last.copy_from_slice(&of_padded[..last.len()]);
    }
}

/// y of a row of blocks of known amax under G; how many elements saturated.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
pub(super) fn row<T: Element>(x: &[T], amaxes: &[T::Word], g: f32, out: &mut [T]) -> usize {
    let (strips, tail) = x.as_chunks::<STRIP>();
    let (out_strips, out_tail) = out.as_chunks_mut::<STRIP>();
    let (whole, last) = amaxes.as_chunks::<BLOCKS>();
    let mut saturated = 0usize;
    for ((x, amaxes), out) in strips.iter().zip(whole).zip(out_strips) {
        saturated = saturated.wrapping_add(strip(x, amaxes, g, out));
    }
    if !tail.is_empty() {
        let (mut amaxes, mut y) = ([T::Word::ZERO; BLOCKS], [T::ZERO; STRIP]);
        amaxes[..last.len()].copy_from_slice(last);
        saturated = saturated.wrapping_add(strip(&padded(tail), &amaxes, g, &mut y));
        out_tail.copy_from_slice(&y[..tail.len()]);
    }
    saturated
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
fn strip_amaxes<T: Element>(x: &[T; STRIP], amaxes: &mut [T::Word; BLOCKS]) {
    if T::IS_BF16 {
        // SAFETY: IS_BF16 says that amaxes is 16 words of 16 bits; the store needs no alignment.
        unsafe { _mm256_storeu_si256(amaxes.as_mut_ptr().cast(), _mm512_cvtepi32_epi16(amax_bf16(x))) };
    } else {
        // SAFETY: amaxes is 16 words of 32 bits; the store needs no alignment.
        unsafe { _mm512_storeu_si512(amaxes.as_mut_ptr().cast(), amax_f32(x)) };
    }
}

/// Bits, as f32, of the amaxes of a strip.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
fn widened_amaxes<T: Element>(amaxes: &[T::Word; BLOCKS]) -> __m512i {
    if T::IS_BF16 {
        // SAFETY: IS_BF16 says that amaxes is 16 words of 16 bits; the load needs no alignment.
        let words = unsafe { _mm256_loadu_si256(amaxes.as_ptr().cast()) };
        _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(words))
    } else {
        // SAFETY: amaxes is 16 words of 32 bits; the load needs no alignment.
        unsafe { _mm512_loadu_si512(amaxes.as_ptr().cast()) }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
fn strip<T: Element>(x: &[T; STRIP], amaxes: &[T::Word; BLOCKS], g: f32, out: &mut [T; STRIP]) -> usize {
    let amax = widened_amaxes::<T>(amaxes);
    if _mm512_cmpge_epu32_mask(amax, _mm512_set1_epi32(f32::INFINITY.to_bits() as i32)) != 0 {
        return portable_row(x, amaxes, g, out);
    }
    let (encode, decode) = block_scales(_mm512_castsi512_ps(amax), g);
    match T::IS_BF16 {
        true => quantize_bf16(x, encode, decode, out),
        false => quantize_f32(x, encode, decode, out),
    }
}

/// (E, S * D) of 16 blocks, as scales.rs has them for one.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
fn block_scales(amax: __m512, g: f32) -> (__m512, __m512) {
    let all = |v: f32| _mm512_set1_ps(v);
    let v = _mm512_min_ps(_mm512_mul_ps(amax, all(g * (1.0 / 6.0))), all(448.0));
    // To E4M3: multiples of 2^-9 below 2^-6, else 3 mantissa bits.
    let small = _mm512_sub_ps(_mm512_add_ps(v, all(24_576.0)), all(24_576.0));
    let bits = _mm512_castps_si512(v);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<20>(bits), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7_FFFF));
    let large = _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(!0xF_FFFF)));
    let s = _mm512_mask_mov_ps(large, _mm512_cmp_ps_mask::<_CMP_LT_OQ>(v, all(1.0 / 64.0)), small);
    let decode = _mm512_mul_ps(s, all(1.0 / g));
    let nonzero = _mm512_cmp_ps_mask::<_CMP_NEQ_OQ>(s, all(0.0));
    (_mm512_maskz_min_ps(nonzero, _mm512_div_ps(all(1.0), decode), all(f32::MAX)), decode)
}

/// Codes 0..7 in the low 3 bits of every lane, from magnitudes scaled by E, and how many exceed 6.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
fn codes(a: __m512) -> (__m512i, u32) {
    let six = _mm512_set1_ps(6.0);
    let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, six);
    let a = _mm512_min_ps(a, six);
    let from_one = _mm512_max_epu32(_mm512_castps_si512(a), _mm512_set1_epi32(0x3F80_0000));
    // C by the low 4 bits of the exponent field: 127 (below 2) -> 15, 128 (below 4) -> 0, 129 -> 1.
    let (middle, coarse) = (f32::from_bits(0x4B40_0002), f32::from_bits(0x4BC0_0004));
    let mut table = [0.0; 16];
    (table[15], table[0], table[1]) = (6_291_456.0, middle, coarse);
    let table = load(&table);
    let c = _mm512_permutexvar_ps(_mm512_srli_epi32::<23>(from_one), table);
    (_mm512_castps_si512(_mm512_add_ps(a, c)), above.count_ones())
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
fn quantize_f32<T: Element>(x: &[T; STRIP], encode: __m512, decode: __m512, out: &mut [T; STRIP]) -> usize {
    debug_assert!(!T::IS_BF16);
    let mut saturated = 0usize;
    let mut block = _mm512_setzero_si512();
    for at in (0..STRIP).step_by(16) {
        // SAFETY: 16 f32 values from `at` on lie within the strip; the load needs no alignment.
        let v = unsafe { _mm512_loadu_ps(x.as_ptr().add(at).cast()) };
        let (encode, decode) = (_mm512_permutexvar_ps(block, encode), _mm512_permutexvar_ps(block, decode));
        block = _mm512_add_epi32(block, _mm512_set1_epi32(1));
        let (codes, above) = codes(_mm512_abs_ps(_mm512_mul_ps(v, encode)));
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
fn quantize_bf16<T: Element>(x: &[T; STRIP], encode: __m512, decode: __m512, out: &mut [T; STRIP]) -> usize {
    debug_assert!(T::IS_BF16);
    let magnitude = _mm512_set1_epi16(0x7FFF);
    let mut saturated = 0usize;
    // Lanes 0-7 hold the first block of a pair, 8-15 the second.
    let second = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi16(8));
    let mut block = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi32(1));
    for at in (0..STRIP).step_by(32) {
        // SAFETY: 32 bf16 values from `at` on lie within the strip; the load needs no alignment.
        let v = unsafe { _mm512_loadu_si512(x.as_ptr().add(at).cast()) };
        let m = _mm512_and_si512(v, magnitude);
        let (encode, decode) = (_mm512_permutexvar_ps(block, encode), _mm512_permutexvar_ps(block, decode));
        block = _mm512_add_epi32(block, _mm512_set1_epi32(2));
        let even = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(m));
        let odd = _mm512_castsi512_ps(_mm512_and_si512(m, _mm512_set1_epi32(0xFFFF_0000u32 as i32)));
        let (even, even_above) = codes(_mm512_mul_ps(even, encode));
        let (odd, odd_above) = codes(_mm512_mul_ps(odd, encode));
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

/// Bits of the amax of each of 16 blocks, in the low half of its lane: the halves of pairs of vectors change places until every lane has its block.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
fn amax_bf16<T: Element>(x: &[T; STRIP]) -> __m512i {
    debug_assert!(T::IS_BF16);
    let mut pairs = [_mm512_setzero_si512(); 8]; // two blocks each
    for (i, pair) in pairs.iter_mut().enumerate() {
        // SAFETY: 32 bf16 values from 32 i on lie within the strip; the load needs no alignment.
        let v = unsafe { _mm512_loadu_si512(x.as_ptr().add(32 * i).cast()) };
        *pair = _mm512_and_si512(v, _mm512_set1_epi16(0x7FFF));
    }
    let mut fours = [_mm512_setzero_si512(); 4]; // a block each 128 bits
    for (i, four) in fours.iter_mut().enumerate() {
        let (a, b) = (pairs[2 * i], pairs[2 * i + 1]);
        let (first, second) =
            (_mm512_shuffle_i64x2::<0b10_00_10_00>(a, b), _mm512_shuffle_i64x2::<0b11_01_11_01>(a, b));
        *four = _mm512_max_epu16(first, second);
    }
    let halves = |a, b| _mm512_max_epu16(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    let (evens, odds) = evens_and_odds(halves(fours[0], fours[1]), halves(fours[2], fours[3]));
    let all = _mm512_max_epu16(evens, odds);
    // The larger half of every lane.
    in_order(_mm512_max_epu16(all, _mm512_srli_epi32::<16>(all)))
}

/// The even and the odd 32-bit lanes of a and b, 128 bits by 128 bits.
#[inline]
#[target_feature(enable = "avx512f")]
fn evens_and_odds(a: __m512i, b: __m512i) -> (__m512i, __m512i) {
    let (a, b) = (_mm512_castsi512_ps(a), _mm512_castsi512_ps(b));
    let evens = _mm512_castps_si512(_mm512_shuffle_ps::<0b10_00_10_00>(a, b));
    (evens, _mm512_castps_si512(_mm512_shuffle_ps::<0b11_01_11_01>(a, b)))
}

/// From lane 4 l + d holding block 4 d + l to lane j holding block j.
#[inline]
#[target_feature(enable = "avx512f")]
fn in_order(v: __m512i) -> __m512i {
    _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v)
}

/// `amax_bf16` of f32, in the whole lane.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
fn amax_f32<T: Element>(x: &[T; STRIP]) -> __m512i {
    debug_assert!(!T::IS_BF16);
    let block = |block: usize| {
        // SAFETY: 16 f32 values from 16 block on lie within the strip; the load needs no alignment.
        let v = unsafe { _mm512_loadu_si512(x.as_ptr().add(16 * block).cast()) };
        _mm512_and_si512(v, _mm512_set1_epi32(0x7FFF_FFFF))
    };
    let mut fours = [_mm512_setzero_si512(); 4]; // a block each 128 bits
    for (i, four) in fours.iter_mut().enumerate() {
        let halves = |a, b| {
            let (first, second) =
                (_mm512_shuffle_i64x2::<0b10_00_10_00>(a, b), _mm512_shuffle_i64x2::<0b11_01_11_01>(a, b));
            _mm512_max_epu32(first, second) // a block each 256 bits
        };
        let (a, b) = (halves(block(4 * i), block(4 * i + 1)), halves(block(4 * i + 2), block(4 * i + 3)));
        *four = halves(a, b);
    }
    let halves = |a, b| _mm512_max_epu32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    let (evens, odds) = evens_and_odds(halves(fours[0], fours[1]), halves(fours[2], fours[3]));
    in_order(_mm512_max_epu32(evens, odds))
}

/// The rest of a row as a strip.
#[inline]
fn padded<T: Element>(tail: &[T]) -> [T; STRIP] {
    let mut strip = [T::ZERO; STRIP];
    strip[..tail.len()].copy_from_slice(tail);
    strip
}
