//! NVTX ranges, where the library is there: it comes with CUDA, and with torch's wheels in a directory that loaders do not
//! search, so it is looked for beside the libtorch that is loaded too.
//! Outside a profiler its calls do next to nothing.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::OnceLock;

/// By the names that loaders find: CUDA 12.9 and later, and before it.
const LIBRARIES: [&str; 2] = ["libnvtx3interop.so.1", "libnvToolsExt.so.1"];
/// Below site-packages: torch's wheels for CUDA 13 and 12.
const IN_WHEELS: [&str; 2] = ["nvidia/cu13/lib/libnvtx3interop.so.1", "nvidia/nvtx/lib/libnvToolsExt.so.1"];

struct Nvtx {
    library: String,
    push: unsafe extern "C" fn(*const c_char) -> c_int,
    pop: unsafe extern "C" fn() -> c_int,
}

fn nvtx() -> Option<&'static Nvtx> {
    static NVTX: OnceLock<Option<Nvtx>> = OnceLock::new();
    NVTX.get_or_init(|| {
        let beside_torch = site_packages().into_iter().flat_map(|site| IN_WHEELS.map(|path| format!("{site}/{path}")));
        LIBRARIES.into_iter().map(str::to_string).chain(beside_torch).find_map(load)
    })
    .as_ref()
}

/// The directory that holds torch/lib/libtorch_cpu.so, which is mapped.
fn site_packages() -> Option<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let line = maps.lines().find(|line| line.ends_with("/torch/lib/libtorch_cpu.so"))?;
    let path = &line[line.find('/')?..];
    Some(path.strip_suffix("/torch/lib/libtorch_cpu.so")?.to_string())
}

fn load(library: String) -> Option<Nvtx> {
    let path = CString::new(library.as_str()).ok()?;
    // SAFETY: a name that ends with NUL; the library's constructors do nothing but set up its tables.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
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
    nvtx().map(|nvtx| nvtx.library.clone())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_open_and_close_where_the_library_is_there() {
        let Some(nvtx) = nvtx() else {
            println!("skipped: no NVTX library here");
            return;
        };
        push("a test");
        // SAFETY: no arguments; it returns the depth of the range that ends, or a negative number. No profiler is attached, so
        // both are possible: what is tested is that the functions are there and return.
        let depth = unsafe { (nvtx.pop)() };
        assert!(depth < 2, "{depth}");
        assert!(library().is_some_and(|name| name.contains("nvtx") || name.contains("nvToolsExt")));
    }

    #[test]
    fn a_library_that_is_not_there_is_none() {
        assert!(load("libtemper-no-such-library.so.1".to_string()).is_none());
        assert!(load("with\0nul".to_string()).is_none());
    }
}
