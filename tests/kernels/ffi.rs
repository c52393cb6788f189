//! The entry points of kernels/host/entries.cpp and nvidia_oracle.cpp; `g`, `b` are blocks and threads of a block.

use std::ffi::c_char;

/// null, or what went wrong.
pub type Error = *const c_char;

unsafe extern "C" {
    pub fn temper_host_thread_order(order: u32);
    pub fn temper_host_amax_f32(
        g: u32,
        b: u32,
        x: *const f32,
        amax: *mut f32,
        rows: u64,
        cols: u64,
        size: u32,
        stride: u32,
    ) -> Error;
    pub fn temper_host_amax_bf16(
        g: u32,
        b: u32,
        x: *const u16,
        amax: *mut f32,
        rows: u64,
        cols: u64,
        size: u32,
        stride: u32,
    ) -> Error;
    pub fn temper_host_fake_quant_f32(
        g: u32,
        b: u32,
        x: *const f32,
        out: *mut f32,
        amax: *const f32,
        counts: *mut u64,
        rows: u64,
        cols: u64,
        format: u32,
        stride: u32,
    ) -> Error;
    pub fn temper_host_fake_quant_bf16(
        g: u32,
        b: u32,
        x: *const u16,
        out: *mut u16,
        amax: *const f32,
        counts: *mut u64,
        rows: u64,
        cols: u64,
        format: u32,
        stride: u32,
    ) -> Error;
    pub fn temper_host_matmul_error_f32(
        g: u32,
        b: u32,
        y: *const f32,
        tokens: *const u64,
        bias: *const f32,
        out: *mut f32,
        sums: *mut f64,
        rows: u64,
        cols: u64,
        law: u32,
        scale: f32,
        seed: u64,
        stream: u32,
    ) -> Error;
    pub fn temper_host_matmul_error_bf16(
        g: u32,
        b: u32,
        y: *const f32,
        tokens: *const u64,
        bias: *const f32,
        out: *mut u16,
        sums: *mut f64,
        rows: u64,
        cols: u64,
        law: u32,
        scale: f32,
        seed: u64,
        stream: u32,
    ) -> Error;
    pub fn temper_host_perturb_f32(
        g: u32,
        b: u32,
        w: *const f32,
        tokens: *const u64,
        out: *mut f32,
        rows: u64,
        cols: u64,
        scale: f32,
        seed: u64,
        stream: u32,
    ) -> Error;
    pub fn temper_host_e2m1_encode(x: f32) -> u32;
    pub fn temper_host_e2m1_decode(code: u32) -> f32;
    pub fn temper_host_e4m3_encode(x: f32) -> u32;
    pub fn temper_host_e4m3_decode(byte: u32) -> f32;
    pub fn temper_host_to_bf16(x: f32) -> u16;
    pub fn temper_host_philox(key_lo: u32, key_hi: u32, counter: *const u32, words: *mut u32);
    pub fn temper_host_missing_barrier(block: u32, out: *mut f32) -> Error;
    pub fn temper_host_divergent_barrier(block: u32) -> Error;
    pub fn temper_oracle_available() -> i32;
    pub fn temper_oracle_e2m1(x: f32) -> u32;
    pub fn temper_oracle_e4m3(x: f32) -> u32;
    pub fn temper_oracle_bf16(x: f32) -> u16;
}
