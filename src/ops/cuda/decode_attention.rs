//! Attention of one new token a sequence on a CUDA device: kernels/decode_attention.cu. What it means stands in
//! ops/decode_attention.rs.
#![allow(unsafe_code)]

use std::ffi::c_void;

use tch::{Kind, Tensor};

use super::batch::{are_aligned, dtype_suffix};
use super::launch::{Executor, Launch, Needs, Prepared};
use crate::{Error, Result};

/// Whether there is a kernel for heads of so many columns.
pub fn is_supported(dim: i64) -> bool {
    dim == 64 || dim == 128
}

#[derive(Clone, Copy)]
pub struct Heads<'a> {
    pub q: &'a Tensor,       // [rows, heads, dim] f32, bf16 or f16, contiguous
    pub keys: &'a Tensor,    // [rows, kv_heads, capacity, dim]; a part of the capacity of a larger cache may be given
    pub values: &'a Tensor,  // as keys
    pub lengths: &'a Tensor, // i64 [rows]; what exceeds the capacity is not read
    pub longest: i64,        // upper bound of the lengths
    pub scale: f32,
}

/// [rows, heads * dim] of q's dtype.
///
/// # Errors
/// `Runtime` naming the tensor of the wrong device, dtype, shape or strides; `Unavailable` without kernels or driver.
pub fn decode_attention(executor: &dyn Executor, heads: &Heads) -> Result<Tensor> {
    let (prepared, out) = prepare(executor, heads)?;
    prepared.run(executor)?;
    Ok(out)
}

/// The launches of [`decode_attention`] and what they write. Keys are split where blocks are few for the device.
///
/// # Errors
/// As [`decode_attention`].
pub fn prepare(executor: &dyn Executor, heads: &Heads) -> Result<(Prepared, Tensor)> {
    let Shape { rows, kv_heads, chunks, .. } = shape_of(heads)?;
    let blocks = rows * kv_heads * chunks;
    let wanted = BLOCKS_OF_MULTIPROCESSOR * i64::from(executor.properties()?.multiprocessors);
    let most = (heads.longest / LEAST_KEYS).clamp(1, MOST_SPLITS);
    let splits = if blocks == 0 { 1 } else { (wanted / blocks).clamp(1, most) };
    prepare_split(executor, heads, splits as u32)
}

/// [`prepare`] with a number of splits.
///
/// # Errors
/// As [`decode_attention`].
pub fn prepare_split(executor: &dyn Executor, heads: &Heads, splits: u32) -> Result<(Prepared, Tensor)> {
    let device = executor.device();
    let Shape { rows, heads: count, kv_heads, capacity, dim, chunks } = shape_of(heads)?;
    let kind = heads.q.kind();
    let suffix = dtype_suffix("decode_attention: q", kind)?;
    let q = Needs { name: "decode_attention: q", kinds: &[kind], shape: &[rows, count, dim], device }.check(heads.q)?;
    let lengths = Needs { name: "decode_attention: lengths", kinds: &[Kind::Int64], shape: &[rows], device };
    let lengths = lengths.check(heads.lengths)?;
    let cache = [rows, kv_heads, capacity, dim];
    let [keys, values] = [("decode_attention: keys", heads.keys), ("decode_attention: values", heads.values)]
        .map(|(name, tensor)| checked_cache(&Needs { name, kinds: &[kind], shape: &cache, device }, tensor));
    let (keys, values) = (keys?, values?);
    let strides = heads.keys.stride();
    if heads.values.stride() != strides
        || !are_aligned([q, keys, values])
        || strides.iter().any(|s| s % 8 != 0 && *s != 1)
    {
        return Err(Error::Runtime(format!(
            "decode_attention: found strides {strides:?} of keys and {:?} of values, expected the same and 16-byte rows",
            heads.values.stride()
        )));
    }
    let blocks = rows * kv_heads * chunks * i64::from(splits);
    if blocks > i64::from(i32::MAX) || capacity > i64::from(i32::MAX) {
        return Err(Error::Runtime(format!("decode_attention: {blocks} blocks are too many for one launch")));
    }
    let out = Tensor::f_empty([rows, count * dim], (kind, device))?;
    let parts = match splits {
        1 => None,
        _ => Some(Tensor::f_empty([rows, count, i64::from(splits), dim + 2], (Kind::Float, device))?),
    };
    let args = Args {
        q,
        keys,
        values,
        lengths,
        out: parts.as_ref().unwrap_or(&out).data_ptr(),
        row_stride: strides[0] as u64,
        head_stride: strides[1] as u64,
        heads: count as u32,
        kv_heads: kv_heads as u32,
        capacity: capacity as u32,
        splits,
        scale: heads.scale,
        unused: 0,
    };
    let launch = |kernel: String, blocks: i64| (kernel, blocks as u32);
    let mut launches = Vec::new();
    if blocks > 0 {
        let (kernel, blocks) = launch(format!("decode_attention_{suffix}_{dim}"), blocks);
        launches.push(Launch::new("decode_attention", kernel, blocks, &args).with_blocks_of(THREADS, 0));
    }
    if let (Some(parts), true) = (&parts, blocks > 0) {
        let args = JoinArgs { parts: parts.data_ptr(), out: out.data_ptr(), splits, dim: dim as u32 };
        let (kernel, blocks) = launch(format!("decode_attention_join_{suffix}"), rows * count);
        launches.push(Launch::new("decode_attention", kernel, blocks, &args).with_blocks_of(THREADS, 0));
    }
    let tensors =
        [Some(heads.q), Some(heads.keys), Some(heads.values), Some(heads.lengths), Some(&out), parts.as_ref()];
    let memory = tensors.into_iter().flatten().map(Tensor::shallow_clone).collect();
    // SAFETY: what is read was checked above, the kernel clamps lengths to the capacity; the rest was made here, and all of
    // it is in `memory`.
    Ok((unsafe { Prepared::new(launches, device, memory) }, out))
}

