//! The kernels' host build (kernels/host/entries.cpp) as safe functions: they size every buffer themselves.

use std::ffi::CStr;

use half::bf16;

use crate::ffi::*;

/// A launch: blocks, threads of a block (a multiple of 32), and the order in which the shim runs threads.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    pub grid: u32,
    pub block: u32,
    pub order: u32,
}

/// Ascending, descending and shuffled threads; one block, more blocks than work, and less than one warp of work.
pub const LAUNCHES: [Launch; 4] = [
    Launch { grid: 1, block: 64, order: 0 },
    Launch { grid: 3, block: 32, order: 1 },
    Launch { grid: 7, block: 128, order: 2 },
    Launch { grid: 2, block: 256, order: 77 },
];

/// The formats' numbers in kernels/include/block_scale.cuh.
pub const FORMATS: [(u32, &str); 5] =
    [(0, "mxfp4"), (1, "mxfp4:even"), (2, "mxfp4:rceil"), (3, "nvfp4"), (4, "nvfp4_single_level")];

fn check(error: Error) -> Result<(), String> {
    if error.is_null() {
        return Ok(());
    }
    // SAFETY: the shim returns null or a string literal.
    Err(unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned())
}

fn set_order(order: u32) {
    // SAFETY: takes a number and holds the shim's own lock.
    unsafe { temper_host_thread_order(order) }
}

/// What fake_quant.cu gives: y in the dtype of x, the amaxes, and [non-finite blocks, saturated elements].
pub struct FakeQuant<T> {
    pub out: Vec<T>,
    pub amax: Vec<f32>,
    pub counts: [u64; 2],
}

/// Both kernels of fake_quant.cu; `per_row`: one amax a row instead of one of the tensor.
pub fn fake_quant_f32(l: Launch, x: &[f32], rows: usize, cols: usize, format: u32, per_row: bool) -> FakeQuant<f32> {
    assert_eq!(x.len(), rows * cols);
    set_order(l.order);
    let size = if format <= 2 { 32 } else { 16 };
    let mut r =
        FakeQuant { out: vec![f32::NAN; x.len()], amax: vec![0.0; if per_row { rows } else { 1 }], counts: [0; 2] };
    let (n, k, s) = (rows as u64, cols as u64, u32::from(per_row));
    // SAFETY: x and out hold rows * cols elements, amax one a row or one, counts two; all outlive the calls.
    unsafe {
        check(temper_host_amax_f32(l.grid, l.block, x.as_ptr(), r.amax.as_mut_ptr(), n, k, size, s)).unwrap();
        check(temper_host_fake_quant_f32(
            l.grid,
            l.block,
            x.as_ptr(),
            r.out.as_mut_ptr(),
            r.amax.as_ptr(),
            r.counts.as_mut_ptr(),
            n,
            k,
            format,
            s,
        ))
        .unwrap();
    }
    r
}

/// [`fake_quant_f32`] for bf16.
pub fn fake_quant_bf16(l: Launch, x: &[bf16], rows: usize, cols: usize, format: u32, per_row: bool) -> FakeQuant<bf16> {
    assert_eq!(x.len(), rows * cols);
    set_order(l.order);
    let size = if format <= 2 { 32 } else { 16 };
    let mut r =
        FakeQuant { out: vec![bf16::NAN; x.len()], amax: vec![0.0; if per_row { rows } else { 1 }], counts: [0; 2] };
    let (n, k, s) = (rows as u64, cols as u64, u32::from(per_row));
    // SAFETY: as in fake_quant_f32; a bf16 is its 16 bits.
    unsafe {
        check(temper_host_amax_bf16(l.grid, l.block, x.as_ptr().cast(), r.amax.as_mut_ptr(), n, k, size, s)).unwrap();
        check(temper_host_fake_quant_bf16(
            l.grid,
            l.block,
            x.as_ptr().cast(),
            r.out.as_mut_ptr().cast(),
            r.amax.as_ptr(),
            r.counts.as_mut_ptr(),
            n,
            k,
            format,
            s,
        ))
        .unwrap();
    }
    r
}

/// The noise of a launch: law number (kernels/include/error_law.cuh), scale, seed, stream.
#[derive(Clone, Copy, Debug)]
pub struct Noise {
    pub law: u32,
    pub scale: f32,
    pub seed: u64,
    pub stream: u32,
}

