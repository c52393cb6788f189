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

/// The launch of [`rotate`] and what it writes.
///
/// # Errors
/// As [`rotate`].
pub fn prepare(device: Device, rotation: &Rotation) -> Result<(Prepared, (Tensor, Tensor))> {
    let Rotation { q, k, cos, sin, is_back } = *rotation;
    let ([tokens, q_heads, dim], [_, k_heads, _]) = (shape_of("rotary: q", q)?, shape_of("rotary: k", k)?);
    let (kind, half) = (q.kind(), dim / 2);
    let suffix = dtype_suffix("rotary: q", kind)?;
    let check = |name, kinds: &[Kind], heads, tensor: &Tensor| {
        Needs { name, kinds, shape: &[tokens, heads, dim], device }.check(tensor)
    };
    let empty = |heads: i64| Tensor::f_empty([tokens, heads, dim], (kind, device));
    let (q_out, k_out) = (empty(q_heads)?, empty(k_heads)?);
    let pointers = [
        check("rotary: q", &[kind], q_heads, q)?,
        check("rotary: k", &[kind], k_heads, k)?,
        check("rotary: rotated q", &[kind], q_heads, &q_out)?,
        check("rotary: rotated k", &[kind], k_heads, &k_out)?,
        check("rotary: cos", &[Kind::Float], 1, cos)?,
        check("rotary: sin", &[Kind::Float], 1, sin)?,
    ];
    let of_head = (half as u32).div_ceil(8);
    let of_token = (q_heads + k_heads) as u32 * of_head;
    let blocks = tiles("rotary: q", tokens as usize, of_token as usize, BLOCK_THREADS)?;
    let [q_pointer, k_pointer, q_out_pointer, k_out_pointer, cos_pointer, sin_pointer] = pointers;
    let args = Args {
        q: q_pointer,
        k: k_pointer,
        q_out: q_out_pointer,
        k_out: k_out_pointer,
        cos: cos_pointer,
        sin: sin_pointer,
        units: tokens as u32 * of_token,
        q_heads: q_heads as u32,
        k_heads: k_heads as u32,
        half: half as u32,
        by_token: Divider::new(of_token),
        by_head: Divider::new(of_head),
        is_back: u32::from(is_back),
        is_whole: u32::from(half % 8 == 0 && are_aligned(pointers)),
    };
    let launches = match blocks {
        0 => Vec::new(),
        _ => vec![Launch::new("rotary", format!("rotary_{suffix}"), blocks, &args)],
    };
    let memory = [q, k, cos, sin, &q_out, &k_out].map(Tensor::shallow_clone).into();
    // SAFETY: `Needs` has checked everything that is pointed to; it is in `memory`.
    Ok((unsafe { Prepared::new(launches, device, memory) }, (q_out, k_out)))
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
    q_out: *mut c_void,
    k_out: *mut c_void,
    cos: *const c_void,
    sin: *const c_void,
    units: u32,
    q_heads: u32,
    k_heads: u32,
    half: u32,
    by_token: Divider,
    by_head: Divider,
    is_back: u32,
    is_whole: u32,
}
