//! Root mean square norm on a CUDA device, with the addition before it, and its gradients: kernels/rms_norm.cu. What it means
//! stands in ops/rms_norm.rs.
#![allow(unsafe_code)]

use std::ffi::c_void;

use tch::{Device, Kind, Tensor};

use super::batch::{are_aligned, dtype_suffix};
use super::launch::{BLOCK_THREADS, Executor, Launch, Needs, Prepared};
use crate::{Error, Result};

/// Columns of a row that the kernels hold: 8 a thread, or 4 times 8.
const NARROW: i64 = 8 * BLOCK_THREADS as i64;
const WIDEST: i64 = 4 * NARROW;

/// Whether there is a kernel for such rows.
pub fn is_supported(hidden: i64) -> bool {
    (1..=WIDEST).contains(&hidden)
}

/// What goes in.
#[derive(Clone, Copy)]
pub struct Norm<'a> {
    pub x: &'a Tensor,             // [rows, hidden] f32, bf16 or f16
    pub delta: Option<&'a Tensor>, // as x
    pub weight: &'a Tensor,        // [hidden] f32
    pub clean: Option<&'a Tensor>, // [hidden] f32: count where y differs from the norm with this weight
    pub eps: f32,
}

pub struct Normed {
    pub residual: Option<Tensor>, // [rows, hidden] x + delta, where there is a delta
    pub y: Tensor,                // [rows, hidden]
    pub changed: Option<Tensor>,  // i64 [1]
}

/// # Errors
/// `Runtime` naming the tensor of the wrong device, dtype, shape or strides; `Unavailable` without kernels or driver.
pub fn forward(executor: &dyn Executor, norm: &Norm) -> Result<Normed> {
    let (prepared, normed) = prepare(executor.device(), norm)?;
    prepared.run(executor)?;
    Ok(normed)
}

/// The launch of [`forward`] and what it writes.
///
/// # Errors
/// As [`forward`].
pub fn prepare(device: Device, norm: &Norm) -> Result<(Prepared, Normed)> {
    let (rows, hidden) = shape_of(norm.x)?;
    let kind = norm.x.kind();
    let suffix = kernel_suffix(kind, hidden)?;
    let stream = |name, tensor: &Tensor| Needs { name, kinds: &[kind], shape: &[rows, hidden], device }.check(tensor);
    let vector = |name, tensor: &Tensor| Needs { name, kinds: &[Kind::Float], shape: &[hidden], device }.check(tensor);
    let x = stream("rms_norm: x", norm.x)?;
    let delta = pointer(norm.delta, |delta| stream("rms_norm: delta", delta))?;
    let weight = vector("rms_norm: weight", norm.weight)?;
    let clean = pointer(norm.clean, |clean| vector("rms_norm: clean weight", clean))?;
    let empty = || Ok::<Tensor, Error>(Tensor::f_empty([rows, hidden], (kind, device))?);
    let normed = Normed {
        residual: norm.delta.map(|_| empty()).transpose()?,
        y: empty()?,
        changed: norm.clean.map(|_| Tensor::f_zeros([1], (Kind::Int64, device))).transpose()?,
    };
    let residual = pointer(normed.residual.as_ref(), |residual| Ok(residual.data_ptr()))?;
    let (y, changed) = (normed.y.data_ptr(), pointer(normed.changed.as_ref(), |changed| Ok(changed.data_ptr()))?);
    let is_whole = hidden % 8 == 0 && are_aligned([x, delta, weight, clean, residual, y]);
    let args = Args {
        x,
        delta,
        weight,
        clean,
        residual,
        y,
        changed,
        rows: rows as u32,
        hidden: hidden as u32,
        eps: norm.eps,
        is_whole: u32::from(is_whole),
    };
    let launches = match rows {
        0 => Vec::new(),
        _ => vec![Launch::new("rms_norm", format!("rms_norm_{suffix}"), rows as u32, &args)],
    };
    let tensors = [
        Some(norm.x),
        norm.delta,
        Some(norm.weight),
        norm.clean,
        normed.residual.as_ref(),
        Some(&normed.y),
        normed.changed.as_ref(),
    ];
    let memory = tensors.into_iter().flatten().map(Tensor::shallow_clone).collect();
    // SAFETY: `Needs` has checked everything that is read, the rest was made here; all of it is in `memory`.
    Ok((unsafe { Prepared::new(launches, device, memory) }, normed))
}

/// What goes back.
#[derive(Clone, Copy)]
pub struct NormBackward<'a> {
    pub s: &'a Tensor,          // [rows, hidden]: x, or x + delta
    pub dy: &'a Tensor,         // as s
    pub ds: Option<&'a Tensor>, // as s: what arrives at x + delta itself
    pub weight: &'a Tensor,     // [hidden] f32
    pub eps: f32,
    pub wants_dweight: bool,
}

pub struct Gradients {
    pub dx: Tensor,              // [rows, hidden], delta's too
    pub dweight: Option<Tensor>, // [hidden] f32
}

/// # Errors
/// As [`forward`].
pub fn backward(executor: &dyn Executor, back: &NormBackward) -> Result<Gradients> {
    let (prepared, gradients) = prepare_backward(executor.device(), back)?;
    prepared.run(executor)?;
    Ok(gradients)
}

