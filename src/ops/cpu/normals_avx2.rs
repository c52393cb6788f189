//! The AVX2 side of normals.rs: two units (8 calls) at a time, one call a 32-bit lane.
#![allow(unsafe_code)]

use super::normals::{ROW_ZERO_OFFSET, half_digit};
use crate::numerics::generator::{BASE, COEF, COLUMN_BLOCK, TABLE_HIGH, TABLE_LOW};
use crate::numerics::philox::{MULTIPLIERS, ROUNDS, WEYL};
use std::arch::x86_64::*;

/// `normals::fill_blocks`. Call it only where the CPU has AVX2.
#[target_feature(enable = "avx2")]
pub(super) fn fill_blocks(seed: u64, stream: u32, key: &dyn Fn(usize) -> (u64, u32), out: &mut [f32]) {
    let units = out.as_chunks_mut::<COLUMN_BLOCK>().0;
    let (pairs, last) = units.as_chunks_mut::<2>();
    for (i, [first, second]) in pairs.iter_mut().enumerate() {
        block_pair(seed, stream, key(2 * i), key(2 * i + 1), first, second);
    }
    if let [last] = last {
        let unit = key(2 * pairs.len());
        block_pair(seed, stream, unit, unit, last, &mut [0.0; COLUMN_BLOCK]);
    }
}

#[target_feature(enable = "avx2")]
fn block_pair(
    seed: u64,
    stream: u32,
    (token0, block0): (u64, u32),
    (token1, block1): (u64, u32),
    out0: &mut [f32; COLUMN_BLOCK],
    out1: &mut [f32; COLUMN_BLOCK],
) {
    let halves = |low: u32, high: u32| _mm256_set_m128i(_mm_set1_epi32(high as i32), _mm_set1_epi32(low as i32));
    let calls = _mm256_add_epi32(halves(4 * block0, 4 * block1), _mm256_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3));
    let token_low = halves(token0 as u32, token1 as u32);
    let token_high = halves((token0 >> 32) as u32, (token1 >> 32) as u32);
    let x = philox(seed, [calls, _mm256_set1_epi32(stream as i32), token_low, token_high]);
    let p = [word_sums(x[0]), word_sums(x[1]), word_sums(x[2]), word_sums(x[3])]; // [k][v]
    for v in 0..4 {
        let (a, b, c, d) = (p[0][v], p[1][v], p[2][v], p[3][v]);
        let (sum_ab, diff_ab) = (_mm256_add_epi32(a, b), _mm256_sub_epi32(a, b));
        let (sum_cd, diff_cd) = (_mm256_add_epi32(c, d), _mm256_sub_epi32(c, d));
        let r0 = _mm256_add_epi32(_mm256_add_epi32(sum_ab, sum_cd), _mm256_set1_epi32(ROW_ZERO_OFFSET[v]));
        store_pair(r0, _mm256_add_epi32(diff_ab, diff_cd), 16 * v, out0, out1);
        store_pair(_mm256_sub_epi32(sum_ab, sum_cd), _mm256_sub_epi32(diff_cd, diff_ab), 16 * v + 8, out0, out1);
    }
}