/// `kDecodeThreads` and `kQueries` of kernels/decode_attention.cu.
const THREADS: u32 = 128;
const QUERIES: i64 = 8;
/// Splits are made until so many blocks are there for each multiprocessor, of at least so many keys.
const BLOCKS_OF_MULTIPROCESSOR: i64 = 4;
const LEAST_KEYS: i64 = 64;
const MOST_SPLITS: i64 = 64;

struct Shape {
    rows: i64,
    heads: i64,
    kv_heads: i64,
    capacity: i64,
    dim: i64,
    /// Blocks that share a key head's queries.
    chunks: i64,
}

fn shape_of(heads: &Heads) -> Result<Shape> {
    let (q, keys) = (heads.q.size(), heads.keys.size());
    match (&q[..], &keys[..]) {
        (&[rows, count, dim], &[_, kv_heads, capacity, _])
            if kv_heads > 0 && count > 0 && count % kv_heads == 0 && is_supported(dim) =>
        {
            let chunks = (count / kv_heads + QUERIES - 1) / QUERIES;
            Ok(Shape { rows, heads: count, kv_heads, capacity, dim, chunks })
        }
        _ => Err(Error::Runtime(format!(
            "decode_attention: found q {q:?} and keys {keys:?}, expected [rows, heads, 64 or 128] and [rows, kv_heads, \
             capacity, dim] with heads a multiple of kv_heads"
        ))),
    }
}

/// As [`Needs::check`], but of the capacity a part may be given.
fn checked_cache(needs: &Needs, tensor: &Tensor) -> Result<*mut c_void> {
    let strides = tensor.stride();
    let dim = needs.shape[3];
    // A head alone must be contiguous; the first one stands for all.
    if tensor.size() == needs.shape && tensor.device() == needs.device && strides[2..] == [dim, 1] && tensor.numel() > 0
    {
        let of_head = Needs { shape: &needs.shape[2..], ..*needs };
        return of_head.check(&tensor.f_select(0, 0)?.f_select(0, 0)?);
    }
    needs.check(tensor)
}

/// `DecodeArgs`.
#[repr(C)]
struct Args {
    q: *const c_void,
    keys: *const c_void,
    values: *const c_void,
    lengths: *const c_void,
    out: *mut c_void,
    row_stride: u64,
    head_stride: u64,
    heads: u32,
    kv_heads: u32,
    capacity: u32,
    splits: u32,
    scale: f32,
    unused: u32,
}

/// `JoinArgs`.
#[repr(C)]
struct JoinArgs {
    parts: *const c_void,
    out: *mut c_void,
    splits: u32,
    dim: u32,
}
