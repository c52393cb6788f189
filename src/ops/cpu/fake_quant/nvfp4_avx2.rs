//! The AVX2 side of nvfp4: strips of 8 blocks of 16, whose 8 scales fill one vector. Codes and values as in
//! nvfp4_avx512.rs: a code is what a sum leaves in its low bits, its value one of the block's 8.
#![allow(unsafe_code)]

use super::element::{Element, Word};
use super::nvfp4::portable_row;
use crate::numerics::e2m1::MAGNITUDES;
use std::arch::x86_64::*;

const BLOCK: usize = 16;
const BLOCKS: usize = 8;
const STRIP: usize = BLOCKS * BLOCK;

/// The amax of every block of a row, as bits.
#[target_feature(enable = "avx2,popcnt")]
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
#[target_feature(enable = "avx2,popcnt")]
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
#[target_feature(enable = "avx2,popcnt")]
fn strip_amaxes<T: Element>(x: &[T; STRIP], amaxes: &mut [T::Word; BLOCKS]) {
    if T::IS_BF16 {
        let all = amax_bf16(x);
        let words = _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256::<1>(all));
        // SAFETY: IS_BF16 says that amaxes is 8 words of 16 bits; the store needs no alignment.
        unsafe { _mm_storeu_si128(amaxes.as_mut_ptr().cast(), words) };
    } else {
        // SAFETY: amaxes is 8 words of 32 bits; the store needs no alignment.
        unsafe { _mm256_storeu_si256(amaxes.as_mut_ptr().cast(), amax_f32(x)) };
    }
}

/// Bits, as f32, of the amaxes of a strip.
#[inline]
#[target_feature(enable = "avx2,popcnt")]
fn widened_amaxes<T: Element>(amaxes: &[T::Word; BLOCKS]) -> __m256i {
    if T::IS_BF16 {
        // SAFETY: IS_BF16 says that amaxes is 8 words of 16 bits; the load needs no alignment.
        let words = unsafe { _mm_loadu_si128(amaxes.as_ptr().cast()) };
        _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(words))
    } else {
        // SAFETY: amaxes is 8 words of 32 bits; the load needs no alignment.
        unsafe { _mm256_loadu_si256(amaxes.as_ptr().cast()) }
    }
}

#[inline]
#[target_feature(enable = "avx2,popcnt")]
fn strip<T: Element>(x: &[T; STRIP], amaxes: &[T::Word; BLOCKS], g: f32, out: &mut [T; STRIP]) -> usize {
    let amax = widened_amaxes::<T>(amaxes);
    if _mm256_movemask_epi8(_mm256_cmpgt_epi32(amax, _mm256_set1_epi32(f32::INFINITY.to_bits() as i32 - 1))) != 0 {
        return portable_row(x, amaxes, g, out);
    }
    let (encode, decode) = block_scales(_mm256_castsi256_ps(amax), g);
    let (mut encodes, mut decodes) = ([0.0; BLOCKS], [0.0; BLOCKS]);
    store(encode, &mut encodes);
    store(decode, &mut decodes);
    let (x, _) = x.as_chunks::<BLOCK>();
    let (out, _) = out.as_chunks_mut::<BLOCK>();
    let mut saturated = 0usize;
    for block in 0..BLOCKS {
        let (encode, decode) = (_mm256_set1_ps(encodes[block]), _mm256_set1_ps(decodes[block]));
        let values = _mm256_mul_ps(load(&MAGNITUDES), decode);
        let above = match T::IS_BF16 {
            true => quantize_bf16(&x[block], encode, values, &mut out[block]),
            false => quantize_f32(&x[block], encode, values, &mut out[block]),
        };
        saturated = saturated.wrapping_add(above as usize);
    }
    saturated
}