/// The launches of [`backward`] and what they write.
///
/// # Errors
/// As [`forward`].
pub fn prepare_backward(device: Device, back: &NormBackward) -> Result<(Prepared, Gradients)> {
    let (rows, hidden) = shape_of(back.s)?;
    let kind = back.s.kind();
    let suffix = kernel_suffix(kind, hidden)?;
    let stream = |name, tensor: &Tensor| Needs { name, kinds: &[kind], shape: &[rows, hidden], device }.check(tensor);
    let s = stream("rms_norm: s", back.s)?;
    let dy = stream("rms_norm: dy", back.dy)?;
    let ds = pointer(back.ds, |ds| stream("rms_norm: ds", ds))?;
    let needs = Needs { name: "rms_norm: weight", kinds: &[Kind::Float], shape: &[hidden], device };
    let weight = needs.check(back.weight)?;
    // Of the shape alone, as the order of the sums.
    let rows_of_block = (rows as u32).div_ceil(MOST_PARTS).max(LEAST_ROWS);
    let blocks = (rows as u32).div_ceil(rows_of_block);
    let dx = Tensor::f_empty([rows, hidden], (kind, device))?;
    let empty = |shape: &[i64]| Ok::<Tensor, Error>(Tensor::f_zeros(shape, (Kind::Float, device))?);
    let dweight = back.wants_dweight.then(|| empty(&[hidden])).transpose()?;
    let partial = match back.wants_dweight {
        true => Some(Tensor::f_empty([i64::from(blocks), hidden], (Kind::Float, device))?),
        false => None,
    };
    let partial_pointer = pointer(partial.as_ref(), |partial| Ok(partial.data_ptr()))?;
    let is_whole = hidden % 8 == 0 && are_aligned([s, dy, ds, weight, dx.data_ptr(), partial_pointer]);
    let args = BackwardArgs {
        s,
        dy,
        ds,
        weight,
        dx: dx.data_ptr(),
        partial: partial_pointer,
        rows: rows as u32,
        hidden: hidden as u32,
        eps: back.eps,
        is_whole: u32::from(is_whole),
        rows_of_block,
        unused: 0,
    };
    let mut launches = Vec::new();
    if rows > 0 {
        launches.push(Launch::new("rms_norm", format!("rms_norm_backward_{suffix}"), blocks, &args));
    }
    if let (Some(dweight), true) = (&dweight, rows > 0) {
        let args =
            DweightArgs { partial: partial_pointer, dweight: dweight.data_ptr(), parts: blocks, hidden: hidden as u32 };
        launches.push(Launch::new("rms_norm", "rms_norm_dweight".into(), (hidden as u32).div_ceil(32), &args));
    }
    let tensors =
        [Some(back.s), Some(back.dy), back.ds, Some(back.weight), Some(&dx), dweight.as_ref(), partial.as_ref()];
    let memory = tensors.into_iter().flatten().map(Tensor::shallow_clone).collect();
    // SAFETY: as in `prepare`.
    Ok((unsafe { Prepared::new(launches, device, memory) }, Gradients { dx, dweight }))
}

/// Partial sums of dw, and the rows that make one worth its memory.
const MOST_PARTS: u32 = 1024;
const LEAST_ROWS: u32 = 4;

fn shape_of(x: &Tensor) -> Result<(i64, i64)> {
    match x.size()[..] {
        [rows, hidden] if rows <= i64::from(i32::MAX) => Ok((rows, hidden)),
        _ => Err(Error::Runtime(format!("rms_norm: x: found shape {:?}, expected [rows, hidden]", x.size()))),
    }
}

fn kernel_suffix(kind: Kind, hidden: i64) -> Result<String> {
    if !is_supported(hidden) {
        return Err(Error::Runtime(format!("rms_norm: x: found {hidden} columns, expected 1 to {WIDEST}")));
    }
    let dtype = dtype_suffix("rms_norm: x", kind)?;
    Ok(if hidden <= NARROW { dtype.to_string() } else { format!("{dtype}_wide") })
}

/// Null where there is no tensor.
fn pointer(tensor: Option<&Tensor>, of: impl FnOnce(&Tensor) -> Result<*mut c_void>) -> Result<*mut c_void> {
    tensor.map_or(Ok(std::ptr::null_mut()), of)
}

/// `RmsNormArgs` of kernels/rms_norm.cu.
#[repr(C)]
struct Args {
    x: *const c_void,
    delta: *const c_void,
    weight: *const c_void,
    clean: *const c_void,
    residual: *mut c_void,
    y: *mut c_void,
    changed: *mut c_void,
    rows: u32,
    hidden: u32,
    eps: f32,
    is_whole: u32,
}

/// `RmsNormBackwardArgs`.
#[repr(C)]
struct BackwardArgs {
    s: *const c_void,
    dy: *const c_void,
    ds: *const c_void,
    weight: *const c_void,
    dx: *mut c_void,
    partial: *mut c_void,
    rows: u32,
    hidden: u32,
    eps: f32,
    is_whole: u32,
    rows_of_block: u32,
    unused: u32,
}

/// `DweightArgs`.
#[repr(C)]
struct DweightArgs {
    partial: *const c_void,
    dweight: *mut c_void,
    parts: u32,
    hidden: u32,
}
