//! The vector side of uniforms.rs: one Philox call a 64-bit lane, whose products need no shuffle. The upper halves of the
//! lanes of words 1 and 3 hold what is left of a product; nothing reads them.
//!
//! Calls of a row differ in counter word 0 alone, so half of the first round and half of the second are the same for all.
#![allow(unsafe_code)]

use super::uniforms::Calls;
use crate::numerics::philox::{MULTIPLIERS, ROUNDS, WEYL};
use std::arch::x86_64::*;

/// Vectors that are worked on at a time, so that the products' latencies overlap.
const GROUPS_512: usize = 6;
const GROUPS_256: usize = 3;
const LAST: usize = ROUNDS - 1;

/// What all calls share of the first two rounds: with p = M0 * (word 0), q = M1 * ((p >> 32) ^ first), the words after
/// them are (q >> 32) ^ second[0], q, p ^ second[2] and second[3].
struct Shared {
    first: u32,
    second: [u32; 4],
    keys: [[u32; 2]; ROUNDS],
}

impl Shared {
    fn of(calls: Calls) -> Shared {
        let mut keys = [[calls.seed as u32, (calls.seed >> 32) as u32]; ROUNDS];
        for round in 1..ROUNDS {
            keys[round] = [keys[round - 1][0].wrapping_add(WEYL[0]), keys[round - 1][1].wrapping_add(WEYL[1])];
        }
        let product = |word: u32, m: usize| u64::from(word).wrapping_mul(u64::from(MULTIPLIERS[m]));
        let p1 = product(calls.token as u32, 1);
        let p0 = product((p1 >> 32) as u32 ^ calls.stream ^ keys[0][0], 0);
        Shared {
            first: (calls.token >> 32) as u32 ^ keys[0][1],
            second: [p1 as u32 ^ keys[1][0], 0, (p0 >> 32) as u32 ^ keys[1][1], p0 as u32],
            keys,
        }
    }
}

/// Whole groups of 8 * GROUPS_512 calls; the number of halves done.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn words_avx512(calls: Calls, out: &mut [u16]) -> usize {
    const HALVES: usize = 64 * GROUPS_512;
    let all = |word: u32| _mm512_set1_epi64(i64::from(word));
    let Shared { first, second, keys } = Shared::of(calls);
    let multipliers = MULTIPLIERS.map(all);
    // Interleaved, so that the 128-bit unpacking at the end leaves the calls in order.
    let order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    let (chunks, _) = out.as_chunks_mut::<HALVES>();
    for (chunk, out) in chunks.iter_mut().enumerate() {
        let mut c = [[_mm512_setzero_si512(); 4]; GROUPS_512];
        for (group, c) in c.iter_mut().enumerate() {
            let number = calls.first.wrapping_add((8 * (GROUPS_512 * chunk + group)) as u32);
            let p = _mm512_mul_epu32(_mm512_add_epi64(order, all(number)), multipliers[0]);
            let q = _mm512_mul_epu32(_mm512_xor_si512(upper_512(p), all(first)), multipliers[1]);
            let x0 = _mm512_xor_si512(upper_512(q), all(second[0]));
            *c = [x0, q, _mm512_xor_si512(p, all(second[2])), all(second[3])];
        }
        for [k0, k1] in &keys[2..LAST] {
            for c in &mut c {
                let (p0, p1) = (_mm512_mul_epu32(c[0], multipliers[0]), _mm512_mul_epu32(c[2], multipliers[1]));
                // 0x96: the exclusive or of three.
                let x0 = _mm512_ternarylogic_epi64::<0x96>(upper_512(p1), c[1], all(*k0));
                let x2 = _mm512_ternarylogic_epi64::<0x96>(upper_512(p0), c[3], all(*k1));
                *c = [x0, p1, x2, p0];
            }
        }
        for (c, out) in c.iter().zip(out.as_chunks_mut::<64>().0) {
            // The last round, with words 0 and 1 in a lane, and 2 and 3.
            let swapped = |c, m| _mm512_shuffle_epi32::<0b10_11_00_01>(_mm512_mul_epu32(c, m));
            let (p0, p1) = (swapped(c[0], multipliers[0]), swapped(c[2], multipliers[1]));
            let low = _mm512_mask_ternarylogic_epi32::<0x96>(p1, 0x5555, c[1], all(keys[LAST][0]));
            let high = _mm512_mask_ternarylogic_epi32::<0x96>(p0, 0x5555, c[3], all(keys[LAST][1]));
            // SAFETY: out holds 64 halves, two vectors; the stores need no alignment.
            unsafe {
                _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_unpacklo_epi64(low, high));
                _mm512_storeu_si512(out.as_mut_ptr().add(32).cast(), _mm512_unpackhi_epi64(low, high));
            }
        }
    }
    HALVES * chunks.len()
}