/// (E, S * D) of 8 blocks, as scales.rs has them for one.
#[inline]
#[target_feature(enable = "avx2,popcnt")]
fn block_scales(amax: __m256, g: f32) -> (__m256, __m256) {
    let all = |v: f32| _mm256_set1_ps(v);
    let v = _mm256_min_ps(_mm256_mul_ps(amax, all(g * (1.0 / 6.0))), all(448.0));
    // To E4M3: multiples of 2^-9 below 2^-6, else 3 mantissa bits.
    let small = _mm256_sub_ps(_mm256_add_ps(v, all(24_576.0)), all(24_576.0));
    let bits = _mm256_castps_si256(v);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<20>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7_FFFF));
    let large = _mm256_castsi256_ps(_mm256_and_si256(rounded, _mm256_set1_epi32(!0xF_FFFF)));
    let s = _mm256_blendv_ps(large, small, _mm256_cmp_ps::<_CMP_LT_OQ>(v, all(1.0 / 64.0)));
    let decode = _mm256_mul_ps(s, all(1.0 / g));
    let nonzero = _mm256_cmp_ps::<_CMP_NEQ_OQ>(s, all(0.0));
    let encode = _mm256_min_ps(_mm256_div_ps(all(1.0), decode), all(f32::MAX));
    (_mm256_and_ps(encode, nonzero), decode)
}

/// Codes 0..7 in the low 3 bits of every lane, from magnitudes scaled by E, and how many exceed 6.
#[inline]
#[target_feature(enable = "avx2,popcnt")]
fn codes(a: __m256) -> (__m256i, u32) {
    let six = _mm256_set1_ps(6.0);
    let above = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a, six)) as u32;
    let a = _mm256_min_ps(a, six);
    let from_one = _mm256_castps_si256(_mm256_max_ps(a, _mm256_set1_ps(1.0)));
    // C by the low 3 bits of the exponent field: 127 (below 2) -> 7, 128 (below 4) -> 0, 129 -> 1.
    let (middle, coarse) = (f32::from_bits(0x4B40_0002), f32::from_bits(0x4BC0_0004));
    let table = load(&[middle, coarse, 0.0, 0.0, 0.0, 0.0, 0.0, 6_291_456.0]);
    let c = _mm256_permutevar8x32_ps(table, _mm256_srli_epi32::<23>(from_one));
    (_mm256_castps_si256(_mm256_add_ps(a, c)), above.count_ones())
}

/// A block; returns how many elements exceed 6.
#[inline]
#[target_feature(enable = "avx2,popcnt")]
fn quantize_f32<T: Element>(x: &[T; BLOCK], encode: __m256, values: __m256, out: &mut [T; BLOCK]) -> u32 {
    debug_assert!(!T::IS_BF16);
    let sign = _mm256_set1_ps(-0.0);
    let mut saturated = 0u32;
    for at in [0, 8] {
        // SAFETY: 8 f32 values from `at` on lie within the block; the load needs no alignment.
        let v = unsafe { _mm256_loadu_ps(x.as_ptr().add(at).cast()) };
        let (codes, above) = codes(_mm256_andnot_ps(sign, _mm256_mul_ps(v, encode)));
        saturated = saturated.wrapping_add(above);
        let y = _mm256_or_ps(_mm256_permutevar8x32_ps(values, codes), _mm256_and_ps(v, sign));
        // SAFETY: as the load.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(at).cast(), y) };
    }
    saturated
}

/// A block: 16 values of 16 bits, widened as the even and the odd ones.
#[inline]
#[target_feature(enable = "avx2,popcnt")]
fn quantize_bf16<T: Element>(x: &[T; BLOCK], encode: __m256, values: __m256, out: &mut [T; BLOCK]) -> u32 {
    debug_assert!(T::IS_BF16);
    // The values to bf16, to nearest even, in the high halves.
    let bits = _mm256_castps_si256(values);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7FFF));
    let high = _mm256_set1_epi32(0xFFFF_0000u32 as i32);
    let values = _mm256_castsi256_ps(_mm256_and_si256(rounded, high));
    // SAFETY: 16 bf16 values; the load needs no alignment.
    let v = unsafe { _mm256_loadu_si256(x.as_ptr().cast()) };
    let m = _mm256_and_si256(v, _mm256_set1_epi16(0x7FFF));
    let widened = |bits: __m256i| _mm256_mul_ps(_mm256_castsi256_ps(bits), encode);
    let (even, even_above) = codes(widened(_mm256_slli_epi32::<16>(m)));
    let (odd, odd_above) = codes(widened(_mm256_and_si256(m, high)));
    let even = _mm256_castps_si256(_mm256_permutevar8x32_ps(values, even));
    let odd = _mm256_castps_si256(_mm256_permutevar8x32_ps(values, odd));
    let y = _mm256_or_si256(_mm256_srli_epi32::<16>(even), odd);
    let y = _mm256_or_si256(y, _mm256_andnot_si256(_mm256_set1_epi16(0x7FFF), v));
    // SAFETY: as the load.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), y) };
    even_above.wrapping_add(odd_above)
}

