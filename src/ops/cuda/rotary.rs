//! Rotary position embedding on a CUDA device: kernels/rotary.cu. What it means stands in ops/rotary.rs.
#![allow(unsafe_code)]

use std::ffi::c_void;

use tch::{Device, Kind, Tensor};

use super::batch::{Divider, are_aligned, dtype_suffix, tiles};
use super::launch::{BLOCK_THREADS, Executor, Launch, Needs, Prepared};
use crate::{Error, Result};

/// What is rotated, and how.
#[derive(Clone, Copy)]
pub struct Rotation<'a> {
    pub q: &'a Tensor,   // [tokens, heads, dim] f32, bf16 or f16; dim is even
    pub k: &'a Tensor,   // [tokens, kv_heads, dim]
    pub cos: &'a Tensor, // [tokens, 1, dim] f32
    pub sin: &'a Tensor, // [tokens, 1, dim] f32
    /// By the negative angle: the gradient.
    pub is_back: bool,
}

/// The rotated (q, k).
///
/// # Errors
/// `Runtime` naming the tensor of the wrong device, dtype, shape or strides; `Unavailable` without kernels or driver.
pub fn rotate(executor: &dyn Executor, rotation: &Rotation) -> Result<(Tensor, Tensor)> {
    let (prepared, rotated) = prepare(executor.device(), rotation)?;
    prepared.run(executor)?;
    Ok(rotated)
}

/// Where a decode step's keys and values go: row r at positions[r].
#[derive(Clone, Copy)]
pub struct Append<'a> {
    pub v: &'a Tensor,         // as k
    pub keys: &'a Tensor,      // [tokens, kv_heads, capacity, dim], as k
    pub values: &'a Tensor,    // as keys
    pub positions: &'a Tensor, // i64 [tokens]; what exceeds the capacity is not stored
}

/// The rotated q; the rotated k and `append.v` are put into the cache by the same launch.
///
/// # Errors
/// As [`rotate`].
pub fn rotate_and_append(executor: &dyn Executor, rotation: &Rotation, append: &Append) -> Result<Tensor> {
    let (prepared, rotated) = prepare_any(executor.device(), rotation, append.keys, Some(append))?;
    prepared.run(executor)?;
    Ok(rotated)
}

/// The launch of [`rotate`] and what it writes.
///
/// # Errors
/// As [`rotate`].
pub fn prepare(device: Device, rotation: &Rotation) -> Result<(Prepared, (Tensor, Tensor))> {
    let k_out = Tensor::f_empty(rotation.k.size(), (rotation.k.kind(), device))?;
    let (prepared, q_out) = prepare_any(device, rotation, &k_out, None)?;
    Ok((prepared, (q_out, k_out)))
}

/// The launch and the rotated q; the rotated k goes to `k_out`, a tensor like k or the cache's keys.
fn prepare_any(
    device: Device,
    rotation: &Rotation,
    k_out: &Tensor,
    append: Option<&Append>,
) -> Result<(Prepared, Tensor)> {
    let Rotation { q, k, cos, sin, is_back } = *rotation;
    let ([tokens, q_heads, dim], [_, k_heads, _]) = (shape_of("rotary: q", q)?, shape_of("rotary: k", k)?);
    let (kind, half) = (q.kind(), dim / 2);
    let suffix = dtype_suffix("rotary: q", kind)?;
    let check =
        |name, kind: Kind, shape: &[i64], tensor: &Tensor| Needs { name, kinds: &[kind], shape, device }.check(tensor);
    let q_out = Tensor::f_empty([tokens, q_heads, dim], (kind, device))?;
    let (of_q, of_k, of_angle) = ([tokens, q_heads, dim], [tokens, k_heads, dim], [tokens, 1, dim]);
    let mut args = Args {
        q: check("rotary: q", kind, &of_q, q)?,
        k: check("rotary: k", kind, &of_k, k)?,
        v: std::ptr::null(),
        q_out: check("rotary: rotated q", kind, &of_q, &q_out)?,
        k_out: std::ptr::null_mut(),
        v_out: std::ptr::null_mut(),
        cos: check("rotary: cos", Kind::Float, &of_angle, cos)?,
        sin: check("rotary: sin", Kind::Float, &of_angle, sin)?,
        positions: std::ptr::null(),
        capacity: 0,
        units: 0,
        q_heads: q_heads as u32,
        k_heads: k_heads as u32,
        half: half as u32,
        by_token: Divider::new(1),
        by_head: Divider::new(1),
        is_back: u32::from(is_back),
        is_whole: 0,
        unused: 0,
    };
    let mut memory: Vec<Tensor> = [q, k, cos, sin, &q_out, k_out].map(Tensor::shallow_clone).into();
    match append {
        None => args.k_out = check("rotary: rotated k", kind, &of_k, k_out)?,
        Some(append) => {
            let capacity = append.keys.size().get(2).copied().unwrap_or(0).clamp(0, i64::from(i32::MAX));
            let of_cache = [tokens, k_heads, capacity, dim];
            args.v = check("rotary: v", kind, &of_k, append.v)?;
            args.k_out = check("rotary: keys", kind, &of_cache, append.keys)?;
            args.v_out = check("rotary: values", kind, &of_cache, append.values)?;
            args.positions = check("rotary: positions", Kind::Int64, &[tokens], append.positions)?;
            args.capacity = capacity as u32;
            memory.extend([append.v, append.values, append.positions].map(Tensor::shallow_clone));
        }
    }
    let heads = (q_heads + k_heads * if append.is_some() { 2 } else { 1 }) as u32;
    let of_head = (half as u32).div_ceil(8);
    let blocks = tiles("rotary: q", tokens as usize, (heads * of_head) as usize, BLOCK_THREADS)?;
    args.units = tokens as u32 * heads * of_head;
    (args.by_token, args.by_head) = (Divider::new(heads * of_head), Divider::new(of_head));
    let are_aligned = are_aligned([args.q_out, args.k_out, args.v_out])
        && are_aligned([args.q, args.k, args.v, args.cos, args.sin].map(<*const c_void>::cast_mut));
    args.is_whole = u32::from(half % 8 == 0 && are_aligned);
    let launches = match blocks {
        0 => Vec::new(),
        _ => vec![Launch::new("rotary", format!("rotary_{suffix}"), blocks, &args)],
    };
    // SAFETY: `Needs` has checked everything that is pointed to, the kernel holds positions against the capacity; all is in
    // `memory`.
    Ok((unsafe { Prepared::new(launches, device, memory) }, q_out))
}

fn shape_of(name: &str, x: &Tensor) -> Result<[i64; 3]> {
    match x.size()[..] {
        [tokens, heads, dim] if dim > 0 && dim % 2 == 0 && heads < 1 << 16 && dim < 1 << 14 => Ok([tokens, heads, dim]),
        _ => Err(Error::Runtime(format!("{name}: found shape {:?}, expected [tokens, heads, even dim]", x.size()))),
    }
}

/// `RotaryArgs` of kernels/rotary.cu.
#[repr(C)]
struct Args {
    q: *const c_void,
    k: *const c_void,
    v: *const c_void,
    q_out: *mut c_void,
    k_out: *mut c_void,
    v_out: *mut c_void,
    cos: *const c_void,
    sin: *const c_void,
    positions: *const c_void,
    capacity: u32,
    units: u32,
    q_heads: u32,
    k_heads: u32,
    half: u32,
    by_token: Divider,
    by_head: Divider,
    is_back: u32,
    is_whole: u32,
    unused: u32,
}
