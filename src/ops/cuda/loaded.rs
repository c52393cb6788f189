//! The kernels of the embedded fatbins on their devices: modules and functions, loaded once and kept.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::CString;
use std::sync::{Mutex, OnceLock, PoisonError};

use cudarc::driver::{DriverError, result, sys};

use crate::device::kernels;
use crate::{Error, Result};

/// A loaded kernel and the primary context it lives in. Both are kept for the life of the process.
#[derive(Clone, Copy)]
pub struct Function {
    pub context: sys::CUcontext,
    pub function: sys::CUfunction,
    /// Dynamic shared memory that a block may have.
    shared_bytes: u32,
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

static LOADED: Mutex<Loaded> = Mutex::new(Loaded { modules: BTreeMap::new(), functions: BTreeMap::new() });

/// The kernel of kernels/`file`.cu on device `ordinal`, whose blocks may have `shared_bytes` of dynamic shared memory.
///
/// # Errors
/// `Unavailable` without kernels, driver or device; `Runtime` with CUDA's reason.
pub fn function(file: &'static str, kernel: &str, ordinal: i32, shared_bytes: u32) -> Result<Function> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let key = (ordinal, kernel.to_string());
    if let Some(found) = loaded.functions.get(&key).filter(|found| found.shared_bytes >= shared_bytes) {
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
        if shared_bytes > 0 {
            allow_shared(function, shared_bytes)?;
        }
        Ok(Function { context: module.context, function, shared_bytes })
    });
    let found = found.map_err(|e| driver_error(&format!("{kernel} of kernels/{file}.cu on cuda:{ordinal}"), e))?;
    loaded.functions.insert(key, found);
    Ok(found)
}

/// Lets a block have more than the 48 KiB, static memory included, that need no asking, and a multiprocessor as many blocks as
/// all of its memory has room for.
fn allow_shared(function: sys::CUfunction, bytes: u32) -> std::result::Result<(), DriverError> {
    use sys::CUfunction_attribute::{
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MOST,
        CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT as SHARE,
    };
    const ALL_PERCENT: i32 = 100;
    // SAFETY: the function is loaded and never unloaded.
    unsafe {
        result::function::set_function_attribute(function, MOST, bytes as i32)?;
        result::function::set_function_attribute(function, SHARE, ALL_PERCENT)
    }
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

/// # Errors
/// `Unavailable` where there is none.
pub fn require_driver() -> Result<()> {
    // Asking opens libraries, which takes long.
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: only asks whether libcuda can be opened; cudarc would panic later where it cannot.
    match PRESENT.get_or_init(|| unsafe { sys::is_culib_present() }) {
        true => Ok(()),
        false => Err(Error::Unavailable("no NVIDIA driver (libcuda) on this machine: use --device cpu".into())),
    }
}

/// The context that torch uses too; never released.
pub fn primary_context(ordinal: i32) -> std::result::Result<sys::CUcontext, DriverError> {
    let mut known = CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(context) = known.get(&ordinal) {
        return Ok(context.0);
    }
    result::init()?;
    let device = result::device::get(ordinal)?;
    // SAFETY: `device` was just returned by CUDA.
    let context = unsafe { result::primary_ctx::retain(device) }?;
    Ok(known.entry(ordinal).or_insert(Context(context)).0)
}

#[derive(Clone, Copy)]
struct Context(sys::CUcontext);

// SAFETY: CUDA's handles may be used from any thread; it is never released.
unsafe impl Send for Context {}

static CONTEXTS: Mutex<BTreeMap<i32, Context>> = Mutex::new(BTreeMap::new());

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
pub fn in_context<T>(
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

pub fn driver_error(what: &str, error: DriverError) -> Error {
    let reason = error.error_string().map_or_else(|_| format!("{:?}", error.0), |s| s.to_string_lossy().into_owned());
    match error.0 {
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory(format!("{what}: {reason}")),
        _ => Error::Runtime(format!("{what}: {reason}")),
    }
}