/// Bits of the amax of each of 8 blocks, in the low half of its lane: the halves of pairs of vectors change places until every lane has its block.
#[inline]
#[target_feature(enable = "avx2,popcnt")]
fn amax_bf16<T: Element>(x: &[T; STRIP]) -> __m256i {
    debug_assert!(T::IS_BF16);
    let block = |block: usize| {
        // SAFETY: 16 bf16 values from 16 block on lie within the strip; the load needs no alignment.
        let v = unsafe { _mm256_loadu_si256(x.as_ptr().add(BLOCK * block).cast()) };
        _mm256_and_si256(v, _mm256_set1_epi16(0x7FFF))
    };
    let max = |(a, b)| _mm256_max_epu16(a, b);
    // A block each 128 bits: i and i + 4.
    let two = |i: usize| max(lane_halves(block(i), block(i + 4)));
    let halves = |a, b| _mm256_max_epu16(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    let all = max(evens_and_odds(halves(two(0), two(1)), halves(two(2), two(3))));
    // The larger half of every lane.
    let larger = _mm256_max_epu16(all, _mm256_srli_epi32::<16>(all));
    _mm256_and_si256(larger, _mm256_set1_epi32(0xFFFF))
}

/// `amax_bf16` of f32, in the whole lane.
#[inline]
#[target_feature(enable = "avx2,popcnt")]
fn amax_f32<T: Element>(x: &[T; STRIP]) -> __m256i {
    debug_assert!(!T::IS_BF16);
    let block = |block: usize| {
        let half = |at: usize| {
            // SAFETY: 8 f32 values from `at` on lie within the strip; the load needs no alignment.
            let v = unsafe { _mm256_loadu_si256(x.as_ptr().add(at).cast()) };
            _mm256_and_si256(v, _mm256_set1_epi32(0x7FFF_FFFF))
        };
        _mm256_max_epu32(half(BLOCK * block), half(BLOCK * block + 8))
    };
    let max = |(a, b)| _mm256_max_epu32(a, b);
    let two = |i: usize| max(lane_halves(block(i), block(i + 4)));
    let halves = |a, b| _mm256_max_epu32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    max(evens_and_odds(halves(two(0), two(1)), halves(two(2), two(3))))
}

/// (low half of a, low half of b) and (high half of a, high half of b).
#[inline]
#[target_feature(enable = "avx2,popcnt")]
fn lane_halves(a: __m256i, b: __m256i) -> (__m256i, __m256i) {
    (_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x31>(a, b))
}

/// The even and the odd 32-bit lanes of a and b, 128 bits by 128 bits.
#[inline]
#[target_feature(enable = "avx2,popcnt")]
fn evens_and_odds(a: __m256i, b: __m256i) -> (__m256i, __m256i) {
    let (a, b) = (_mm256_castsi256_ps(a), _mm256_castsi256_ps(b));
    let evens = _mm256_castps_si256(_mm256_shuffle_ps::<0b10_00_10_00>(a, b));
    (evens, _mm256_castps_si256(_mm256_shuffle_ps::<0b11_01_11_01>(a, b)))
}

#[inline]
#[target_feature(enable = "avx2,popcnt")]
fn load(values: &[f32; 8]) -> __m256 {
    // SAFETY: 8 values; the load needs no alignment.
    unsafe { _mm256_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2,popcnt")]
fn store(v: __m256, values: &mut [f32; 8]) {
    // SAFETY: 8 values; the store needs no alignment.
    unsafe { _mm256_storeu_ps(values.as_mut_ptr(), v) };
}

/// The rest of a row as a strip.
#[inline]
fn padded<T: Element>(tail: &[T]) -> [T; STRIP] {
    let mut strip = [T::ZERO; STRIP];
    strip[..tail.len()].copy_from_slice(tail);
    strip
}