/// Stores values j (even) and j + 1 of 8 calls, S scaled to z: columns 8 (j/2) .. + 8 of both blocks.
#[target_feature(enable = "avx2")]
fn store_pair(even: __m256i, odd: __m256i, column: usize, out0: &mut [f32; 64], out1: &mut [f32; 64]) {
    let scale = _mm256_set1_ps(1.0 / 32768.0);
    let even = _mm256_mul_ps(_mm256_cvtepi32_ps(even), scale);
    let odd = _mm256_mul_ps(_mm256_cvtepi32_ps(odd), scale);
    let (low, high) = (_mm256_unpacklo_ps(even, odd), _mm256_unpackhi_ps(even, odd));
    let (first, second) = (_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
    let (out0, out1) = (&mut out0[column..column + 8], &mut out1[column..column + 8]);
    // SAFETY: both slices hold 8 values; the stores need no alignment.
    unsafe {
        _mm256_storeu_ps(out0.as_mut_ptr(), first);
        _mm256_storeu_ps(out1.as_mut_ptr(), second);
    }
}

#[target_feature(enable = "avx2")]
fn philox(seed: u64, counter: [__m256i; 4]) -> [__m256i; 4] {
    let (mut k0, mut k1) = (seed as u32, (seed >> 32) as u32);
    let mut c = counter;
    for _ in 0..ROUNDS {
        let (high0, low0) = multiply(c[0], MULTIPLIERS[0]);
        let (high1, low1) = multiply(c[2], MULTIPLIERS[1]);
        let keyed1 = _mm256_xor_si256(c[1], _mm256_set1_epi32(k0 as i32));
        let keyed3 = _mm256_xor_si256(c[3], _mm256_set1_epi32(k1 as i32));
        c = [_mm256_xor_si256(high1, keyed1), low1, _mm256_xor_si256(high0, keyed3), low0];
        (k0, k1) = (k0.wrapping_add(WEYL[0]), k1.wrapping_add(WEYL[1]));
    }
    c
}

/// High and low words of the eight 32 x 32 bit products.
#[target_feature(enable = "avx2")]
fn multiply(x: __m256i, factor: u32) -> (__m256i, __m256i) {
    let factor = _mm256_set1_epi32(factor as i32);
    let even = _mm256_mul_epu32(x, factor);
    let odd = _mm256_mul_epu32(_mm256_srli_epi64::<32>(x), factor);
    let high = _mm256_blend_epi32::<0xAA>(_mm256_srli_epi64::<32>(even), odd);
    let low = _mm256_blend_epi32::<0xAA>(even, _mm256_slli_epi64::<32>(odd));
    (high, low)
}

/// For v = 0..3, sum over i of COEF[v][i] BASE[i^v] (6 e_l + 5 e_h) of a word.
#[target_feature(enable = "avx2")]
fn word_sums(word: __m256i) -> [__m256i; 4] {
    // Bytes (l1 l0)(l3 l2)(h1 h0)(h3 h2) -> (l1 l0)(h1 h0)(l3 l2)(h3 h2): a low digit beside its high one.
    let order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    let word = _mm256_shuffle_epi8(word, _mm256_set_m128i(order, order));
    let nibble = _mm256_set1_epi8(15);
    let even = pair_sums(_mm256_and_si256(word, nibble)); // i = 0, 2
    let odd = pair_sums(_mm256_and_si256(_mm256_srli_epi16::<4>(word), nibble)); // i = 1, 3
    let mut sums = [_mm256_setzero_si256(); 4];
    for (v, sum) in sums.iter_mut().enumerate() {
        let weight = |i: usize| COEF[v][i] * BASE[i ^ v];
        let weights = |low: i32, high: i32| _mm256_set1_epi32((low & 0xFFFF) | high << 16);
        let from_even = _mm256_madd_epi16(even, weights(weight(0), weight(2)));
        *sum = _mm256_add_epi32(from_even, _mm256_madd_epi16(odd, weights(weight(1), weight(3))));
    }
    sums
}

/// Nibbles (low digit, high digit) in byte pairs -> 6 e_l + 5 e_h in i16.
#[target_feature(enable = "avx2")]
fn pair_sums(nibbles: __m256i) -> __m256i {
    let low = _mm256_shuffle_epi8(digits(&TABLE_LOW), nibbles);
    let high = _mm256_shuffle_epi8(digits(&TABLE_HIGH), nibbles);
    let is_high = _mm256_set1_epi16(0xFF00u16 as i16);
    let both = _mm256_blendv_epi8(low, high, is_high);
    _mm256_maddubs_epi16(_mm256_set1_epi16(5 << 8 | 6), both)
}

/// e of the 16 nibbles of a table, in both halves.
#[target_feature(enable = "avx2")]
fn digits(table: &[i32; 4]) -> __m256i {
    let e = |n: u32| half_digit(table, n) as i8;
    let digits = _mm_setr_epi8(
        e(0),
        e(1),
        e(2),
        e(3),
        e(4),
        e(5),
        e(6),
        e(7),
        e(8),
        e(9),
        e(10),
        e(11),
        e(12),
        e(13),
        e(14),
        e(15),
    );
    _mm256_set_m128i(digits, digits)
}
