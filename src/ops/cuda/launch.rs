//! The one place that launches: modules from the embedded fatbins, functions cached per device, torch's current
//! stream in the primary context that torch uses too.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::{CString, c_void};
use std::sync::{Mutex, PoisonError};

use cudarc::driver::{DriverError, result, sys};
use tch::{Device, Kind, Tensor};

use crate::device::kernels;
use crate::{Error, Result};

unsafe extern "C" {
    /// src/ops/cuda/stream.cpp: the `cudaStream_t` on which torch works now; null is the default stream.
    fn temper_current_cuda_stream(device: i32) -> *mut c_void;
}

/// Threads of a block where a kernel does not say otherwise: kBlockThreads of kernels/include/portable.cuh.
pub const BLOCK_THREADS: u32 = 256;

/// Dynamic shared memory of a block beyond this must be asked for.
const SHARED_WITHOUT_ASKING: u32 = 48 << 10;

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
    /// [`BLOCK_THREADS`] threads a block. `args`: of the layout that the kernel declares, in whole 64-bit words.
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

/// What runs launches: a GPU ([`Gpu`]), or in the tests the host's build of the same kernels on CPU tensors.
pub trait Executor {
    /// Where the tensors must lie.
    fn device(&self) -> Device;

    /// How many multiprocessors there are to fill.
    fn multiprocessors(&self) -> Result<u32>;

    /// # Errors
    /// `Unavailable` without kernels, driver or device; `OutOfMemory`; `Runtime` with the reason.
    ///
    /// # Safety
    /// The argument struct is the one that the kernel declares. Its pointers are to live memory of `device`, as large
    /// as the shapes in it say, and stay allocated until torch's current stream has passed this launch (torch's caching
    /// allocator guarantees it for tensors made on that stream).
    unsafe fn run(&self, launch: &Launch) -> Result<()>;
}

/// Launches with all the memory that they work on.
pub struct Prepared {
    launches: Vec<Launch>,
    device: Device,
    _memory: Vec<Tensor>,
}

