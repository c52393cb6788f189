//! The vector side of uniforms.rs: one Philox call a 64-bit lane, whose products need no shuffle. The upper halves of the
//! lanes of words 1 and 3 hold what is left of a product; nothing reads them.
#![allow(unsafe_code)]

use super::uniforms::Calls;
use crate::numerics::philox::{MULTIPLIERS, ROUNDS, WEYL};
use std::arch::x86_64::*;

/// Vectors that are worked on at a time, so that the products' latencies overlap.
const GROUPS_512: usize = 4;
const GROUPS_256: usize = 2;

/// Whole groups of 8 * GROUPS_512 calls; the number of halves done.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn words_avx512(calls: Calls, out: &mut [u16]) -> usize {
    const HALVES: usize = 64 * GROUPS_512;
    let all = |word: u32| _mm512_set1_epi64(i64::from(word));
    // Interleaved, so that the 128-bit unpacking at the end leaves the calls in order.
    let order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    let (chunks, _) = out.as_chunks_mut::<HALVES>();
    for (chunk, out) in chunks.iter_mut().enumerate() {
        let mut c = [[_mm512_setzero_si512(); 4]; GROUPS_512];
        for (group, c) in c.iter_mut().enumerate() {
            let number = _mm512_add_epi64(order, all((8 * (GROUPS_512 * chunk + group)) as u32));
            let (token_low, token_high) = (calls.token as u32, (calls.token >> 32) as u32);
            *c = [_mm512_or_si512(number, all(calls.tag)), all(calls.stream), all(token_low), all(token_high)];
        }
        let (mut k0, mut k1) = (calls.seed as u32, (calls.seed >> 32) as u32);
        for _ in 0..ROUNDS {
            for c in &mut c {
                let (p0, p1) =
                    (_mm512_mul_epu32(c[0], all(MULTIPLIERS[0])), _mm512_mul_epu32(c[2], all(MULTIPLIERS[1])));
                // 0x96: the exclusive or of three.
                let x0 = _mm512_ternarylogic_epi64::<0x96>(_mm512_srli_epi64::<32>(p1), c[1], all(k0));
                let x2 = _mm512_ternarylogic_epi64::<0x96>(_mm512_srli_epi64::<32>(p0), c[3], all(k1));
                *c = [x0, p1, x2, p0];
            }
            (k0, k1) = (k0.wrapping_add(WEYL[0]), k1.wrapping_add(WEYL[1]));
        }
        for (c, out) in c.iter().zip(out.as_chunks_mut::<64>().0) {
            let low = _mm512_mask_blend_epi32(0xAAAA, c[0], _mm512_slli_epi64::<32>(c[1]));
            let high = _mm512_mask_blend_epi32(0xAAAA, c[2], _mm512_slli_epi64::<32>(c[3]));
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
    let order = _mm256_setr_epi64x(0, 2, 1, 3);
    let (chunks, _) = out.as_chunks_mut::<HALVES>();
    for (chunk, out) in chunks.iter_mut().enumerate() {
        let mut c = [[_mm256_setzero_si256(); 4]; GROUPS_256];
        for (group, c) in c.iter_mut().enumerate() {
            let number = _mm256_add_epi64(order, all((4 * (GROUPS_256 * chunk + group)) as u32));
            let (token_low, token_high) = (calls.token as u32, (calls.token >> 32) as u32);
            *c = [_mm256_or_si256(number, all(calls.tag)), all(calls.stream), all(token_low), all(token_high)];
        }
        let (mut k0, mut k1) = (calls.seed as u32, (calls.seed >> 32) as u32);
        for _ in 0..ROUNDS {
            for c in &mut c {
                let (p0, p1) =
                    (_mm256_mul_epu32(c[0], all(MULTIPLIERS[0])), _mm256_mul_epu32(c[2], all(MULTIPLIERS[1])));
                let x0 = _mm256_xor_si256(_mm256_srli_epi64::<32>(p1), _mm256_xor_si256(c[1], all(k0)));
                let x2 = _mm256_xor_si256(_mm256_srli_epi64::<32>(p0), _mm256_xor_si256(c[3], all(k1)));
                *c = [x0, p1, x2, p0];
            }
            (k0, k1) = (k0.wrapping_add(WEYL[0]), k1.wrapping_add(WEYL[1]));
        }
        for (c, out) in c.iter().zip(out.as_chunks_mut::<32>().0) {
            let low = _mm256_blend_epi32::<0xAA>(c[0], _mm256_slli_epi64::<32>(c[1]));
            let high = _mm256_blend_epi32::<0xAA>(c[2], _mm256_slli_epi64::<32>(c[3]));
            // SAFETY: out holds 32 halves, two vectors; the stores need no alignment.
            unsafe {
                _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm256_unpacklo_epi64(low, high));
                _mm256_storeu_si256(out.as_mut_ptr().add(16).cast(), _mm256_unpackhi_epi64(low, high));
            }
        }
    }
    HALVES * chunks.len()
}
