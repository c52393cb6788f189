//! The entry points of kernels/host/entries.cpp and nvidia_oracle.cpp.

use std::ffi::{c_char, c_void};

/// null, or what went wrong.
pub type Error = *const c_char;

unsafe extern "C" {
    pub fn temper_host_thread_order(order: u32);
    pub fn temper_host_run(
        kernel: *const c_char,
        blocks: u32,
        threads: u32,
        shared_bytes: u32,
        args: *const c_void,
        bytes: usize,
    ) -> Error;
    pub fn temper_host_e2m1_encode(x: f32) -> u32;
    pub fn temper_host_e2m1_decode(code: u32) -> f32;
    pub fn temper_host_e4m3_encode(x: f32) -> u32;
    pub fn temper_host_e4m3_decode(byte: u32) -> f32;
    pub fn temper_host_to_bf16(x: f32) -> u16;
    pub fn temper_host_to_f16(x: f32) -> u16;
    pub fn temper_host_from_f16(bits: u16) -> f32;
    pub fn temper_host_philox(key_lo: u32, key_hi: u32, counter: *const u32, words: *mut u32);
    pub fn temper_host_missing_barrier(block: u32, out: *mut f32) -> Error;
    pub fn temper_host_divergent_barrier(block: u32) -> Error;
    pub fn temper_oracle_available() -> i32;
    pub fn temper_oracle_e2m1(x: f32) -> u32;
    pub fn temper_oracle_e4m3(x: f32) -> u32;
    pub fn temper_oracle_bf16(x: f32) -> u16;
}
