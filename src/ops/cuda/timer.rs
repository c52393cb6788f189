//! Time on torch's current stream, by CUDA events.
#![allow(unsafe_code)]

use cudarc::driver::{result, sys};

use super::launch::Gpu;
use crate::Result;

/// Two events of a device.
pub struct Timer {
    gpu: Gpu,
    begin: sys::CUevent,
    end: sys::CUevent,
}

impl Timer {
    /// # Errors
    /// `Unavailable` without driver or device.
    pub fn new(gpu: Gpu) -> Result<Timer> {
        let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let (begin, end) = gpu.in_primary_context("creating events", || Ok((event()?, event()?)))?;
        Ok(Timer { gpu, begin, end })
    }

    /// Microseconds between the first and the last launch of `work` on the device; waits for the last.
    ///
    /// # Errors
    /// Those of `work`; `Runtime` with CUDA's reason.
    pub fn time_us(&self, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        let record = |event: sys::CUevent| {
            // SAFETY: the event is live and of this context, and so is torch's stream.
            self.gpu.in_primary_context("timing", || unsafe { result::event::record(event, self.gpu.stream()) })
        };
        record(self.begin)?;
        work()?;
        record(self.end)?;
        let elapsed_ms = self.gpu.in_primary_context("timing", || {
            // SAFETY: both events are live and were recorded on one stream.
            unsafe {
                sys::cuEventSynchronize(self.end).result()?;
                result::event::elapsed(self.begin, self.end)
            }
        })?;
        Ok(f64::from(elapsed_ms) * 1e3)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once; nothing waits for them.
        let destroy = || unsafe { result::event::destroy(self.begin).and(result::event::destroy(self.end)) };
        // A failure leaks two events.
        let _ = self.gpu.in_primary_context("destroying events", destroy);
    }
}
