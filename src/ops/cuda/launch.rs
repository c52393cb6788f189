//! The one place that launches, on torch's current stream in the primary context that torch uses too. loaded.rs has the
//! kernels.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{DriverError, result, sys};
use tch::{Device, Kind, Tensor};

use super::graph::Graph;
use super::loaded::{driver_error, function, in_context, primary_context, require_driver};
use crate::{Error, Result};

unsafe extern "C" {
    /// src/ops/cuda/stream.cpp: the `cudaStream_t` on which torch works now; null is the default stream.
    fn temper_current_cuda_stream(device: i32) -> *mut c_void;
}

/// Threads of a block where a kernel does not say otherwise: kBlockThreads of kernels/include/portable.cuh.
pub const BLOCK_THREADS: u32 = 256;

/// A launch of a kernel of kernels/`file`.cu with its one argument struct.
pub struct Launch {
    pub file: &'static str,
    pub kernel: String,
    pub blocks: u32,
    /// Of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    args: Box<[u64]>,
}

impl Launch {
    /// [`BLOCK_THREADS`] threads a block. `args`: of the layout that the kernel declares, in whole 64-bit words,
    /// without padding.
    pub fn new<Args>(file: &'static str, kernel: String, blocks: u32, args: &Args) -> Launch {
        assert!(size_of::<Args>().is_multiple_of(8) && align_of::<Args>() == 8, "arguments of whole words");
        // SAFETY: the words of a live struct, as many as it has.
        let words =
            unsafe { std::slice::from_raw_parts(std::ptr::from_ref(args).cast::<u64>(), size_of::<Args>() / 8) };
        Launch { file, kernel, blocks, threads: BLOCK_THREADS, shared_bytes: 0, args: words.into() }
    }

    /// With blocks of another size, and dynamic shared memory.
    pub fn with_blocks_of(self, threads: u32, shared_bytes: u32) -> Launch {
        Launch { threads, shared_bytes, ..self }
    }

    /// Address and size in bytes of the argument struct.
    pub fn args(&self) -> (*const c_void, usize) {
        (self.args.as_ptr().cast(), size_of_val(&*self.args))
    }
}

/// Of a device.
#[derive(Clone, Debug, Default)]
pub struct Properties {
    /// As CUDA calls it.
    pub name: String,
    pub multiprocessors: u32,
    /// Whether kernels for sm_90a run.
    pub is_hopper: bool,
}

/// Boxes of 64 columns and `box_rows` rows of a matrix [rows, columns] of 16-bit elements, its rows aligned to 16 bytes.
pub struct Boxes {
    pub from: *mut c_void,
    pub rows: u64,
    pub columns: u64,
    pub box_rows: u32,
}

/// `TensorMap` of kernels/include/hopper.cuh.
pub type TensorMap = [u64; 16];

/// What runs launches: a GPU ([`Gpu`]), or in the tests the host's build of the same kernels on CPU tensors.
pub trait Executor {
    /// Where the tensors must lie.
    fn device(&self) -> Device;

    /// What the choice of kernels and tiles depends on.
    ///
    /// # Errors
    /// `Unavailable` without driver.
    fn properties(&self) -> Result<Arc<Properties>>;

    /// What a kernel needs for copies of a matrix's boxes.
    ///
    /// # Errors
    /// `Unavailable` without driver; `Runtime` with CUDA's reason.
    ///
    /// # Safety
    /// As [`Executor::run`] for `boxes.from`, whenever a kernel uses it.
    unsafe fn tensor_map(&self, boxes: &Boxes) -> Result<TensorMap>;

    /// # Errors
    /// `Unavailable` without kernels, driver or device; `OutOfMemory`; `Runtime` with the reason.
    ///
    /// # Safety
    /// The argument struct is the one that the kernel declares. Its pointers are to live memory of `device`, as large
    /// as the shapes in it say, and stay allocated until torch's current stream has passed this launch (torch's caching
    /// allocator guarantees it for tensors made on that stream).
    unsafe fn run(&self, launch: &Launch) -> Result<()>;

    /// Several launches as one; None where there are no graphs. All kernels must have run before.
    ///
    /// # Errors
    /// As [`Executor::run`].
    ///
    /// # Safety
    /// As [`Executor::run`], whenever the graph is launched.
    unsafe fn graph(&self, _launches: &[Launch]) -> Result<Option<Graph>> {
        Ok(None)
    }
}

/// Launches with all the memory that they work on.
pub struct Prepared {
    launches: Vec<Launch>,
    device: Device,
    memory: Vec<Tensor>,
    graph: Option<Graph>,
}

impl Prepared {
    /// # Safety
    /// As [`Executor::run`] for `device`, where `memory` owns or shares everything that the launches point to.
    pub unsafe fn new(launches: Vec<Launch>, device: Device, memory: Vec<Tensor>) -> Prepared {
        Prepared { launches, device, memory, graph: None }
    }

    /// Several calls on one device as one, in their order, run once: on a GPU a CUDA graph.
    ///
    /// # Errors
    /// As [`Prepared::run`].
    pub fn joined(executor: &dyn Executor, calls: Vec<Prepared>) -> Result<Prepared> {
        calls.iter().try_for_each(|call| call.run(executor))?;
        let (mut launches, mut memory) = (Vec::new(), Vec::new());
        for call in calls {
            launches.extend(call.launches);
            memory.extend(call.memory);
        }
        // SAFETY: as in `run`; the graph is launched by `run` alone.
        let graph = unsafe { executor.graph(&launches) }?;
        Ok(Prepared { launches, device: executor.device(), memory, graph })
    }

