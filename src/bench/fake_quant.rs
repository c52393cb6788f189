//! Fake quantization of Qwen2.5-1.5B's weight shapes in every format, beside a copy of the matrix and a torch chain.

use half::bf16;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::timing::{Runner, Times, WallClock, in_turns};
use super::{Options, ROTATED_BYTES, Row, torch_chain};
use crate::numerics::block_format::{RoundingDraw, TensorScale};
use crate::numerics::format::Format;
use crate::ops::cpu::fake_quant::{Task, chunk_elements};
use crate::ops::cpu::normals::normals_into;
use crate::ops::cpu::tensor::{bf16_slice, bf16_slice_mut, f32_slice, f32_slice_mut};
use crate::{Error, Result};

/// What is timed: a format, whether the sums of its error are taken in the same pass, and what it is held against.
const CASES: [(&str, bool, &str); 18] = [
    ("mxfp4", false, "copy"),
    ("mxfp4", true, "mxfp4"),
    ("mxfp4:even", false, "mxfp4"),
    ("mxfp4:rceil", false, "mxfp4"),
    ("mxfp4:half_away", false, "mxfp4"),
    ("mxfp4:sr", false, "mxfp4"),
    ("mxfp4:sr8", false, "mxfp4"),
    ("mxfp4:2d", false, "mxfp4"),
    ("nvfp4", false, "mxfp4"),
    ("nvfp4", true, "nvfp4"),
    ("nvfp4:4over6", false, "nvfp4"),
    ("nvfp4:sr", false, "nvfp4"),
    ("nvfp4:2d", false, "nvfp4"),
    ("mxfp8", false, "mxfp4"),
    ("mxfp8:sr", false, "mxfp8"),
    ("fp8", false, "mxfp4"),
    ("fp8:tensor", false, "mxfp4"),
    ("nvfp4_single_level", false, "nvfp4"),
];
/// Rows and columns of down_proj, o_proj and k_proj.
const SHAPES: [(usize, usize); 3] = [(1536, 8960), (1536, 1536), (256, 1536)];

pub fn rows(options: &Options) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (number, (n, k)) in SHAPES.into_iter().enumerate() {
        for kind in [Kind::BFloat16, Kind::Float] {
            let dtype = if kind == Kind::BFloat16 { "bf16" } else { "f32" };
            if options.begins(&format!("fake_quant {dtype} [{n}, {k}]")) {
                // The chains take most of the time; the largest matrix shows what they cost.
                rows.extend(group(n, k, kind, dtype, number == 0)?);
            }
        }
    }
    Ok(rows)
}

fn group(n: usize, k: usize, kind: Kind, dtype: &'static str, chains: bool) -> Result<Vec<Row>> {
    let bytes = n * k * if kind == Kind::BFloat16 { 2 } else { 4 };
    let buffers = &Buffers::new(n, k, kind, ROTATED_BYTES.div_ceil(bytes).max(2))?;
    let formats: Vec<Format> = CASES.iter().map(|(format, ..)| format.parse()).collect::<Result<_>>()?;
    let mut runners = vec![Runner::new(|turn| buffers.copy(turn))];
    for (format, (_, with_errors, _)) in formats.iter().zip(CASES) {
        runners.push(Runner::new(move |turn| buffers.quantize(turn, *format, with_errors)));
    }
    let mut with_chain = Vec::new();
    for (place, format) in formats.iter().enumerate().filter(|(place, _)| chains && !CASES[*place].1) {
        if buffers.chain_agrees(*format)? {
            with_chain.push(place);
            runners.push(Runner::slow(|turn| torch_chain::fake_quant(buffers.x(turn), *format).map(drop)));
        }
    }
    let times = in_turns(&WallClock, runners)?;
    let (copy, rest) = (&times[0], &times[1..]);
    let (quantized, chained) = rest.split_at(CASES.len());
    let row = |name: &str, times: &Times| Row::new(name, &[n, k], dtype, times);
    let mut rows = vec![row("copy", copy).moving(2 * bytes)];
    for (place, ((name, with_errors, baseline), times)) in CASES.into_iter().zip(quantized).enumerate() {
        // A tensor amax comes first: x is read twice.
        let passes = if formats[place].has_tensor_scale() { 3 } else { 2 };
        let suffix = if with_errors { " with error sums" } else { "" };
        let mut row = row(&format!("fake_quant {name}{suffix}"), times).moving(passes * bytes).beside_copy(copy);
        if let Some(baseline) = CASES.iter().position(|(name, ..)| *name == baseline) {
            row = row.beside(CASES[baseline].0, &quantized[baseline]);
        }
        if let Some(chain) = with_chain.iter().position(|p| *p == place) {
            row = row.beside_chain(&chained[chain]);
        }
        rows.push(row);
    }
    Ok(rows)
}

