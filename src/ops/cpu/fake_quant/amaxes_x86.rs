//! The vector side of amaxes.rs, for AVX2 and above: 8 blocks at a time, whose amaxes fill one vector. The halves of pairs of
//! vectors change places until every lane has its block.
#![allow(unsafe_code)]

use super::element::{Element, Word};
use std::arch::x86_64::*;

const LANES: usize = 8;

/// Of whole strips of 256 elements in blocks of 16 or 32; how many blocks hold NaN or infinity.
#[target_feature(enable = "avx2,popcnt")]
pub(super) fn of_blocks<T: Element, const BLOCK: usize>(x: &[T], amaxes: &mut [T::Word]) -> usize {
    let mut nonfinite = 0usize;
    for (x, amaxes) in x.chunks_exact(LANES * BLOCK).zip(amaxes.as_chunks_mut::<LANES>().0) {
        let lanes = lanes::<T, BLOCK>(x);
        let infinite = _mm256_cmpgt_epi32(lanes, _mm256_set1_epi32(f32::INFINITY.to_bits() as i32 - 1));
        let infinite = _mm256_movemask_ps(_mm256_castsi256_ps(infinite)) as u32;
        nonfinite = nonfinite.wrapping_add(infinite.count_ones() as usize);
        if T::IS_BF16 {
            let upper = _mm256_srli_epi32::<16>(lanes);
            let upper = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256::<1>(upper));
            // SAFETY: 8 words of 16 bits; the store needs no alignment.
            unsafe { _mm_storeu_si128(amaxes.as_mut_ptr().cast(), upper) };
        } else {
            // SAFETY: 8 words of 32 bits; the store needs no alignment.
            unsafe { _mm256_storeu_si256(amaxes.as_mut_ptr().cast(), lanes) };
        }
    }
    nonfinite
}

/// Of one block.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn of_block<T: Element>(x: &[T; 32]) -> T::Word {
    // SAFETY: vector i of the block; the load needs no alignment.
    let vector = |i: usize| unsafe { _mm256_loadu_si256(x.as_ptr().cast::<__m256i>().add(i)) };
    let halves = |v: __m256i| (_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
    if T::IS_BF16 {
        let magnitude = |i: usize| _mm256_and_si256(vector(i), _mm256_set1_epi16(0x7FFF));
        let (a, b) = halves(_mm256_max_epu16(magnitude(0), magnitude(1)));
        // The least of what is left below all ones.
        let least = _mm_minpos_epu16(_mm_xor_si128(_mm_max_epu16(a, b), _mm_set1_epi16(-1)));
        T::Word::of(!_mm_cvtsi128_si32(least) as u32)
    } else {
        let magnitude = |i: usize| _mm256_and_si256(vector(i), _mm256_set1_epi32(0x7FFF_FFFF));
        let max = |a, b| _mm256_max_epu32(a, b);
        let (a, b) = halves(max(max(magnitude(0), magnitude(1)), max(magnitude(2), magnitude(3))));
        let four = _mm_max_epu32(a, b);
        let two = _mm_max_epu32(four, _mm_shuffle_epi32::<0b11_10_11_10>(four));
        T::Word::of(_mm_cvtsi128_si32(_mm_max_epu32(two, _mm_shuffle_epi32::<0b01_01_01_01>(two))) as u32)
    }
}

/// The amax of each of 8 blocks, as bits of f32.
#[inline]
#[target_feature(enable = "avx2")]
fn lanes<T: Element, const BLOCK: usize>(x: &[T]) -> __m256i {
    let max = |(a, b)| if T::IS_BF16 { _mm256_max_epu16(a, b) } else { _mm256_max_epu32(a, b) };
    let magnitude = if T::IS_BF16 { _mm256_set1_epi16(0x7FFF) } else { _mm256_set1_epi32(0x7FFF_FFFF) };
    let vector = |i: usize| {
        // SAFETY: vector i of 8 blocks, of 16 elements of 16 bits or 8 of 32; the load needs no alignment.
        _mm256_and_si256(unsafe { _mm256_loadu_si256(x.as_ptr().cast::<__m256i>().add(i)) }, magnitude)
    };
    assert!(x.len() == LANES * BLOCK);
    let two = |i: usize| max((vector(2 * i), vector(2 * i + 1)));
    let block = |i: usize| match (BLOCK * size_of::<T>()) / size_of::<__m256i>() {
        1 => vector(i),
        2 => two(i),
        _ => max((two(2 * i), two(2 * i + 1))),
    };
    // A block each 128 bits: i and i + 4.
    let two_blocks = |i: usize| {
        let (a, b) = (block(i), block(i + 4));
        max((_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x31>(a, b)))
    };
    let four_blocks = |i: usize| {
        let (a, b) = (two_blocks(i), two_blocks(i + 1));
        max((_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b)))
    };
    let (a, b) = (_mm256_castsi256_ps(four_blocks(0)), _mm256_castsi256_ps(four_blocks(2)));
    let evens = _mm256_castps_si256(_mm256_shuffle_ps::<0b10_00_10_00>(a, b));
    let lanes = max((evens, _mm256_castps_si256(_mm256_shuffle_ps::<0b11_01_11_01>(a, b))));
    if !T::IS_BF16 {
        return lanes;
    }
    // The larger half of every lane.
    let larger = _mm256_max_epu16(lanes, _mm256_slli_epi32::<16>(lanes));
    _mm256_and_si256(larger, _mm256_set1_epi32(0xFFFF_0000u32 as i32))
}
