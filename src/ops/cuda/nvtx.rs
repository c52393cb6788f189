//! NVTX ranges, where the library is there: it comes with CUDA and with torch's wheels, and is looked for at the first range.
//! Outside a profiler its calls do next to nothing.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::OnceLock;

/// By the names that loaders find: CUDA 12.9 and later, before it, and torch's wheels for CUDA 13.
const LIBRARIES: [&CStr; 3] = [c"libnvtx3interop.so.1", c"libnvToolsExt.so.1", c"libnvtx3interop.so"];

struct Nvtx {
    library: &'static CStr,
    push: unsafe extern "C" fn(*const c_char) -> c_int,
    pop: unsafe extern "C" fn() -> c_int,
}

fn nvtx() -> Option<&'static Nvtx> {
    static NVTX: OnceLock<Option<Nvtx>> = OnceLock::new();
    NVTX.get_or_init(|| LIBRARIES.into_iter().find_map(load)).as_ref()
}

fn load(library: &'static CStr) -> Option<Nvtx> {
    // SAFETY: a name that ends with NUL; the library's constructors do nothing but set up its tables.
    let handle = unsafe { libc::dlopen(library.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if handle.is_null() {
        return None;
    }
    let symbol = |name: &CStr| -> Option<*mut c_void> {
        // SAFETY: the library is loaded and stays so.
        let found = unsafe { libc::dlsym(handle, name.as_ptr()) };
        (!found.is_null()).then_some(found)
    };
    let (push, pop) = (symbol(c"nvtxRangePushA")?, symbol(c"nvtxRangePop")?);
    // SAFETY: NVTX has had these two functions with these types since version 1.
    Some(unsafe {
        Nvtx {
            library,
            push: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*const c_char) -> c_int>(push),
            pop: std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> c_int>(pop),
        }
    })
}

/// The library that ranges go to; None: they go nowhere.
pub fn library() -> Option<String> {
    nvtx().map(|nvtx| nvtx.library.to_string_lossy().into_owned())
}

pub(in crate::ops) fn push(name: &str) {
    if let (Some(nvtx), Ok(name)) = (nvtx(), CString::new(name)) {
        // SAFETY: NVTX copies the text during the call.
        unsafe { (nvtx.push)(name.as_ptr()) };
    }
}

pub(in crate::ops) fn pop() {
    if let Some(nvtx) = nvtx() {
        // SAFETY: no arguments; without an open range it returns an error number.
        unsafe { (nvtx.pop)() };
    }
}

/// The kernel's number of the calling thread, as profilers show it.
pub(in crate::ops) fn thread_id() -> i32 {
    // SAFETY: no arguments, cannot fail.
    unsafe { libc::gettid() }
}
