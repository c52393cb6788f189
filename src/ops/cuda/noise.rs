//! Noise on a batch of matrices on a CUDA device: kernels/noise.cu. It makes the error of a matrix product
//! (ops/matmul_error.rs) and AQN (ops/perturb.rs); outputs bit for bit numerics::error_law and numerics::generator.
#![allow(unsafe_code)]

use std::ffi::c_void;

use tch::{Device, Kind, Tensor};

use super::batch::{Divider, tiles};
use super::launch::{BLOCK_THREADS, Executor, Launch, Needs, Prepared};
use crate::numerics::error_law::ErrorLaw;
use crate::numerics::generator::COLUMN_BLOCK;
use crate::ops::matmul_error::RowKeys;
use crate::{Error, Result};

/// A matrix that gets noise.
#[derive(Clone, Copy)]
pub struct Noisy<'a> {
    pub y: &'a Tensor,            // [rows, cols] f32, bf16 or f16, contiguous
    pub into: Destination<'a>,    // [rows, cols]
    pub bias: Option<&'a Tensor>, // [cols] f32
    pub keys: &'a RowKeys,        // [rows]
    pub scale: f32,
    pub stream: u32,
}

/// Where the result goes.
#[derive(Clone, Copy)]
pub enum Destination<'a> {
    /// round(law(y) + bias): f32, bf16 or f16 where y is f32, else of the dtype of y, which it may be.
    Store(&'a Tensor),
    /// += law(y), f32.
    Add(&'a Tensor),
}

/// What all matrices of a call share.
#[derive(Clone, Copy)]
pub struct Law<'a> {
    pub law: ErrorLaw,
    pub seed: u64,
    /// Of [`new_sums`], added to.
    pub sums: Option<&'a Tensor>,
}

/// Of a matrix's sums: kNoiseSlots and kNoiseStride of kernels/include/columns.cuh. Each block of threads adds to one of the places,
/// as additions to a single one would come one after the other.
const SLOTS: i64 = 16;
const STRIDE: i64 = 8;

/// Room for the sums of what is injected, f64 [matrices, SLOTS, STRIDE], zero: error, error^2, y^2, y^4, elements, where
/// error = round(y' + bias) - round(y + bias).
pub fn new_sums(matrices: i64, device: Device) -> Result<Tensor> {
    Ok(Tensor::f_zeros([matrices, SLOTS, STRIDE], (Kind::Double, device))?)
}

/// Reads them, matrix by matrix; waits for the device.
pub fn read_sums(sums: &Tensor) -> Result<Vec<[f64; 5]>> {
    let read = Vec::<f64>::try_from(sums.f_sum_dim_intlist([1i64].as_slice(), false, Kind::Double)?.f_flatten(0, -1)?)?;
    let five = |of_matrix: &[f64]| std::array::from_fn(|sum| of_matrix[sum]);
    Ok(read.chunks_exact(STRIDE as usize).map(five).collect())
}

/// A pointer to the sums of so many matrices on `device`.
pub(super) fn sums_pointer(name: &'static str, sums: &Tensor, matrices: i64, device: Device) -> Result<*mut c_void> {
    Needs { name, kinds: &[Kind::Double], shape: &[matrices, SLOTS, STRIDE], device }.check(sums)
}

/// Matrices whose y and results have one dtype each.
///
/// # Errors
/// `Runtime` naming the tensor of the wrong device, dtype, shape or strides; `Unavailable` without kernels or driver.
pub fn add_noise(executor: &dyn Executor, law: &Law, matrices: &[Noisy]) -> Result<()> {
    prepare(executor.device(), law, matrices)?.run(executor)
}

/// The launches of [`add_noise`].
///
/// # Errors
/// As [`add_noise`].
pub fn prepare(device: Device, law: &Law, matrices: &[Noisy]) -> Result<Prepared> {
    let kinds = matrices.first().map_or((Kind::Float, Kind::Float), |m| (m.y.kind(), m.into.tensor().kind()));
    let kernel = match kinds {
        (Kind::Float, Kind::Float) => "noise_f32",
        (Kind::Float, Kind::BFloat16) => "noise_f32_to_bf16",
        (Kind::Float, Kind::Half) => "noise_f32_to_f16",
        (Kind::BFloat16, Kind::BFloat16) => "noise_bf16",
        (Kind::Half, Kind::Half) => "noise_f16",
        (from, to) => return Err(Error::Runtime(format!("noise: from {from:?} to {to:?} has no kernel"))),
    };
    let pointer = |sums| sums_pointer("noise: sums", sums, matrices.len() as i64, device);
    let sums = law.sums.map(pointer).transpose()?;
    let mut launches = Vec::new();
    for (number, chunk) in matrices.chunks(BATCH).enumerate() {
        let tensors = chunk.iter().map(|m| m.describe(device, kinds)).collect::<Result<Vec<_>>>()?;
        let before = number * BATCH * (SLOTS * STRIDE) as usize * size_of::<f64>();
        let mut batch = Box::new(KernelBatch {
            count: chunk.len() as u32,
            law: law_number(law.law),
            seed: law.seed,
            sums: sums.map_or(std::ptr::null_mut(), |sums| sums.wrapping_byte_add(before)),
            tensors: [KernelTensor::default(); BATCH],
        });
        let mut blocks = 0;
        for (to, (from, tiles)) in batch.tensors.iter_mut().zip(tensors) {
            *to = KernelTensor { first_tile: blocks, ..from };
            blocks += tiles;
        }
        if blocks > 0 {
            launches.push(Launch::new("noise", kernel.to_string(), blocks, &*batch));
        }
    }
    let of_matrix = |m: &Noisy| [Some(m.y), Some(m.into.tensor()), m.bias].map(|t| t.map(Tensor::shallow_clone));
    let mut memory: Vec<Tensor> = matrices.iter().flat_map(of_matrix).flatten().collect();
    memory.extend(matrices.iter().filter_map(|m| m.keys.if_on_device()));
    memory.extend(law.sums.map(Tensor::shallow_clone));
    // SAFETY: `Needs` has checked device, dtype, shape and strides of everything that is pointed to; it is in `memory`.
    Ok(unsafe { Prepared::new(launches, device, memory) })
}

