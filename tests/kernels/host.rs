//! The kernels' host build (kernels/host) as an executor of launches, and its codecs as safe functions.

use std::ffi::{CStr, CString};
use std::sync::Arc;

use tch::Device;
use temper::ops::cuda::launch::{Boxes, Executor, Launch, Properties, TensorMap};
use temper::{Error, Result};

use crate::ffi::*;

/// Runs launches on CPU tensors under the shim, with its threads in an order: 0 ascending, 1 warp after warp, the last first,
/// else a permutation drawn anew after every barrier.
#[derive(Clone, Copy, Debug)]
pub struct Shim(pub u32);

/// Threads ascending, warp after warp, and shuffled.
pub const ORDERS: [Shim; 3] = [Shim(0), Shim(1), Shim(77)];

impl Executor for Shim {
    fn device(&self) -> Device {
        Device::Cpu
    }

    /// One multiprocessor: matrices of a moderate size then take every path of large ones.
    fn properties(&self) -> Result<Arc<Properties>> {
        Ok(Arc::new(Properties { name: "host".into(), multiprocessors: 1, is_hopper: true }))
    }

    /// `Map` of kernels/host/shim.h.
    unsafe fn tensor_map(&self, boxes: &Boxes) -> Result<TensorMap> {
        let Boxes { from, rows, columns, box_rows } = *boxes;
        let mut map = [0; 16];
        map[..5].copy_from_slice(&[from as u64, columns, rows, columns * 2, u64::from(box_rows)]);
        Ok(map)
    }

    unsafe fn run(&self, launch: &Launch) -> Result<()> {
        let name = CString::new(launch.kernel.as_str()).unwrap();
        let (args, bytes) = launch.args();
        // SAFETY: takes a number, for the launches of this thread.
        unsafe { temper_host_thread_order(self.0) };
        // SAFETY: the shim checks name and size of the struct; what it points to is the caller's promise.
        let error =
            unsafe { temper_host_run(name.as_ptr(), launch.blocks, launch.threads, launch.shared_bytes, args, bytes) };
        check(error).map_err(|text| Error::Runtime(format!("{}: {text}", launch.kernel)))
    }
}

fn check(error: crate::ffi::Error) -> std::result::Result<(), String> {
    if error.is_null() {
        return Ok(());
    }
    // SAFETY: the shim returns null or a string literal.
    Err(unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned())
}

/// A kernel that lacks a barrier: what each thread read.
pub fn missing_barrier(block: u32, order: u32) -> Vec<f32> {
    // SAFETY: takes a number, for the launches of this thread.
    unsafe { temper_host_thread_order(order) };
    let mut out = vec![0.0; block as usize];
    // SAFETY: out holds a value a thread.
    check(unsafe { temper_host_missing_barrier(block, out.as_mut_ptr()) }).unwrap();
    out
}

/// A kernel with a barrier that one thread does not reach.
pub fn divergent_barrier(block: u32) -> std::result::Result<(), String> {
    // SAFETY: touches no memory of ours.
    check(unsafe { temper_host_divergent_barrier(block) })
}

macro_rules! pure {
    ($($name:ident = $foreign:ident($($arg:ident: $t:ty),*) -> $r:ty;)*) => {
        $(pub fn $name($($arg: $t),*) -> $r {
            // SAFETY: a pure function of its numbers.
            unsafe { $foreign($($arg),*) }
        })*
    };
}

pure! {
    e2m1_encode = temper_host_e2m1_encode(x: f32) -> u32;
    e2m1_decode = temper_host_e2m1_decode(code: u32) -> f32;
    e4m3_encode = temper_host_e4m3_encode(x: f32) -> u32;
    e4m3_decode = temper_host_e4m3_decode(byte: u32) -> f32;
    to_bf16 = temper_host_to_bf16(x: f32) -> u16;
    to_f16 = temper_host_to_f16(x: f32) -> u16;
    from_f16 = temper_host_from_f16(bits: u16) -> f32;
    oracle_e2m1 = temper_oracle_e2m1(x: f32) -> u32;
    oracle_e4m3 = temper_oracle_e4m3(x: f32) -> u32;
    oracle_bf16 = temper_oracle_bf16(x: f32) -> u16;
}

/// Whether NVIDIA's headers were there at build time.
pub fn oracle_available() -> bool {
    // SAFETY: returns a constant.
    unsafe { temper_oracle_available() == 1 }
}

pub fn philox(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    let mut words = [0; 4];
    // SAFETY: both arrays hold four words.
    unsafe { temper_host_philox(key[0], key[1], counter.as_ptr(), words.as_mut_ptr()) };
    words
}