    /// Runs the launches in their order; again and again gives the same outputs, but for sums, which are added to.
    ///
    /// # Errors
    /// As [`Executor::run`]; `Runtime` for an executor of another device.
    pub fn run(&self, executor: &dyn Executor) -> Result<()> {
        if executor.device() != self.device {
            let (found, expected) = (executor.device(), self.device);
            return Err(Error::Runtime(format!("launches: found device {found:?}, expected {expected:?}")));
        }
        if let Some(graph) = &self.graph {
            return graph.launch();
        }
        // SAFETY: promised to `new`; the memory lives as long as self, and torch's allocator keeps what is dropped later
        // until the stream has passed.
        self.launches.iter().try_for_each(|launch| unsafe { executor.run(launch) })
    }
}

/// CUDA device N; launches go to torch's current stream.
#[derive(Clone, Copy, Debug)]
pub struct Gpu(usize);

impl Gpu {
    /// CUDA device `index`, whether or not there is one: launches say so.
    pub fn number(index: usize) -> Gpu {
        Gpu(index)
    }

    pub(super) fn ordinal(self) -> Result<i32> {
        i32::try_from(self.0).map_err(|_| Error::Runtime(format!("cuda:{}: no such device", self.0)))
    }

    /// Torch's current stream, which torch keeps for the life of the process; the default stream where there is no such
    /// device.
    pub(super) fn stream(self) -> sys::CUstream {
        // SAFETY: takes a number; answers null for one that is no device.
        self.ordinal().map_or(std::ptr::null_mut(), |ordinal| unsafe { temper_current_cuda_stream(ordinal) }.cast())
    }

    /// Runs `work` with the primary context current on this thread.
    pub(super) fn in_primary_context<T>(
        self,
        what: &str,
        work: impl FnOnce() -> std::result::Result<T, DriverError>,
    ) -> Result<T> {
        let ordinal = self.ordinal()?;
        require_driver()?;
        let done = primary_context(ordinal).and_then(|context| in_context(context, work));
        done.map_err(|e| driver_error(&format!("{what} on cuda:{ordinal}"), e))
    }
}

impl Gpu {
    /// # Safety
    /// As [`Executor::run`], for this stream of the device.
    pub(super) unsafe fn run_on(&self, launch: &Launch, stream: sys::CUstream) -> Result<()> {
        let ordinal = self.ordinal()?;
        let function = function(launch.file, &launch.kernel, ordinal, launch.shared_bytes)?;
        let mut arguments = [launch.args().0.cast_mut()];
        let (grid, block) = ((launch.blocks, 1, 1), (launch.threads, 1, 1));
        let (kernel, shared) = (function.function, launch.shared_bytes);
        let launched = in_context(function.context, || {
            // SAFETY: the one argument outlives the call, which copies it; the rest is the caller's promise.
            unsafe { result::launch_kernel(kernel, grid, block, shared, stream, &mut arguments) }
        });
        launched.map_err(|e| driver_error(&format!("launch of {} on cuda:{ordinal}", launch.kernel), e))
    }
}

impl Executor for Gpu {
    fn device(&self) -> Device {
        Device::Cuda(self.0)
    }

    fn properties(&self) -> Result<Arc<Properties>> {
        self.known_properties()
    }

    unsafe fn tensor_map(&self, boxes: &Boxes) -> Result<TensorMap> {
        self.encode(boxes)
    }

    unsafe fn run(&self, launch: &Launch) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.run_on(launch, self.stream()) }
    }

    unsafe fn graph(&self, launches: &[Launch]) -> Result<Option<Graph>> {
        // SAFETY: the caller's promise.
        unsafe { Graph::capture(*self, launches) }.map(Some)
    }
}

/// What a kernel needs of a tensor; [`Needs::check`] is the only way from a tensor to a device pointer.
pub struct Needs<'a> {
    pub name: &'a str,
    pub kinds: &'a [Kind],
    /// Sizes, outermost first.
    pub shape: &'a [i64],
    pub device: Device,
}

impl Needs<'_> {
    /// The tensor's device pointer, or an error that names the tensor, what was found and what was expected.
    pub fn check(&self, tensor: &Tensor) -> Result<*mut c_void> {
        let wrong = |found: String, expected: String| {
            Err(Error::Runtime(format!("{}: found {found}, expected {expected}", self.name)))
        };
        if tensor.device() != self.device {
            return wrong(format!("device {:?}", tensor.device()), format!("{:?}", self.device));
        }
        if !self.kinds.contains(&tensor.kind()) {
            return wrong(format!("dtype {:?}", tensor.kind()), format!("{:?}", self.kinds));
        }
        if tensor.size() != self.shape {
            return wrong(format!("shape {:?}", tensor.size()), format!("{:?}", self.shape));
        }
        if !tensor.is_contiguous() {
            return wrong(format!("strides {:?}", tensor.stride()), "a contiguous tensor".into());
        }
        Ok(tensor.data_ptr())
    }
}
