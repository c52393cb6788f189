//! Fake quantization of the formats without a vector path of their own (fake_quant.rs): one source, compiled for each
//! instruction set. x [rows, cols] f32 becomes y in place, bitwise equal to `numerics::block_format::quantize`.
//!
//! A band is the rows that share scales: one, or the 16 or 32 rows of 2-D tiles. Its blocks' amaxes come first, then all
//! scales in vectors, then the elements: y = round(min(|x| * encode, max)) * decode with the sign of x. Codes are not
//! stored; element_rounding.rs rounds magnitudes on the element grid.

use super::element::Element;
use super::element_rounding::{E2m1Nearest, ElementRounding, round_e4m3};
use super::fake_quant::{Counts, INFINITY_BITS};
use super::path::{Path, for_each_path};
use super::uniforms::{self, Key};
use crate::numerics::block_format::{RoundingDraw, TensorScale};
use crate::numerics::block_scale::{Encode, block_scales, tensor_scale};
use crate::numerics::e4m3;
use crate::numerics::format::{Family, Format, Rounding};

/// Elements handled together.
const GROUP: usize = 16;

/// What a matrix is quantized with. `scale` is not `Tensor` where the format has a tensor scale.
pub(super) struct Job<'a> {
    pub format: Format,
    pub cols: usize,
    pub scale: TensorScale,
    pub draw: Option<&'a RoundingDraw<'a>>,
    pub path: Path,
}

for_each_path! {
    /// Bits of the largest magnitude, infinity and NaN included.
    pub(super) fn largest<T: Element>(x: &[T]) -> u32 {
        largest_bits(x)
    }
}

for_each_path! {
    /// Quantizes x [rows, cols] in place.
    pub(super) fn quantize<R: ElementRounding>(x: &mut [f32], job: &Job) -> Counts {
        let Job { format, cols, .. } = *job;
        let size = format.block_size(cols);
        let mut scales = Scales::new(cols.div_ceil(size));
        let mut uniforms = vec![0; if job.draw.is_some() { cols } else { 0 }];
        let mut counts = Counts::default();
        for (band, rows) in x.chunks_mut(format.block_rows() * cols).enumerate() {
            scales.find_amaxes(rows, cols, size);
            scales.find(job);
            counts.nonfinite_blocks += scales.nonfinite_blocks();
            for (i, row) in rows.chunks_mut(cols).enumerate() {
                if let Some(draw) = job.draw {
                    let token = draw.row_keys[band * format.block_rows() + i];
                    let key = Key { seed: draw.seed, stream: draw.stream, token };
                    match format.rounding {
                        Rounding::Stochastic8 => uniforms::fill::<uniforms::Bytes>(job.path, key, &mut uniforms),
                        _ => uniforms::fill::<uniforms::HalfWords>(job.path, key, &mut uniforms),
                    }
                }
                for (index, block) in row.chunks_mut(size).enumerate() {
                    let uniforms = uniforms.get(index * size..).unwrap_or(&[]);
                    counts.saturated += scales.apply::<R>(index, block, uniforms) as usize;
                }
            }
        }
        counts
    }
}

/// The scales of a band's blocks.
struct Scales {
    amax_bits: Vec<u32>,
    encode: Vec<f32>,
    decode: Vec<f32>,
    /// The other candidate of 4over6: (encode, decode); empty elsewhere.
    other: Vec<(f32, f32)>,
    divides: bool,
}

impl Scales {
    fn new(blocks: usize) -> Scales {
        let zeros = vec![0.0; blocks];
        Scales { amax_bits: vec![0; blocks], encode: zeros.clone(), decode: zeros, other: Vec::new(), divides: false }
    }

    #[inline(always)]
    fn find_amaxes(&mut self, rows: &[f32], cols: usize, size: usize) {
        self.amax_bits.fill(0);
        for row in rows.chunks(cols) {
            for (amax, block) in self.amax_bits.iter_mut().zip(row.chunks(size)) {
                *amax = (*amax).max(largest_bits(block));
            }
        }
    }

    fn nonfinite_blocks(&self) -> usize {
        self.amax_bits.iter().filter(|&&bits| bits >= INFINITY_BITS).count()
    }

    /// Every block's scale; what it is for NaN and infinity does not matter.
    #[inline(always)]
    fn find(&mut self, job: &Job) {
        let format = job.format;
        let finite = || self.amax_bits.iter().copied().filter(|&bits| bits < INFINITY_BITS).max().unwrap_or(0);
        let tensor = match job.scale {
            TensorScale::Amax(amax) => tensor_scale(format, amax),
            TensorScale::Row if format.has_tensor_scale() => tensor_scale(format, f32::from_bits(finite())),
            _ => 1.0,
        };
        match format.family {
            Family::Nvfp4 { four_over_six: true } => {
                let factor = tensor / 6.0;
                self.nvfp4(tensor, |b| 1.5 * (b * factor));
                self.other = self.encode.iter().copied().zip(self.decode.iter().copied()).collect();
                self.nvfp4(tensor, |b| b * factor);
            }
            Family::Nvfp4 { four_over_six: false } => {
                let factor = tensor * if format.rounding.is_stochastic() { 17.0 / 96.0 } else { 1.0 / 6.0 };
                self.nvfp4(tensor, |b| b * factor);
            }
            _ => {
                for (i, &bits) in self.amax_bits.iter().enumerate() {
                    let (scale, _) = block_scales(format, f32::from_bits(bits), tensor);
                    (self.encode[i], self.divides) = match scale.encode {
                        Encode::Times(factor) => (factor, false),
                        Encode::Over(divisor) => (divisor, true),
                    };
                    self.decode[i] = scale.decode;
                }
            }
        }
    }

