//! Our own backward passes inside torch's autograd (bridge.cpp hangs the node, this file is its Rust side).
//!
//! An operation computes its outputs under `no_grad`, then [`attach`] makes them differentiable: in backward torch
//! calls [`Backward::backward`] with the saved tensors and the incoming gradients. On CUDA that happens on torch's
//! engine threads, so an implementation reads no thread-local and no global state.

#![allow(unsafe_code)]

pub mod flash;

use std::collections::VecDeque;
use std::ffi::{c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

use tch::Tensor;
use torch_sys::C_tensor;

use crate::{Error, Result};

/// The backward pass of one call of an operation.
pub trait Backward: Send + 'static {
    /// `saved`: what [`attach`] was given. `grads[i]`: gradient of output i, `None` where torch has none.
    /// `needs[i]`: whether input i wants a gradient. Returns one entry per input.
    fn backward(&self, saved: &[Tensor], grads: &[Option<Tensor>], needs: &[bool]) -> Result<Vec<Option<Tensor>>>;
}

type BackwardFn = extern "C" fn(
    *mut c_void,
    *mut *mut C_tensor,
    c_int,
    *mut *mut C_tensor,
    c_int,
    *const c_int,
    *mut *mut C_tensor,
    c_int,
) -> c_int;

unsafe extern "C" {
    fn temper_exact_products();
    fn temper_attach_backward(
        inputs: *const *const C_tensor,
        n_inputs: c_int,
        saved: *const *const C_tensor,
        n_saved: c_int,
        outputs: *const *const C_tensor,
        n_outputs: c_int,
        payload: *mut c_void,
        backward: BackwardFn,
        drop: extern "C" fn(*mut c_void),
        results: *mut *mut C_tensor,
    ) -> *mut c_char;
}

/// Errors of failed callbacks, until the [`run_backward`] that they belong to takes them. C++ exceptions carry only
/// text, so theirs names the error by number: several threads may run backward passes at once.
static FAILURES: Mutex<Failures> = Mutex::new(Failures { last_number: 0, kept: VecDeque::new() });

/// Torch reports one exception of a pass; errors of other threads of the same pass stay here, so their number is bounded.
const KEPT_FAILURES: usize = 64;

/// What bridge.cpp writes before the number.
const FAILURE_MARK: &str = "an operation failed in backward, error ";

struct Failures {
    last_number: c_int,
    kept: VecDeque<(c_int, Error)>,
}

/// Keeps `error` and returns its number, which is not 0.
fn keep_error(error: Error) -> c_int {
    let mut failures = FAILURES.lock().unwrap_or_else(|p| p.into_inner());
    failures.last_number = failures.last_number % c_int::MAX + 1;
    let number = failures.last_number;
    if failures.kept.len() == KEPT_FAILURES {
        failures.kept.pop_front();
    }
    failures.kept.push_back((number, error));
    number
}

/// The error that torch's exception text names.
fn take_error(text: &str) -> Option<Error> {
    let (_, rest) = text.split_once(FAILURE_MARK)?;
    let number: c_int = rest.split_once('.')?.0.parse().ok()?;
    let mut failures = FAILURES.lock().unwrap_or_else(|p| p.into_inner());
    let place = failures.kept.iter().position(|(kept, _)| *kept == number)?;
    failures.kept.remove(place).map(|(_, error)| error)
}

/// Makes `outputs` (computed without gradient) depend on `inputs` through `operation`.
pub fn attach(
    inputs: &[&Tensor],
    saved: &[&Tensor],
    outputs: &[&Tensor],
    operation: impl Backward,
) -> Result<Vec<Tensor>> {
    let handles = |tensors: &[&Tensor]| -> Vec<*const C_tensor> { tensors.iter().map(|t| t.as_ptr()).collect() };
    let (input_handles, saved_handles, output_handles) = (handles(inputs), handles(saved), handles(outputs));
    let mut results = vec![std::ptr::null_mut(); outputs.len()];
    let payload: Box<Box<dyn Backward>> = Box::new(Box::new(operation));
    // SAFETY: all handles outlive the call; the payload's ownership passes to C++, which drops it exactly once
    // through drop_payload; results has room for one handle per output.
    let error = unsafe {
        temper_attach_backward(
            input_handles.as_ptr(),
            input_handles.len() as c_int,
            saved_handles.as_ptr(),
            saved_handles.len() as c_int,
            output_handles.as_ptr(),
            output_handles.len() as c_int,
            Box::into_raw(payload).cast(),
            backward_callback,
            drop_payload,
            results.as_mut_ptr(),
        )
    };
    if !error.is_null() {
        // SAFETY: a text from strdup, ours to free.
        return Err(Error::of_torch(&unsafe { take_text(error) }));
    }
    // SAFETY: on success C++ stored one new tensor handle per output; we own them.
    Ok(results.into_iter().map(|r| unsafe { Tensor::from_ptr(r) }).collect())
}

