//! The AVX2 side of fake_quant.rs: a block is two (nvfp4) or four (mxfp4) vectors of 8 values, bitwise equal to the
//! portable side.
#![allow(unsafe_code)]

use super::fake_quant::{Counts, Element, INFINITY_BITS, finite_amax_bits};
use super::fake_quant_portable::{block_scales_mxfp4, block_scales_nvfp4};
use super::normals::Path;
use crate::numerics::block_format::tensor_encode_scale;
use crate::numerics::format::MxScaleRule;
use std::arch::x86_64::*;

/// Rows of blocks of 32.
#[target_feature(enable = "avx2")]
pub(super) fn mxfp4_rows<T: Element>(x: &[T], cols: usize, rule: MxScaleRule, out: &mut [T]) -> Counts {
    let mut counts = Counts::default();
    for (x, out) in x.chunks_exact(cols).zip(out.chunks_exact_mut(cols)) {
        quantize_row::<T, 32, 4>(x, out, &mut counts, |amax| block_scales_mxfp4(amax, rule));
    }
    counts
}

/// Rows of blocks of 16. `encode_scale` None: a G of every row's own.
#[target_feature(enable = "avx2")]
pub(super) fn nvfp4_rows<T: Element>(x: &[T], cols: usize, encode_scale: Option<f32>, out: &mut [T]) -> Counts {
    let mut counts = Counts::default();
    for (x, out) in x.chunks_exact(cols).zip(out.chunks_exact_mut(cols)) {
        let g =
            encode_scale.unwrap_or_else(|| tensor_encode_scale(f32::from_bits(finite_amax_bits(Path::Avx2, x, cols))));
        let inverse = 1.0 / g;
        quantize_row::<T, 16, 2>(x, out, &mut counts, |amax| block_scales_nvfp4(amax, g, inverse));
    }
    counts
}

/// Largest bits of a magnitude over all of x, non-finite values included.
#[target_feature(enable = "avx2")]
pub(super) fn amax_bits<T: Element>(x: &[T]) -> u32 {
    let (vectors, tail) = x.as_chunks::<8>();
    let mut largest = _mm256_setzero_si256();
    for v in vectors {
        largest = _mm256_max_epu32(largest, magnitude_bits(load(v)));
    }
    let tail = tail.iter().map(|v| v.read().to_bits() & 0x7FFF_FFFF).max().unwrap_or(0);
    tail.max(horizontal_max(largest))
}

/// `N` values in `V` vectors a block; `scales` maps a finite amax to (encode, decode).
#[target_feature(enable = "avx2")]
fn quantize_row<T: Element, const N: usize, const V: usize>(
    x: &[T],
    out: &mut [T],
    counts: &mut Counts,
    scales: impl Fn(f32) -> (f32, f32),
) {
    let (blocks, tail) = x.as_chunks::<N>();
    let (out_blocks, out_tail) = out.as_chunks_mut::<N>();
    for (x, out) in blocks.iter().zip(out_blocks) {
        quantize_block::<T, N, V>(x, out, counts, &scales);
    }
    if !tail.is_empty() {
        let (mut padded, mut y) = ([T::ZERO; N], [T::ZERO; N]);
        padded[..tail.len()].copy_from_slice(tail);
        quantize_block::<T, N, V>(&padded, &mut y, counts, &scales);
        out_tail.copy_from_slice(&y[..tail.len()]);
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn quantize_block<T: Element, const N: usize, const V: usize>(
    x: &[T; N],
    out: &mut [T; N],
    counts: &mut Counts,
    scales: &impl Fn(f32) -> (f32, f32),
) {
    let (x, _) = x.as_chunks::<8>();
    let mut values = [_mm256_setzero_ps(); V];
    let mut largest = _mm256_setzero_si256();
    for i in 0..V {
        values[i] = load(&x[i]);
        largest = _mm256_max_epu32(largest, magnitude_bits(values[i]));
    }
    let bits = horizontal_max(largest);
    if bits >= INFINITY_BITS {
        counts.nonfinite_blocks += 1;
        *out = [T::NAN; N];
        return;
    }
    let (encode, decode) = scales(f32::from_bits(bits));
    let (encode, decode) = (_mm256_set1_ps(encode), _mm256_set1_ps(decode));
    let sign = _mm256_set1_ps(-0.0);
    let (out, _) = out.as_chunks_mut::<8>();
    for i in 0..V {
        let magnitude = _mm256_andnot_ps(sign, _mm256_mul_ps(values[i], encode));
        let six = _mm256_set1_ps(6.0);
        let above = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(magnitude, six));
        counts.saturated += above.count_ones() as usize;
        let rounded = round_to_grid(_mm256_min_ps(magnitude, six));
        let signed = _mm256_or_ps(rounded, _mm256_and_ps(sign, values[i]));
        store(_mm256_mul_ps(signed, decode), &mut out[i]);
    }
}

/// a in 0..=6 to the E2M1 grid, ties to even (see fake_quant.rs).
#[inline]
#[target_feature(enable = "avx2")]
fn round_to_grid(a: __m256) -> __m256 {
    let at_least = |bound: f32| _mm256_cmp_ps::<_CMP_GE_OQ>(a, _mm256_set1_ps(bound));
    let fine = _mm256_set1_ps(6_291_456.0);
    let middle = _mm256_blendv_ps(fine, _mm256_set1_ps(12_582_912.0), at_least(2.0));
    let steps = _mm256_blendv_ps(middle, _mm256_set1_ps(25_165_824.0), at_least(4.0));
    _mm256_sub_ps(_mm256_add_ps(a, steps), steps)
}

#[inline]
#[target_feature(enable = "avx2")]
fn magnitude_bits(v: __m256) -> __m256i {
    _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7FFF_FFFF))
}

#[inline]
#[target_feature(enable = "avx2")]
fn horizontal_max(v: __m256i) -> u32 {
    let four = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
    let two = _mm_max_epu32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
    let one = _mm_max_epu32(two, _mm_shuffle_epi32::<0b10_11_00_01>(two));
    _mm_cvtsi128_si32(one) as u32
}

#[inline]
#[target_feature(enable = "avx2")]
fn load<T: Element>(x: &[T; 8]) -> __m256 {
    if T::IS_BF16 {
        // SAFETY: IS_BF16 says that x is 8 bf16 values, 16 bytes; the load needs no alignment.
        let halves = unsafe { _mm_loadu_si128(x.as_ptr().cast()) };
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
    } else {
        // SAFETY: x is 8 f32 values; the load needs no alignment.
        unsafe { _mm256_loadu_ps(x.as_ptr().cast()) }
    }
}

/// Stores finite values, rounded to nearest even.
#[inline]
#[target_feature(enable = "avx2")]
fn store<T: Element>(v: __m256, out: &mut [T; 8]) {
    if !T::IS_BF16 {
        // SAFETY: out is 8 f32 values; the store needs no alignment.
        return unsafe { _mm256_storeu_ps(out.as_mut_ptr().cast(), v) };
    }
    let bits = _mm256_castps_si256(v);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
    let halves = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, bias));
    let packed = _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves));
    // SAFETY: IS_BF16 says that out is 8 bf16 values, 16 bytes; the store needs no alignment.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), packed) }
}
