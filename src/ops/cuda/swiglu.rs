//! The gate of an MLP on a CUDA device, and its gradients: kernels/swiglu.cu. What it means stands in ops/swiglu.rs.
#![allow(unsafe_code)]

use std::ffi::c_void;

use tch::{Device, Tensor};

use super::batch::{are_aligned, dtype_suffix};
use super::launch::{BLOCK_THREADS, Executor, Launch, Needs, Prepared};
use crate::Result;

/// y of gate and up, contiguous tensors of one shape and dtype (f32, bf16 or f16).
///
/// # Errors
/// `Runtime` naming the tensor of the wrong device, dtype, shape or strides; `Unavailable` without kernels or driver.
pub fn forward(executor: &dyn Executor, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (prepared, y) = prepare(executor.device(), gate, up)?;
    prepared.run(executor)?;
    Ok(y)
}

/// The launch of [`forward`] and what it writes.
///
/// # Errors
/// As [`forward`].
pub fn prepare(device: Device, gate: &Tensor, up: &Tensor) -> Result<(Prepared, Tensor)> {
    let y = Tensor::f_empty(gate.size(), (gate.kind(), device))?;
    let tensors = Tensors { gate, up, dy: None, y: &y, du: None };
    Ok((tensors.prepare(device, "swiglu")?, y))
}

/// (dgate, dup), all of the shape and dtype of gate.
///
/// # Errors
/// As [`forward`].
pub fn backward(executor: &dyn Executor, gate: &Tensor, up: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    let (prepared, gradients) = prepare_backward(executor.device(), gate, up, dy)?;
    prepared.run(executor)?;
    Ok(gradients)
}

/// The launch of [`backward`] and what it writes.
///
/// # Errors
/// As [`forward`].
pub fn prepare_backward(
    device: Device,
    gate: &Tensor,
    up: &Tensor,
    dy: &Tensor,
) -> Result<(Prepared, (Tensor, Tensor))> {
    let empty = || Tensor::f_empty(gate.size(), (gate.kind(), device));
    let (dgate, dup) = (empty()?, empty()?);
    let tensors = Tensors { gate, up, dy: Some(dy), y: &dgate, du: Some(&dup) };
    Ok((tensors.prepare(device, "swiglu_backward")?, (dgate, dup)))
}

struct Tensors<'a> {
    gate: &'a Tensor,
    up: &'a Tensor,
    dy: Option<&'a Tensor>,
    y: &'a Tensor,
    du: Option<&'a Tensor>,
}

/// (first, number) of the elements of each launch; a first one is a multiple of 8.
fn pieces(elements: usize) -> impl Iterator<Item = (usize, u32)> {
    const MOST: usize = 1 << 30;
    (0..elements).step_by(MOST).map(move |begin| (begin, MOST.min(elements - begin) as u32))
}

impl Tensors<'_> {
    fn prepare(&self, device: Device, kernel: &str) -> Result<Prepared> {
        let (kind, shape, elements) = (self.gate.kind(), self.gate.size(), self.gate.numel());
        let suffix = dtype_suffix("swiglu: gate", kind)?;
        let check = |name, tensor: &Tensor| Needs { name, kinds: &[kind], shape: &shape, device }.check(tensor);
        let optional = |name, tensor: Option<&Tensor>| tensor.map_or(Ok(std::ptr::null_mut()), |t| check(name, t));
        let (gate, up) = (check("swiglu: gate", self.gate)?, check("swiglu: up", self.up)?);
        let (dy, y) = (optional("swiglu: dy", self.dy)?, check("swiglu: y", self.y)?);
        let du = optional("swiglu: dup", self.du)?;
        let is_aligned = u32::from(are_aligned([gate, up, dy, y, du]));
        let launch = |(begin, elements): (usize, u32)| {
            let bytes = begin * kind.elt_size_in_bytes();
            let [gate, up, dy, y, du] =
                [gate, up, dy, y, du].map(|p| if p.is_null() { p } else { p.wrapping_byte_add(bytes) });
            let args = Args { gate, up, dy, y, du, elements, is_aligned };
            Launch::new("swiglu", format!("{kernel}_{suffix}"), elements.div_ceil(8 * BLOCK_THREADS), &args)
        };
        let launches = pieces(elements).map(launch).collect();
        let tensors = [Some(self.gate), Some(self.up), self.dy, Some(self.y), self.du];
        let memory = tensors.into_iter().flatten().map(Tensor::shallow_clone).collect();
        // SAFETY: `Needs` has checked everything that is pointed to; it is in `memory`.
        Ok(unsafe { Prepared::new(launches, device, memory) })
    }
}

/// `SwigluArgs` of kernels/swiglu.cu.
#[repr(C)]
struct Args {
    gate: *const c_void,
    up: *const c_void,
    dy: *const c_void,
    y: *mut c_void,
    du: *mut c_void,
    elements: u32,
    is_aligned: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_all_elements_once() {
        let of = |elements| pieces(elements).collect::<Vec<_>>();
        assert_eq!(of(0), []);
        assert_eq!(of(7), [(0, 7)]);
        assert_eq!(of(1 << 30), [(0, 1 << 30)]);
        assert_eq!(of((2 << 30) + 5), [(0, 1 << 30), (1 << 30, 1 << 30), (2 << 30, 5)]);
    }
}