/// An error text of C++.
///
/// # Safety
/// A NUL-terminated string from strdup, used nowhere else.
pub(super) unsafe fn take_text(text: *mut c_char) -> String {
    // SAFETY: the caller's promise.
    unsafe {
        let owned = std::ffi::CStr::from_ptr(text).to_string_lossy().into_owned();
        libc::free(text.cast());
        owned
    }
}

/// Makes libtorch's CUDA products as exact as their dtypes: no TF32, no reductions in 16 bits.
pub fn exact_products() {
    // SAFETY: sets three flags of torch's global context; no arguments, no pointers.
    unsafe { temper_exact_products() };
}

/// Runs torch's backward from a scalar `loss`. An error inside one of our operations comes back as itself.
pub fn run_backward(loss: &Tensor) -> Result<()> {
    loss.f_backward().map_err(|torch| take_error(&torch.to_string()).unwrap_or_else(|| torch.into()))
}

extern "C" fn drop_payload(payload: *mut c_void) {
    // SAFETY: payload is the Box that attach leaked; C++ calls this exactly once.
    let operation = unsafe { Box::from_raw(payload.cast::<Box<dyn Backward>>()) };
    // A panic must not cross into C++.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(operation)));
}

extern "C" fn backward_callback(
    payload: *mut c_void,
    saved: *mut *mut C_tensor,
    n_saved: c_int,
    grads: *mut *mut C_tensor,
    n_grads: c_int,
    needs: *const c_int,
    out: *mut *mut C_tensor,
    n_out: c_int,
) -> c_int {
    let run = || -> Result<Vec<Option<Tensor>>> {
        // SAFETY: C++ passes arrays of the stated lengths whose entries are live tensors or (grads only) null.
        let (operation, saved, grads, needs) = unsafe {
            let list = |p: *mut *mut C_tensor, n: c_int| -> Vec<Option<Tensor>> {
                (0..n as usize)
                    .map(|i| {
                        let handle = *p.add(i);
                        (!handle.is_null()).then(|| Tensor::clone_from_ptr(handle))
                    })
                    .collect()
            };
            let operation = &*payload.cast::<Box<dyn Backward>>();
            let needs: Vec<bool> = (0..n_out as usize).map(|i| *needs.add(i) != 0).collect();
            (operation, list(saved, n_saved), list(grads, n_grads), needs)
        };
        let saved: Vec<Tensor> = saved.into_iter().flatten().collect();
        let result = tch::no_grad(|| operation.backward(&saved, &grads, &needs))?;
        if result.len() != n_out as usize {
            return Err(Error::Runtime(format!("backward returned {} gradients for {n_out} inputs", result.len())));
        }
        Ok(result)
    };
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(gradients)) => {
            for (i, gradient) in gradients.into_iter().enumerate() {
                if let Some(mut tensor) = gradient {
                    // SAFETY: out has n_out entries; C++ takes over the handle of the shallow copy made here.
                    unsafe { *out.add(i) = torch_sys::at_shallow_clone(tensor.as_mut_ptr()) };
                }
            }
            0
        }
        Ok(Err(error)) => keep_error(error),
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string()))
                .unwrap_or_else(|| "panic".to_string());
            let first = text.lines().next().unwrap_or_default();
            keep_error(Error::Runtime(format!("an operation panicked in backward: {first}")))
        }
    }
}
