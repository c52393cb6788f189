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

/// Threads of a block, for every kernel so far. A multiple of the warp: the kernels shuffle among full warps.
pub const BLOCK_THREADS: u32 = 256;

/// Kernels stride over the grid, so a larger one would only add blocks that wait.
const MAX_BLOCKS: u64 = 8192;

/// Blocks that give `threads` threads, at most [`MAX_BLOCKS`].
pub fn grid_blocks(threads: u64) -> u32 {
    threads.div_ceil(u64::from(BLOCK_THREADS)).clamp(1, MAX_BLOCKS) as u32
}

/// One kernel argument, of the width the kernel declares.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    Pointer(*mut c_void),
    U64(u64),
    U32(u32),
    F32(f32),
}

impl Arg {
    /// The argument's bytes at the low end of a word: CUDA reads as many as the kernel declares.
    fn word(self) -> u64 {
        match self {
            Arg::Pointer(p) => p as u64,
            Arg::U64(v) => v,
            Arg::U32(v) => u64::from(v),
            Arg::F32(v) => u64::from(v.to_bits()),
        }
    }
}

/// Launches `kernel` of kernels/`file`.cu on torch's current stream of CUDA device `device`.
///
/// # Errors
/// `Unavailable` without kernels, driver or device; `OutOfMemory`; `Runtime` with CUDA's reason.
///
/// # Safety
/// `args` match the kernel's parameters in number and width. Pointers are to live memory of that device, as large as
/// the kernel's shapes say, and stay allocated until torch's current stream has passed this launch (torch's caching
/// allocator guarantees it for tensors made on that stream).
pub unsafe fn launch(file: &str, kernel: &'static str, device: usize, threads: u64, args: &[Arg]) -> Result<()> {
    let ordinal = i32::try_from(device).map_err(|_| Error::Runtime(format!("CUDA device {device}: no such device")))?;
    let function = function(file, kernel, ordinal)?;
    let mut words: Vec<u64> = args.iter().map(|a| a.word()).collect();
    let mut pointers: Vec<*mut c_void> = words.iter_mut().map(|w| std::ptr::from_mut(w).cast()).collect();
    // SAFETY: the stream belongs to torch and to the device's primary context; torch keeps its streams for the
    // life of the process.
    let stream = unsafe { temper_current_cuda_stream(ordinal) } as sys::CUstream;
    let block = (BLOCK_THREADS, 1, 1);
    let launched = in_context(function.context, || {
        // SAFETY: `pointers` point into `words`, which outlives the call (CUDA copies the arguments at launch); their
        // number and widths are the caller's promise.
        unsafe {
            result::launch_kernel(function.function, (grid_blocks(threads), 1, 1), block, 0, stream, &mut pointers)
        }
    });
    launched.map_err(|e| driver_error(&format!("launch of {kernel} on cuda:{device}"), e))
}

/// A loaded kernel and the primary context it lives in. Both are kept for the life of the process.
#[derive(Clone, Copy)]
struct Function {
    context: sys::CUcontext,
    function: sys::CUfunction,
}

// SAFETY: CUDA's handles may be used from any thread; they are never freed.
unsafe impl Send for Function {}

static FUNCTIONS: Mutex<BTreeMap<(i32, &'static str), Function>> = Mutex::new(BTreeMap::new());

fn function(file: &str, kernel: &'static str, ordinal: i32) -> Result<Function> {
    let mut functions = FUNCTIONS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(found) = functions.get(&(ordinal, kernel)) {
        return Ok(*found);
    }
    let image = image(file)?;
    // SAFETY: only asks whether libcuda can be opened; cudarc would panic later where it cannot.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::Unavailable("no NVIDIA driver (libcuda) on this machine: use --device cpu".into()));
    }
    let loaded = load(&image, kernel, ordinal).map_err(|e| match e.0 {
        sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU => Error::Unavailable(format!(
            "cuda:{ordinal}: the kernels were built for {}; set CUDA_ARCHES to this GPU's and build again",
            kernels::ARCHES.join(", ")
        )),
        _ => driver_error(&format!("loading {kernel} on cuda:{ordinal}"), e),
    })?;
    functions.insert((ordinal, kernel), loaded);
    Ok(loaded)
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

fn load(image: &[u64], kernel: &str, ordinal: i32) -> std::result::Result<Function, DriverError> {
    result::init()?;
    let device = result::device::get(ordinal)?;
    // SAFETY: `device` was just returned by CUDA. The context is torch's own (primary), never released.
    let context = unsafe { result::primary_ctx::retain(device) }?;
    let invalid = DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE);
    let name = CString::new(kernel).map_err(|_| invalid)?;
    in_context(context, || {
        // SAFETY: `image` is a fatbin that nvcc wrote, aligned to 8 bytes; the module is never unloaded.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) }?;
        // SAFETY: `module` was just loaded.
        let function = unsafe { result::module::get_function(module, name) }?;
        Ok(Function { context, function })
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
    pub device: usize,
}

impl Needs<'_> {
    /// The tensor's device pointer, or an error that names the tensor, what was found and what was expected.
    pub fn check(&self, tensor: &Tensor) -> Result<Arg> {
        let wrong = |found: String, expected: String| {
            Err(Error::Runtime(format!("{}: found {found}, expected {expected}", self.name)))
        };
        if tensor.device() != Device::Cuda(self.device) {
            return wrong(format!("device {:?}", tensor.device()), format!("{:?}", Device::Cuda(self.device)));
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
        Ok(Arg::Pointer(tensor.data_ptr()))
    }
}

/// The number N of a tensor on cuda:N, and its sizes as [rows, cols].
pub fn cuda_matrix(name: &str, tensor: &Tensor) -> Result<(usize, i64, i64)> {
    let Device::Cuda(device) = tensor.device() else {
        return Err(Error::Runtime(format!("{name}: found device {:?}, expected a CUDA device", tensor.device())));
    };
    match tensor.size()[..] {
        [rows, cols] => Ok((device, rows, cols)),
        _ => Err(Error::Runtime(format!("{name}: found shape {:?}, expected [rows, cols]", tensor.size()))),
    }
}
