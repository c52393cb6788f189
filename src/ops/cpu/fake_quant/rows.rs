//! Rows of blocks, a segment at a time: the amaxes of its blocks, its uniforms, then the code of the format.

use super::element::{Element, Word};
use super::four_over_six::{self, Candidates};
use super::mx::{self, E2m1, E2m1Stochastic, E4m3, E4m3Stochastic};
use super::scales::{self, Nvfp4Scale, Scales};
use super::{amaxes, lanes, nvfp4, rounders, uniforms};
use crate::numerics::block_format::RoundingDraw;
use crate::numerics::format::{Family, Format, Rounding};
use crate::ops::cpu::path::Path;

/// Columns that take all steps before the next ones do: what a step leaves in L1 is there for the next step, and memory
/// is read and written at an even pace.
pub(super) const SEGMENT: usize = 768;
/// What is left of a row is padded with zeros to a multiple of this, so that no code below meets a ragged end.
pub(super) const STRIP: usize = 256;

/// Where nothing draws.
static NO_UNIFORMS: [u16; SEGMENT] = [0; SEGMENT];

/// What all rows of a chunk share, and what they work with: empty where the format has no use for it.
pub(super) struct Rows<'a, T: Element> {
    path: Path,
    format: Format,
    draw: Option<&'a RoundingDraw<'a>>,
    uniforms: Vec<u16>,
    amaxes: Vec<T::Word>,
    scales: Scales,
    /// Of 4over6.
    candidates: Option<Candidates>,
}

impl<'a, T: Element> Rows<'a, T> {
    pub fn new(path: Path, format: Format, draw: Option<&'a RoundingDraw<'a>>) -> Self {
        let blocks = if format.block_size(SEGMENT) == 16 { SEGMENT / 16 } else { 0 };
        let four_over_six = format.family == Family::Nvfp4 { four_over_six: true };
        Rows {
            path,
            format,
            draw,
            uniforms: vec![0; draw.map_or(0, |_| SEGMENT)],
            amaxes: vec![T::Word::ZERO; blocks],
            scales: Scales::new(blocks),
            candidates: four_over_six.then(|| Candidates::new(blocks)),
        }
    }

    /// y of row `row`; (blocks with NaN or infinity that are not tiles, saturated elements). `tiles`: the amaxes of its tiles
    /// (`amaxes::of_band`), if it has some. `tensor`: G for nvfp4.
    pub fn quantize(&mut self, row: usize, x: &[T], tiles: &[T::Word], tensor: f32, out: &mut [T]) -> (usize, usize) {
        let mut met = (0, 0);
        for (number, (x, out)) in x.chunks(SEGMENT).zip(out.chunks_mut(SEGMENT)).enumerate() {
            let first = number * SEGMENT;
            let (nonfinite_blocks, saturated) = if x.len() % STRIP == 0 {
                self.segment(row, first, x, tiles, tensor, out)
            } else {
                let (mut y, len) = ([T::ZERO; SEGMENT], x.len().next_multiple_of(STRIP));
                let met = self.segment(row, first, &padded(x)[..len], tiles, tensor, &mut y[..len]);
                out.copy_from_slice(&y[..out.len()]);
                met
            };
            met = (met.0 + nonfinite_blocks, met.1 + saturated);
        }
        met
    }

    /// `quantize` of whole strips from column `col` on.
    fn segment(
        &mut self,
        row: usize,
        col: usize,
        x: &[T],
        tiles: &[T::Word],
        tensor: f32,
        out: &mut [T],
    ) -> (usize, usize) {
        let (path, format, block) = (self.path, self.format, self.format.block_size(x.len()));
        if let Some(draw) = self.draw {
            uniforms::fill(path, draw, format.rounding, row, col, x.len(), &mut self.uniforms);
        }
        let u = if self.draw.is_some() { &self.uniforms[..x.len()] } else { &NO_UNIFORMS[..x.len()] };
        let known = format.two_d.then(|| &tiles[col / block..][..x.len() / block]);
        let (nonfinite_blocks, saturated) = match (format.family, format.rounding) {
            (Family::Mxfp4 { rule }, Rounding::NearestEven) => mx::row::<T, E2m1<false>>(path, x, known, rule, u, out),
            (Family::Mxfp4 { rule }, Rounding::HalfAway) => mx::row::<T, E2m1<true>>(path, x, known, rule, u, out),
            (Family::Mxfp4 { rule }, _) => mx::row::<T, E2m1Stochastic>(path, x, known, rule, u, out),
            (Family::Mxfp8 { rule }, rounding) => match rounding.is_stochastic() {
                true => mx::row::<T, E4m3Stochastic>(path, x, known, rule, u, out),
                false => mx::row::<T, E4m3>(path, x, known, rule, u, out),
            },
            _ => self.sixteens(x, known, tensor, out),
        };
        (if format.two_d { 0 } else { nonfinite_blocks }, saturated)
    }

    /// Of the formats with blocks of 16, whose scales are worth a step of their own.
    fn sixteens(&mut self, x: &[T], known: Option<&[T::Word]>, tensor: f32, out: &mut [T]) -> (usize, usize) {
        let Rows { path, format, draw, amaxes, uniforms, scales, candidates } = self;
        let (path, amaxes) = (*path, &mut amaxes[..x.len() / 16]);
        let u = if draw.is_some() { &uniforms[..x.len()] } else { &NO_UNIFORMS[..x.len()] };
        let nonfinite_blocks = match known {
            Some(known) => {
                amaxes.copy_from_slice(known);
                0
            }
            None => amaxes::of_blocks(path, x, 16, amaxes),
        };
        match candidates {
            _ if format.family == Family::Nvfp4SingleLevel => scales::single_level::<T>(path, amaxes, scales),
            Some(candidates) => four_over_six::choose(path, x, amaxes, tensor, candidates, scales),
            None => scales::nvfp4::<T>(path, Nvfp4Scale::of(*format, tensor), amaxes, scales),
        }
        let saturated = match (format.family, format.rounding.is_stochastic()) {
            (Family::Nvfp4SingleLevel, _) => lanes::row::<T, rounders::E2m1TowardZero>(path, x, scales, u, out),
            (_, true) => nvfp4::row::<T, true>(path, x, scales, u, out),
            (_, false) => nvfp4::row::<T, false>(path, x, scales, u, out),
        };
        (nonfinite_blocks, saturated)
    }
}

/// At most a segment, and zeros to a whole one.
pub(super) fn padded<T: Element>(x: &[T]) -> [T; SEGMENT] {
    let mut segment = [T::ZERO; SEGMENT];
    segment[..x.len()].copy_from_slice(x);
    segment
}