impl Destination<'_> {
    fn tensor(&self) -> &Tensor {
        match self {
            Destination::Store(tensor) | Destination::Add(tensor) => tensor,
        }
    }
}

impl Noisy<'_> {
    /// What the kernel wants to know, and the blocks of threads that the matrix takes.
    fn describe(&self, device: Device, (from, to): (Kind, Kind)) -> Result<(KernelTensor, u32)> {
        let [rows, cols] = self.y.size()[..] else {
            return Err(Error::Runtime(format!("noise: y: found shape {:?}, expected [rows, cols]", self.y.size())));
        };
        let needs = |name, kind: Kind, shape: &[i64], tensor: &Tensor| {
            Needs { name, kinds: &[kind], shape, device }.check(tensor)
        };
        let y = needs("noise: y", from, &[rows, cols], self.y)?;
        let out = needs("noise: out", to, &[rows, cols], self.into.tensor())?;
        let accumulates = matches!(self.into, Destination::Add(_));
        if accumulates && (to != Kind::Float || self.bias.is_some()) {
            return Err(Error::Runtime(format!("noise: found a sum in {to:?} or with a bias, expected f32 without")));
        }
        let bias = match self.bias {
            Some(bias) => needs("noise: bias", Kind::Float, &[cols], bias)?,
            None => std::ptr::null_mut(),
        };
        if self.keys.len() as i64 != rows {
            return Err(Error::Runtime(format!("noise: {} row keys for {rows} rows", self.keys.len())));
        }
        let (keys, keys_flag) = match self.keys.first_of_consecutive() {
            Some(first) => (first, 0),
            None => {
                let keys = self.keys.on_device(device)?;
                (needs("noise: keys", Kind::Int64, &[rows], &keys)? as u64, KEY_ARRAY)
            }
        };
        let calls = (cols as usize).div_ceil(COLUMN_BLOCK) * 4;
        let tiles = tiles("noise: y", rows as usize, calls, TILE_CALLS)?;
        let aligned = |pointer: *mut c_void| (pointer as usize).is_multiple_of(8);
        let whole = (cols as usize).is_multiple_of(COLUMN_BLOCK) && aligned(y) && aligned(out) && aligned(bias);
        let flag = |on: bool, bit: u32| if on { bit } else { 0 };
        let tensor = KernelTensor {
            y,
            out,
            bias,
            keys,
            rows: rows as u32,
            cols: cols as u32,
            first_tile: 0,
            stream: self.stream,
            by_row: Divider::new(calls as u32),
            scale: self.scale,
            flags: keys_flag | flag(whole, WHOLE_BLOCKS) | flag(accumulates, ACCUMULATE),
        };
        Ok((tensor, tiles))
    }
}

/// `NoiseTensor` of kernels/noise.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct KernelTensor {
    y: *const c_void,
    out: *mut c_void,
    bias: *const c_void,
    keys: u64,
    rows: u32,
    cols: u32,
    first_tile: u32,
    stream: u32,
    by_row: Divider,
    scale: f32,
    flags: u32,
}

impl Default for KernelTensor {
    fn default() -> KernelTensor {
        KernelTensor {
            y: std::ptr::null(),
            out: std::ptr::null_mut(),
            bias: std::ptr::null(),
            keys: 0,
            rows: 0,
            cols: 0,
            first_tile: 0,
            stream: 0,
            by_row: Divider::default(),
            scale: 0.0,
            flags: 0,
        }
    }
}

/// `NoiseFlags`.
const KEY_ARRAY: u32 = 1;
const WHOLE_BLOCKS: u32 = 2;
const ACCUMULATE: u32 = 4;

/// `NoiseBatch`.
#[repr(C)]
struct KernelBatch {
    count: u32,
    law: u32,
    seed: u64,
    sums: *mut c_void,
    tensors: [KernelTensor; BATCH],
}

/// Matrices of one launch.
const BATCH: usize = 62;
/// `kTileCalls`.
const TILE_CALLS: u32 = 4 * BLOCK_THREADS;

/// `ErrorLaw` of kernels/include/error_law.cuh: that of a product without error.
pub(super) const NO_ERROR: u32 = 3;

/// ... of a law.
pub(super) fn law_number(law: ErrorLaw) -> u32 {
    match law {
        ErrorLaw::RelativeGaussian => 0,
        ErrorLaw::AbsoluteGaussian => 1,
        ErrorLaw::SystematicBias => 2,
    }
}
