//! The kernels of a GPU, beside a copy and a chain of torch operations on the same device in the same run. Launches are
//! prepared once and repeated, so that a time is the device's and not that of building arguments; buffers rotate and exceed
//! the L2 cache.

mod choices;
mod decoding;
mod fake_quant;
mod matmul;
mod noise;
mod small_ops;

use tch::{Kind, Tensor};

use super::timing::{Clock, Times};
use super::{Options, Row};
use crate::Result;
use crate::ops::cuda::launch::{Executor, Prepared};
use crate::ops::cuda::matmul::MeasuredChoice;
pub use decoding::Cache;
pub use matmul::Model;

/// The matrices that are timed.
pub struct Shapes {
    /// Weights of a linear [out, in], each with how many formats are timed: all, or the two of weights.
    pub weights: &'static [((usize, usize), Formats)],
    /// Products of a linear [tokens, out], which get noise.
    pub products: &'static [(usize, usize)],
    /// The linears of a layer [out, in], and the layers: quantized in one call.
    pub layer: &'static [(usize, usize)],
    pub layers: usize,
    /// Norms, and their size: perturbed in one call.
    pub norms: (usize, usize),
    /// Whose linears are multiplied, for so many tokens each.
    pub models: &'static [Model],
    pub tokens: &'static [usize],
    /// Of the product that shows what torch can do at most.
    pub square: usize,
    /// The residual stream [tokens, hidden]: its norms.
    pub streams: &'static [(usize, usize)],
    /// The inside of an MLP [tokens, intermediate].
    pub gates: &'static [(usize, usize)],
    /// Queries and keys that are rotated: (tokens, heads, kv_heads, dim).
    pub heads: &'static [(usize, usize, usize, usize)],
    /// Of which the next tokens are chosen [rows, vocab].
    pub logits: &'static [(usize, usize)],
    /// Caches that one new token a sequence attends to.
    pub caches: &'static [Cache],
    /// The inputs of one kind hold at least this much together.
    pub rotated_bytes: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Formats {
    All,
    Weights,
}

/// Qwen2.5-1.5B and 7B, and matrices of 1 GiB.
pub const GPU: Shapes = Shapes {
    weights: &[
        ((8960, 1536), Formats::All),
        ((1536, 8960), Formats::Weights),
        ((1536, 1536), Formats::Weights),
        ((256, 1536), Formats::Weights),
        ((18944, 3584), Formats::Weights),
        ((3584, 3584), Formats::Weights),
        ((65536, 8192), Formats::Weights),
    ],
    products: &[(4096, 1536), (4096, 8960), (16384, 8960), (4096, 18944)],
    layer: &[(1536, 1536), (256, 1536), (256, 1536), (1536, 1536), (8960, 1536), (8960, 1536), (1536, 8960)],
    layers: 28,
    norms: (57, 1536),
    models: &[QWEN_1_5B, QWEN_7B],
    tokens: &[1, 8, 64, 640, 4096, 16384],
    square: 8192,
    streams: &[(64, 1536), (4096, 1536), (16384, 1536), (4096, 3584)],
    gates: &[(64, 8960), (4096, 8960), (16384, 8960), (4096, 18944)],
    heads: &[(64, 12, 2, 128), (4096, 12, 2, 128), (16384, 12, 2, 128)],
    logits: &[(8, 151_936), (64, 151_936), (512, 151_936)],
    caches: &[
        Cache { rows: 8, heads: 12, kv_heads: 2, capacity: 1024, dim: 128 },
        Cache { rows: 64, heads: 12, kv_heads: 2, capacity: 1024, dim: 128 },
        Cache { rows: 512, heads: 12, kv_heads: 2, capacity: 1024, dim: 128 },
        Cache { rows: 64, heads: 28, kv_heads: 4, capacity: 1024, dim: 128 },
    ],
    rotated_bytes: 256 << 20,
};

const QWEN_1_5B: Model = Model {
    name: "Qwen2.5-1.5B",
    linears: &[((1536, 1536), 2), ((256, 1536), 2), ((8960, 1536), 2), ((1536, 8960), 1)],
    fused: &[(2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960)],
};

const QWEN_7B: Model = Model {
    name: "Qwen2.5-7B",
    linears: &[((3584, 3584), 2), ((512, 3584), 2), ((18944, 3584), 2), ((3584, 18944), 1)],
    fused: &[(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)],
};

/// Times every kernel on the executor's device.
///
/// # Errors
/// `Unavailable` without kernels or driver; `OutOfMemory` where the buffers do not fit.
pub fn rows(executor: &dyn Executor, clock: &dyn Clock, shapes: &Shapes, options: &Options) -> Result<Vec<Row>> {
    let device = OnDevice { executor, clock, shapes };
    let mut rows = fake_quant::rows(&device, options)?;
    rows.extend(noise::rows(&device, options)?);
    rows.extend(matmul::rows(&device, options)?);
    rows.extend(small_ops::rows(&device, options)?);
    rows.extend(decoding::rows(&device, options)?);
    Ok(rows)
}

/// The fastest choice for every product of the shapes.
///
/// # Errors
/// As [`rows`].
pub fn choices(
    executor: &dyn Executor,
    clock: &dyn Clock,
    shapes: &Shapes,
    options: &Options,
) -> Result<Vec<MeasuredChoice>> {
    choices::measure(&OnDevice { executor, clock, shapes }, options)
}

/// What every group needs.
struct OnDevice<'a> {
    executor: &'a dyn Executor,
    clock: &'a dyn Clock,
    shapes: &'a Shapes,
}

impl OnDevice<'_> {
    /// Enough normal matrices [rows, cols] of a weight's size to take turns.
    fn matrices(&self, (rows, cols): (usize, usize), kind: Kind) -> Result<Vec<Tensor>> {
        let bytes = rows * cols * kind.elt_size_in_bytes();
        self.some(self.shapes.rotated_bytes.div_ceil(bytes).max(2), (rows, cols), kind)
    }

    fn some(&self, count: usize, (rows, cols): (usize, usize), kind: Kind) -> Result<Vec<Tensor>> {
        let matrix = |_| {
            let normal = Tensor::f_randn([rows as i64, cols as i64], (Kind::Float, self.executor.device()))?;
            Ok(normal.f_mul_scalar(0.02)?.f_to_kind(kind)?)
        };
        (0..count).map(matrix).collect()
    }

    /// One of the prepared calls, in turns.
    fn run(&self, prepared: &[Prepared], turn: usize) -> Result<()> {
        prepared[turn % prepared.len()].run(self.executor)
    }
}

/// A row that moves `bytes`, with its share of what a copy moves in the same time.
fn moving(name: &str, shape: &[usize], dtype: &'static str, times: &Times, bytes: usize, copy: &Copy) -> Row {
    let row = Row::new(name, shape, dtype, times).moving(bytes).beside_copy(copy.times);
    Row { copy_bandwidth_ratio: Some(bytes as f64 / times.min_us() / copy.bytes_per_us()), ..row }
}

/// A copy of a matrix by torch: what the memory can do.
struct Copy<'a> {
    times: &'a Times,
    bytes: usize,
}

impl Copy<'_> {
    fn bytes_per_us(&self) -> f64 {
        self.bytes as f64 / self.times.min_us()
    }
}
