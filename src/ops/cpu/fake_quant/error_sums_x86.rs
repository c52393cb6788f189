//! The vector side of error_sums.rs: groups of 8 finite elements into lanes of f64. Nothing is fused, so that every path
//! adds the same numbers.
#![allow(unsafe_code)]

use super::element::Element;
use super::error_sums::{LANES, Lanes, Wide};
use std::arch::x86_64::*;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn add_avx512<T: Element>(lanes: &mut Lanes, x: &[[T; LANES]], q: &[[T; LANES]]) {
    let read = |group: &[T; LANES]| {
        let at = group.as_ptr();
        if T::IS_BF16 {
            // SAFETY: a group is 8 values of 16 bits; the load needs no alignment.
            let bits = _mm256_cvtepu16_epi32(unsafe { _mm_loadu_si128(at.cast()) });
            _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits)))
        } else {
            // SAFETY: a group is 8 values of 32 bits; the load needs no alignment.
            _mm512_cvtps_pd(unsafe { _mm256_loadu_ps(at.cast()) })
        }
    };
    // SAFETY: 8 lanes; the load needs no alignment.
    let load = |lanes: &Wide| unsafe { _mm512_loadu_pd(lanes.as_ptr()) };
    let [mut x_sq, mut q_sq, mut x_q, mut error_sq, mut relative, mut largest] = lanes.0.each_ref().map(load);
    for (x, q) in x.iter().zip(q) {
        let (x, q) = (read(x), read(q));
        let error = _mm512_abs_pd(_mm512_sub_pd(q, x));
        x_sq = _mm512_add_pd(x_sq, _mm512_mul_pd(x, x));
        q_sq = _mm512_add_pd(q_sq, _mm512_mul_pd(q, q));
        x_q = _mm512_add_pd(x_q, _mm512_mul_pd(x, q));
        error_sq = _mm512_add_pd(error_sq, _mm512_mul_pd(error, error));
        let size = _mm512_add_pd(_mm512_abs_pd(x), _mm512_set1_pd(1e-10));
        relative = _mm512_add_pd(relative, _mm512_div_pd(error, size));
        largest = _mm512_max_pd(error, largest);
    }
    for (lanes, sums) in lanes.0.iter_mut().zip([x_sq, q_sq, x_q, error_sq, relative, largest]) {
        // SAFETY: 8 lanes; the store needs no alignment.
        unsafe { _mm512_storeu_pd(lanes.as_mut_ptr(), sums) };
    }
}

/// Four lanes at a time: the sums of all 8 do not fit the registers.
#[target_feature(enable = "avx2")]
pub(super) fn add_avx2<T: Element>(lanes: &mut Lanes, x: &[[T; LANES]], q: &[[T; LANES]]) {
    for first in [0, LANES / 2] {
        let read = |group: &[T; LANES]| {
            let at = group[first..].as_ptr();
            if T::IS_BF16 {
                // SAFETY: 4 values of 16 bits from `first` on lie in the group; the load needs no alignment.
                let bits = _mm_cvtepu16_epi32(unsafe { _mm_loadl_epi64(at.cast()) });
                _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32::<16>(bits)))
            } else {
                // SAFETY: 4 values of 32 bits from `first` on lie in the group; the load needs no alignment.
                _mm256_cvtps_pd(unsafe { _mm_loadu_ps(at.cast()) })
            }
        };
        // SAFETY: 4 lanes from `first` on; the load needs no alignment.
        let load = |lanes: &Wide| unsafe { _mm256_loadu_pd(lanes.as_ptr().add(first)) };
        let [mut x_sq, mut q_sq, mut x_q, mut error_sq, mut relative, mut largest] = lanes.0.each_ref().map(load);
        let sign = _mm256_set1_pd(-0.0);
        for (x, q) in x.iter().zip(q) {
            let (x, q) = (read(x), read(q));
            let error = _mm256_andnot_pd(sign, _mm256_sub_pd(q, x));
            x_sq = _mm256_add_pd(x_sq, _mm256_mul_pd(x, x));
            q_sq = _mm256_add_pd(q_sq, _mm256_mul_pd(q, q));
            x_q = _mm256_add_pd(x_q, _mm256_mul_pd(x, q));
            error_sq = _mm256_add_pd(error_sq, _mm256_mul_pd(error, error));
            let size = _mm256_add_pd(_mm256_andnot_pd(sign, x), _mm256_set1_pd(1e-10));
            relative = _mm256_add_pd(relative, _mm256_div_pd(error, size));
            largest = _mm256_max_pd(error, largest);
        }
        for (lanes, sums) in lanes.0.iter_mut().zip([x_sq, q_sq, x_q, error_sq, relative, largest]) {
            // SAFETY: 4 lanes from `first` on; the store needs no alignment.
            unsafe { _mm256_storeu_pd(lanes.as_mut_ptr().add(first), sums) };
        }
    }
}