impl Prepared {
    /// # Safety
    /// As [`Executor::run`] for `device`, where `memory` owns or shares everything that the launches point to.
    pub unsafe fn new(launches: Vec<Launch>, device: Device, memory: Vec<Tensor>) -> Prepared {
        Prepared { launches, device, _memory: memory }
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

    /// The device of a tensor.
    pub fn of(name: &str, tensor: &Tensor) -> Result<Gpu> {
        match tensor.device() {
            Device::Cuda(index) => Ok(Gpu(index)),
            other => Err(Error::Runtime(format!("{name}: found device {other:?}, expected a CUDA device"))),
        }
    }

    fn ordinal(self) -> Result<i32> {
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

impl Executor for Gpu {
    fn device(&self) -> Device {
        Device::Cuda(self.0)
    }

    fn multiprocessors(&self) -> Result<u32> {
        let mut known = MULTIPROCESSORS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&count) = known.get(&self.0) {
            return Ok(count);
        }
        let ordinal = self.ordinal()?;
        require_driver()?;
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let ask = || {
            result::init()?;
            // SAFETY: the device was just returned by CUDA.
            unsafe { result::device::get_attribute(result::device::get(ordinal)?, attribute) }
        };
        let count = ask().map_err(|e| driver_error(&format!("asking cuda:{ordinal}"), e))?;
        Ok(*known.entry(self.0).or_insert(count.max(1) as u32))
    }

    unsafe fn run(&self, launch: &Launch) -> Result<()> {
        let ordinal = self.ordinal()?;
        let function = function(launch.file, &launch.kernel, ordinal)?;
        let mut arguments = [launch.args().0.cast_mut()];
        let (grid, block, stream) = ((launch.blocks, 1, 1), (launch.threads, 1, 1), self.stream());
        let (kernel, shared) = (function.function, launch.shared_bytes);
        let launched = in_context(function.context, || {
            if shared > SHARED_WITHOUT_ASKING {
                let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // SAFETY: the function is loaded and never unloaded.
                unsafe { result::function::set_function_attribute(kernel, attribute, shared as i32) }?;
            }
            // SAFETY: the one argument outlives the call, which copies it; the rest is the caller's promise.
            unsafe { result::launch_kernel(kernel, grid, block, shared, stream, &mut arguments) }
        });
        launched.map_err(|e| driver_error(&format!("launch of {} on cuda:{ordinal}", launch.kernel), e))
    }
}

/// A loaded kernel and the primary context it lives in. Both are kept for the life of the process.
#[derive(Clone, Copy)]
struct Function {
    context: sys::CUcontext,
    function: sys::CUfunction,
}

/// A loaded file of kernels.
#[derive(Clone, Copy)]
struct Module {
    context: sys::CUcontext,
    module: sys::CUmodule,
}

// SAFETY: CUDA's handles may be used from any thread; they are never freed.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Send for Module {}

#[derive(Default)]
struct Loaded {
    modules: BTreeMap<(i32, &'static str), Module>,
    functions: BTreeMap<(i32, String), Function>,
}

static MULTIPROCESSORS: Mutex<BTreeMap<usize, u32>> = Mutex::new(BTreeMap::new());

static LOADED: Mutex<Loaded> = Mutex::new(Loaded { modules: BTreeMap::new(), functions: BTreeMap::new() });

fn function(file: &'static str, kernel: &str, ordinal: i32) -> Result<Function> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let key = (ordinal, kernel.to_string());
    if let Some(found) = loaded.functions.get(&key) {
        return Ok(*found);
    }
    let module = match loaded.modules.get(&(ordinal, file)) {
        Some(module) => *module,
        None => *loaded.modules.entry((ordinal, file)).or_insert(module(file, ordinal)?),
    };
    let invalid = DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE);
    let found = in_context(module.context, || {
        let name = CString::new(kernel).map_err(|_| invalid)?;
        // SAFETY: the module is loaded and never unloaded.
        let function = unsafe { result::module::get_function(module.module, name) }?;
        Ok(Function { context: module.context, function })
    });
    let found = found.map_err(|e| driver_error(&format!("{kernel} of kernels/{file}.cu on cuda:{ordinal}"), e))?;
    loaded.functions.insert(key, found);
    Ok(found)
}

fn module(file: &str, ordinal: i32) -> Result<Module> {
    let image = image(file)?;
    require_driver()?;
    load(&image, ordinal).map_err(|e| match e.0 {
        sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU => Error::Unavailable(format!(
            "cuda:{ordinal}: the kernels were built for {}; set CUDA_ARCHES to this GPU's and build again",
            kernels::ARCHES.join(", ")
        )),
        _ => driver_error(&format!("loading kernels/{file}.cu on cuda:{ordinal}"), e),
    })
}

/// The fatbin of kernels/`file`.cu, copied to words: CUDA reads 8-byte fields, and embedded bytes have no alignment.
fn image(file: &str) -> Result<Vec<u64>> {
    if let Some(reason) = kernels::WHY_NOT_BUILT {
        return Err(Error::Unavailable(format!("{reason}: run scripts/bootstrap.sh, touch build.rs and build again")));
    }
    let Some(embedded) = kernels::EMBEDDED.iter().find(|k| k.name == file) else {
        return Err(Error::Runtime(format!("kernels/{file}.cu is not part of this build")));
    };
    let words = embedded.fatbin.chunks(8).map(|bytes| {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        u64::from_ne_bytes(word)
    });
    Ok(words.collect())
}

fn require_driver() -> Result<()> {
    // SAFETY: only asks whether libcuda can be opened; cudarc would panic later where it cannot.
    match unsafe { sys::is_culib_present() } {
        true => Ok(()),
        false => Err(Error::Unavailable("no NVIDIA driver (libcuda) on this machine: use --device cpu".into())),
    }
}

/// The context that torch uses too; never released.
fn primary_context(ordinal: i32) -> std::result::Result<sys::CUcontext, DriverError> {
    result::init()?;
    let device = result::device::get(ordinal)?;
    // SAFETY: `device` was just returned by CUDA.
    unsafe { result::primary_ctx::retain(device) }
}

fn load(image: &[u64], ordinal: i32) -> std::result::Result<Module, DriverError> {
    let context = primary_context(ordinal)?;
    in_context(context, || {
        // SAFETY: `image` is a fatbin that nvcc wrote, aligned to 8 bytes; the module is never unloaded.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) }?;
        Ok(Module { context, module })
    })
}

/// Runs `work` with `context` current on this thread, then restores what was: the current context is also torch's
/// notion of the current device.
fn in_context<T>(
    context: sys::CUcontext,
    work: impl FnOnce() -> std::result::Result<T, DriverError>,
) -> std::result::Result<T, DriverError> {
    let before = result::ctx::get_current()?;
    if before == Some(context) {
        return work();
    }
    // SAFETY: a primary context that is never released.
    unsafe { result::ctx::set_current(context) }?;
    let outcome = work();
    if let Some(before) = before {
        // SAFETY: it was current a moment ago.
        unsafe { result::ctx::set_current(before) }?;
    }
    outcome
}

fn driver_error(what: &str, error: DriverError) -> Error {
    let reason = error.error_string().map_or_else(|_| format!("{:?}", error.0), |s| s.to_string_lossy().into_owned());
    match error.0 {
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory(format!("{what}: {reason}")),
        _ => Error::Runtime(format!("{what}: {reason}")),
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