    /// S = e4m3(min(target(b), 448)), numerics::block_scale's steps in vectors.
    #[inline(always)]
    fn nvfp4(&mut self, g: f32, target: impl Fn(f32) -> f32) {
        let inverse = 1.0 / g;
        for ((&bits, encode), decode) in self.amax_bits.iter().zip(&mut self.encode).zip(&mut self.decode) {
            let s = round_e4m3(target(f32::from_bits(bits)).min(e4m3::MAX));
            *decode = s * inverse;
            *encode = if s == 0.0 { 0.0 } else { (1.0 / *decode).min(f32::MAX) };
        }
    }

    /// The elements of block `index` of one row; how many saturated.
    #[inline(always)]
    fn apply<R: ElementRounding>(&self, index: usize, block: &mut [f32], uniforms: &[u16]) -> u32 {
        if self.amax_bits[index] >= INFINITY_BITS {
            block.fill(f32::NAN);
            return 0;
        }
        let (mut encode, mut decode) = (self.encode[index], self.decode[index]);
        if let Some(&(other_encode, other_decode)) = self.other.get(index)
            && squared_error(block, other_encode, other_decode) < squared_error(block, encode, decode)
        {
            (encode, decode) = (other_encode, other_decode);
        }
        let mut saturated = 0u32;
        let (uniform_groups, uniform_tail) =
            uniforms[..if R::STOCHASTIC { block.len() } else { 0 }].as_chunks::<GROUP>();
        let (groups, tail) = block.as_chunks_mut::<GROUP>();
        for (i, group) in groups.iter_mut().enumerate() {
            let u = if R::STOCHASTIC { &uniform_groups[i] } else { &[0; GROUP] };
            saturated = saturated.wrapping_add(round_group::<R>(group, u, encode, decode, self.divides));
        }
        if !tail.is_empty() {
            let (mut x, mut u) = ([0.0; GROUP], [0; GROUP]);
            x[..tail.len()].copy_from_slice(tail);
            u[..uniform_tail.len()].copy_from_slice(uniform_tail);
            saturated = saturated.wrapping_add(round_group::<R>(&mut x, &u, encode, decode, self.divides));
            tail.copy_from_slice(&x[..tail.len()]);
        }
        saturated
    }
}

/// y in place of x; how many of the scaled magnitudes exceed the largest element.
#[inline(always)]
fn round_group<R: ElementRounding>(
    x: &mut [f32; GROUP],
    u: &[u16; GROUP],
    encode: f32,
    decode: f32,
    divides: bool,
) -> u32 {
    let mut magnitudes = [0f32; GROUP];
    if divides {
        (0..GROUP).for_each(|i| magnitudes[i] = (x[i] / encode).abs());
    } else {
        (0..GROUP).for_each(|i| magnitudes[i] = (x[i] * encode).abs());
    }
    let mut saturated = 0u32;
    for i in 0..GROUP {
        saturated = saturated.wrapping_add((magnitudes[i] > R::MAX) as u32);
        let a = if magnitudes[i] > R::MAX { R::MAX } else { magnitudes[i] };
        let u = if R::STOCHASTIC { u[i] as f32 * (1.0 / 65_536.0) } else { 0.0 };
        x[i] = R::round(a, u).copysign(x[i]) * decode;
    }
    saturated
}

/// As `block_format::squared_error`: differences in f32, squares in f64, summed in halves.
#[inline(always)]
fn squared_error(block: &[f32], encode: f32, decode: f32) -> f64 {
    let x = match block.first_chunk::<GROUP>() {
        Some(whole) => *whole,
        None => std::array::from_fn(|i| block.get(i).copied().unwrap_or(0.0)),
    };
    let mut y = x;
    round_group::<E2m1Nearest>(&mut y, &[0; GROUP], encode, decode, false);
    let mut squares = [0f64; GROUP];
    for i in 0..GROUP {
        let error = (y[i] - x[i]) as f64;
        squares[i] = error * error;
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            squares[i] += squares[i + half];
        }
    }
    squares[0]
}

/// Bits of the largest magnitude: as integers they order as the magnitudes do, with infinity and NaN above.
#[inline(always)]
fn largest_bits<T: Element>(block: &[T]) -> u32 {
    let (groups, tail) = block.as_chunks::<GROUP>();
    let mut lanes = [0u32; GROUP];
    for group in groups {
        lanes = std::array::from_fn(|i| lanes[i].max(group[i].read().to_bits() & 0x7FFF_FFFF));
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] = lanes[i].max(lanes[i + half]);
        }
    }
    tail.iter().map(|x| x.read().to_bits() & 0x7FFF_FFFF).fold(lanes[0], u32::max)
}
