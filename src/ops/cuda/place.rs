//! Where the operations on a tensor run: kernels on its GPU, or on a CPU their definitions.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::sync::Arc;

use tch::{Device, Tensor};

use super::graph::Graph;
use super::launch::{Boxes, Executor, Gpu, Launch, Properties, TensorMap};
use crate::Result;

/// What runs the kernels for a tensor.
#[derive(Clone, Copy)]
pub enum Place {
    Gpu(Gpu),
    /// The kernels' host build, which tests have ([`with_host`]).
    Host(&'static (dyn Executor + Sync)),
}

thread_local! {
    static HOST: Cell<Option<&'static (dyn Executor + Sync)>> = const { Cell::new(None) };
}

impl Place {
    /// None on a CPU: operations have a definition there.
    pub fn of(tensor: &Tensor) -> Option<Place> {
        match tensor.device() {
            Device::Cuda(index) => Some(Place::Gpu(Gpu::number(index))),
            _ => HOST.get().map(Place::Host),
        }
    }

    fn executor(&self) -> &dyn Executor {
        match self {
            Place::Gpu(gpu) => gpu,
            Place::Host(host) => *host,
        }
    }
}

impl Executor for Place {
    fn device(&self) -> Device {
        self.executor().device()
    }

    fn properties(&self) -> Result<Arc<Properties>> {
        self.executor().properties()
    }

    unsafe fn tensor_map(&self, boxes: &Boxes) -> Result<TensorMap> {
        // SAFETY: the caller's promise.
        unsafe { self.executor().tensor_map(boxes) }
    }

    unsafe fn run(&self, launch: &Launch) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.executor().run(launch) }
    }

    unsafe fn graph(&self, launches: &[Launch]) -> Result<Option<Graph>> {
        // SAFETY: the caller's promise.
        unsafe { self.executor().graph(launches) }
    }
}

/// Does `work` with the operations of this thread's CPU tensors given to `host`, as a GPU's are to it: so tests take the way that a
/// GPU takes, through all of a training run.
pub fn with_host<T>(host: &'static (dyn Executor + Sync), work: impl FnOnce() -> T) -> T {
    struct Restore(Option<&'static (dyn Executor + Sync)>);
    impl Drop for Restore {
        fn drop(&mut self) {
            HOST.set(self.0);
        }
    }
    let _restore = Restore(HOST.replace(Some(host)));
    work()
}
