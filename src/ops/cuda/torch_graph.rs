//! A piece of work on the device as one CUDA graph: torch's operators and our kernels alike, one call for all of them.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

use crate::ops::autograd::take_text;
use crate::{Error, Result};

unsafe extern "C" {
    // torch_graph.cpp
    fn temper_graph_capture(
        device: c_int,
        work: extern "C" fn(*mut c_void) -> c_int,
        payload: *mut c_void,
        error: *mut *mut c_char,
    ) -> *mut c_void;
    fn temper_graph_replay(graph: *mut c_void) -> *mut c_char;
    fn temper_graph_free(graph: *mut c_void);
}

/// Work that can be done again and again. What it reads and writes must live, where it lay when it was captured.
pub struct TorchGraph(*mut c_void);

/// Why a capture has failed in this process. What torch then thinks of is not known well enough to try again.
static FAILED: OnceLock<String> = OnceLock::new();

type Work<'a> = (&'a mut dyn FnMut() -> Result<()>, Result<()>);

impl TorchGraph {
    /// Captures what `work` launches, without running it. All of it must have run before, with the same shapes: nothing may
    /// be loaded or waited for during a capture.
    ///
    /// # Errors
    /// What `work` answers; `Torch` with CUDA's reason, and in all later calls of the process `Runtime`.
    pub fn capture(device: usize, work: &mut dyn FnMut() -> Result<()>) -> Result<TorchGraph> {
        if let Some(reason) = FAILED.get() {
            return Err(Error::Runtime(format!("a capture has failed before: {reason}")));
        }
        let mut payload: Work = (work, Ok(()));
        let mut error = std::ptr::null_mut();
        let device = c_int::try_from(device).map_err(|_| Error::Runtime(format!("cuda:{device}: no such device")))?;
        // SAFETY: the payload outlives the call, which calls `run_work` with it at most once, on this thread.
        let graph = unsafe { temper_graph_capture(device, run_work, (&raw mut payload).cast(), &raw mut error) };
        let captured = match payload.1 {
            Err(error) => Err(error),
            // SAFETY: a text from strdup, ours to free.
            Ok(()) if !error.is_null() => Err(Error::of_torch(&unsafe { take_text(error) })),
            Ok(()) if graph.is_null() => Err(Error::Runtime("a CUDA graph was not captured".into())),
            Ok(()) => Ok(TorchGraph(graph)),
        };
        if let Some(error) = captured.as_ref().err().filter(|error| !matches!(error, Error::OutOfMemory(_))) {
            let _ = FAILED.set(error.to_string());
        }
        captured
    }

    /// Whether a capture has failed in this process: then none is tried.
    pub fn has_failed() -> bool {
        FAILED.get().is_some()
    }

    /// Does the work on torch's current stream.
    ///
    /// # Errors
    /// `Torch` with CUDA's reason.
    pub fn replay(&self) -> Result<()> {
        // SAFETY: a live graph.
        let error = unsafe { temper_graph_replay(self.0) };
        // SAFETY: a text from strdup, ours to free.
        if error.is_null() { Ok(()) } else { Err(Error::of_torch(&unsafe { take_text(error) })) }
    }
}

impl Drop for TorchGraph {
    fn drop(&mut self) {
        // SAFETY: made by `capture`, freed once.
        unsafe { temper_graph_free(self.0) };
    }
}

extern "C" fn run_work(payload: *mut c_void) -> c_int {
    // SAFETY: `capture` passes its own payload and waits.
    let (work, result) = unsafe { &mut *payload.cast::<Work>() };
    // A panic must not cross into C++.
    *result = catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(Error::Runtime("a panic while a CUDA graph was captured".into())));
    c_int::from(result.is_err())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where there is no GPU it is one clear error, and the work is not run.
    #[test]
    fn without_a_gpu_capture_is_an_error() {
        if tch::Cuda::is_available() {
            return println!("1 skipped: this machine has a GPU");
        }
        let error = TorchGraph::capture(0, &mut || panic!("not to be run")).err().map(|e| e.to_string());
        assert!(error.is_some_and(|e| e.starts_with("libtorch: ")));
    }
}