/// Whole groups of 4 * GROUPS_256 calls; the number of halves done.
#[target_feature(enable = "avx2")]
pub(super) fn words_avx2(calls: Calls, out: &mut [u16]) -> usize {
    const HALVES: usize = 32 * GROUPS_256;
    let all = |word: u32| _mm256_set1_epi64x(i64::from(word));
    let Shared { first, second, keys } = Shared::of(calls);
    let multipliers = MULTIPLIERS.map(all);
    let order = _mm256_setr_epi64x(0, 2, 1, 3);
    let (chunks, _) = out.as_chunks_mut::<HALVES>();
    for (chunk, out) in chunks.iter_mut().enumerate() {
        let mut c = [[_mm256_setzero_si256(); 4]; GROUPS_256];
        for (group, c) in c.iter_mut().enumerate() {
            let number = calls.first.wrapping_add((4 * (GROUPS_256 * chunk + group)) as u32);
            let p = _mm256_mul_epu32(_mm256_add_epi64(order, all(number)), multipliers[0]);
            let q = _mm256_mul_epu32(_mm256_xor_si256(upper_256(p), all(first)), multipliers[1]);
            let x0 = _mm256_xor_si256(upper_256(q), all(second[0]));
            *c = [x0, q, _mm256_xor_si256(p, all(second[2])), all(second[3])];
        }
        for [k0, k1] in &keys[2..LAST] {
            for c in &mut c {
                let (p0, p1) = (_mm256_mul_epu32(c[0], multipliers[0]), _mm256_mul_epu32(c[2], multipliers[1]));
                let x0 = _mm256_xor_si256(upper_256(p1), _mm256_xor_si256(c[1], all(*k0)));
                let x2 = _mm256_xor_si256(upper_256(p0), _mm256_xor_si256(c[3], all(*k1)));
                *c = [x0, p1, x2, p0];
            }
        }
        for (c, out) in c.iter().zip(out.as_chunks_mut::<32>().0) {
            let swapped = |c, m| _mm256_shuffle_epi32::<0b10_11_00_01>(_mm256_mul_epu32(c, m));
            let (p0, p1) = (swapped(c[0], multipliers[0]), swapped(c[2], multipliers[1]));
            let lower = |c| _mm256_blend_epi32::<0xAA>(c, _mm256_setzero_si256());
            let low = _mm256_xor_si256(p1, lower(_mm256_xor_si256(c[1], all(keys[LAST][0]))));
            let high = _mm256_xor_si256(p0, lower(_mm256_xor_si256(c[3], all(keys[LAST][1]))));
            // SAFETY: out holds 32 halves, two vectors; the stores need no alignment.
            unsafe {
                _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm256_unpacklo_epi64(low, high));
                _mm256_storeu_si256(out.as_mut_ptr().add(16).cast(), _mm256_unpackhi_epi64(low, high));
            }
        }
    }
    HALVES * chunks.len()
}

/// The upper halves of the lanes, in both halves: by a shuffle, which more units do than shifts.
#[inline]
#[target_feature(enable = "avx512f")]
fn upper_512(v: __m512i) -> __m512i {
    _mm512_shuffle_epi32::<0b11_11_01_01>(v)
}

#[inline]
#[target_feature(enable = "avx2")]
fn upper_256(v: __m256i) -> __m256i {
    _mm256_shuffle_epi32::<0b11_11_01_01>(v)
}
