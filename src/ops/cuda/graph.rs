//! Launches as one CUDA graph: one call to the driver for all of them, and no gap between them.
#![allow(unsafe_code)]

use cudarc::driver::{DriverError, result, sys};

use super::launch::{Gpu, Launch};
use crate::Result;

/// An instantiated graph.
pub struct Graph {
    gpu: Gpu,
    graph: sys::CUgraphExec,
}

impl Graph {
    /// Captures launches, whose kernels must have run before: nothing may be loaded during a capture.
    ///
    /// # Errors
    /// `Runtime` with CUDA's reason.
    ///
    /// # Safety
    /// As `Executor::run`, for every launch of the graph.
    pub unsafe fn capture(gpu: Gpu, launches: &[Launch]) -> Result<Graph> {
        use result::stream::{StreamKind, begin_capture, create, destroy, end_capture};
        let what = "capturing a graph";
        // Torch's stream may be the default one, which cannot be captured.
        let stream = gpu.in_primary_context(what, || create(StreamKind::NonBlocking))?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream was just made.
        gpu.in_primary_context(what, || unsafe { begin_capture(stream, mode) })?;
        // SAFETY: the caller's promise; nothing runs before the graph does.
        let launched = launches.iter().try_for_each(|launch| unsafe { gpu.run_on(launch, stream) });
        let captured = gpu.in_primary_context(what, || -> std::result::Result<_, DriverError> {
            // SAFETY: the capture was begun above, the stream and the graph are freed once.
            unsafe {
                let graph = end_capture(stream);
                destroy(stream)?;
                let graph = graph?;
                let instantiated = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
                result::graph::destroy(graph)?;
                instantiated
            }
        });
        launched.and(captured).map(|graph| Graph { gpu, graph })
    }

    /// Runs it on torch's current stream.
    ///
    /// # Errors
    /// `Runtime` with CUDA's reason.
    pub fn launch(&self) -> Result<()> {
        // SAFETY: the graph is live; what it points to is promised to `capture`.
        self.gpu
            .in_primary_context("launching a graph", || unsafe { result::graph::launch(self.graph, self.gpu.stream()) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `capture`, destroyed once; the driver keeps what still runs.
        let destroy = || unsafe { result::graph::exec_destroy(self.graph) };
        // A failure leaks a graph.
        let _ = self.gpu.in_primary_context("destroying a graph", destroy);
    }
}