/// matmul_error.cu with f32 output: (out, [error^2, y^2, y^4, elements]).
pub fn matmul_error_f32(
    l: Launch,
    n: Noise,
    y: &[f32],
    tokens: &[u64],
    cols: usize,
    bias: Option<&[f32]>,
) -> (Vec<f32>, [f64; 4]) {
    assert!(y.len() == tokens.len() * cols && bias.is_none_or(|b| b.len() == cols));
    set_order(l.order);
    let (mut out, mut sums) = (vec![f32::NAN; y.len()], [0.0; 4]);
    let bias = bias.map_or(std::ptr::null(), <[f32]>::as_ptr);
    // SAFETY: y and out hold rows * cols elements, tokens rows, bias cols or null, sums four.
    unsafe {
        check(temper_host_matmul_error_f32(
            l.grid,
            l.block,
            y.as_ptr(),
            tokens.as_ptr(),
            bias,
            out.as_mut_ptr(),
            sums.as_mut_ptr(),
            tokens.len() as u64,
            cols as u64,
            n.law,
            n.scale,
            n.seed,
            n.stream,
        ))
        .unwrap();
    }
    (out, sums)
}

/// [`matmul_error_f32`] with bf16 output.
pub fn matmul_error_bf16(
    l: Launch,
    n: Noise,
    y: &[f32],
    tokens: &[u64],
    cols: usize,
    bias: Option<&[f32]>,
) -> (Vec<bf16>, [f64; 4]) {
    assert!(y.len() == tokens.len() * cols && bias.is_none_or(|b| b.len() == cols));
    set_order(l.order);
    let (mut out, mut sums) = (vec![bf16::NAN; y.len()], [0.0; 4]);
    let bias = bias.map_or(std::ptr::null(), <[f32]>::as_ptr);
    // SAFETY: as in matmul_error_f32; a bf16 is its 16 bits.
    unsafe {
        check(temper_host_matmul_error_bf16(
            l.grid,
            l.block,
            y.as_ptr(),
            tokens.as_ptr(),
            bias,
            out.as_mut_ptr().cast(),
            sums.as_mut_ptr(),
            tokens.len() as u64,
            cols as u64,
            n.law,
            n.scale,
            n.seed,
            n.stream,
        ))
        .unwrap();
    }
    (out, sums)
}

/// perturb.cu: w + RN(scale z), w [tokens, cols].
pub fn perturb_f32(l: Launch, w: &[f32], tokens: &[u64], cols: usize, scale: f32, seed: u64, stream: u32) -> Vec<f32> {
    assert_eq!(w.len(), tokens.len() * cols);
    set_order(l.order);
    let mut out = vec![f32::NAN; w.len()];
    // SAFETY: w and out hold rows * cols elements, tokens rows.
    unsafe {
        check(temper_host_perturb_f32(
            l.grid,
            l.block,
            w.as_ptr(),
            tokens.as_ptr(),
            out.as_mut_ptr(),
            tokens.len() as u64,
            cols as u64,
            scale,
            seed,
            stream,
        ))
        .unwrap();
    }
    out
}

/// A kernel that lacks a barrier: what each thread read.
pub fn missing_barrier(block: u32, order: u32) -> Vec<f32> {
    set_order(order);
    let mut out = vec![0.0; block as usize];
    // SAFETY: out holds a value a thread.
    unsafe { check(temper_host_missing_barrier(block, out.as_mut_ptr())).unwrap() };
    out
}

/// A kernel with a barrier that one thread does not reach.
pub fn divergent_barrier(block: u32) -> Result<(), String> {
    // SAFETY: touches no memory of ours.
    check(unsafe { temper_host_divergent_barrier(block) })
}

macro_rules! pure {
    ($($(#[$doc:meta])* $name:ident = $foreign:ident($($arg:ident: $t:ty),*) -> $r:ty;)*) => {
        $($(#[$doc])* pub fn $name($($arg: $t),*) -> $r {
            // SAFETY: a pure function of its numbers.
            unsafe { $foreign($($arg),*) }
        })*
    };
}

pure! {
    e2m1_encode = temper_host_e2m1_encode(x: f32) -> u32;
    e2m1_decode = temper_host_e2m1_decode(code: u32) -> f32;
    /// Of x >= 0.
    e4m3_encode = temper_host_e4m3_encode(x: f32) -> u32;
    e4m3_decode = temper_host_e4m3_decode(byte: u32) -> f32;
    to_bf16 = temper_host_to_bf16(x: f32) -> u16;
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