/// Inputs and outputs [n, k] that take turns.
struct Buffers {
    n: usize,
    k: usize,
    x: Vec<Tensor>,
    out: Vec<Tensor>,
    row_keys: Vec<u64>,
}

impl Buffers {
    /// Normal values of a weight's size.
    fn new(n: usize, k: usize, kind: Kind, count: usize) -> Result<Buffers> {
        let (mut x, mut out) = (Vec::new(), Vec::new());
        for number in 0..count {
            let mut values = Tensor::f_empty([n as i64, k as i64], (Kind::Float, Device::Cpu))?;
            let rows = f32_slice_mut(&mut values)?.par_chunks_mut(k).enumerate();
            rows.for_each(|(row, out)| normals_into(0, 0, (number * n + row) as u64, out));
            x.push(values.f_mul_scalar_(0.02)?.f_to_kind(kind)?);
            out.push(Tensor::f_zeros([n as i64, k as i64], (kind, Device::Cpu))?);
        }
        Ok(Buffers { n, k, x, out, row_keys: (0..n as u64).collect() })
    }

    fn x(&self, turn: usize) -> &Tensor {
        &self.x[turn % self.x.len()]
    }

    fn out(&self, turn: usize) -> Tensor {
        self.out[turn % self.out.len()].shallow_clone()
    }

    /// The ceiling: the same bytes in and out, in the chunks and by the threads of the quantization.
    fn copy(&self, turn: usize) -> Result<()> {
        fn chunks<T: Copy + Send + Sync>(x: &[T], out: &mut [T], chunk: usize) {
            x.par_chunks(chunk).zip(out.par_chunks_mut(chunk)).for_each(|(x, out)| out.copy_from_slice(x));
        }
        let (x, mut out, chunk) = (self.x(turn), self.out(turn), chunk_elements(self.k, Format::MXFP4));
        match x.kind() {
            Kind::BFloat16 => chunks::<bf16>(bf16_slice(x)?, bf16_slice_mut(&mut out)?, chunk),
            _ => chunks::<f32>(f32_slice(x)?, f32_slice_mut(&mut out)?, chunk),
        }
        Ok(())
    }

    fn quantize(&self, turn: usize, format: Format, with_errors: bool) -> Result<()> {
        let draw = RoundingDraw { seed: 0, stream: 0, row_keys: &self.row_keys };
        let task = Task { with_errors, ..Task::new(format, TensorScale::Tensor, Some(&draw)) };
        let (x, mut out) = (self.x(turn), self.out(turn));
        match x.kind() {
            Kind::BFloat16 => task.run(bf16_slice(x)?, self.n, self.k, bf16_slice_mut(&mut out)?),
            _ => task.run(f32_slice(x)?, self.n, self.k, f32_slice_mut(&mut out)?),
        };
        Ok(())
    }

    /// Whether there is a chain; an error where its values are not ours.
    fn chain_agrees(&self, format: Format) -> Result<bool> {
        let Some(chain) = torch_chain::fake_quant(self.x(0), format)? else {
            return Ok(false);
        };
        if format.rounding.is_stochastic() {
            return Ok(true);
        }
        self.quantize(0, format, false)?;
        let differ = i64::try_from(chain.f_ne_tensor(&self.out(0))?.f_sum(Kind::Int64)?)?;
        if differ != 0 {
            return Err(Error::Runtime(format!("bench: {differ} values of {format} differ from the torch chain's")));
        }
        Ok(true)
    }
}
