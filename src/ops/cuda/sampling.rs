//! Sampling on a CUDA device: kernels/sample.cu. What it means stands in ops/sampling.rs.
#![allow(unsafe_code)]

use std::ffi::c_void;

use tch::{Device, Kind, Tensor};

use super::batch::are_aligned;
use super::launch::{BLOCK_THREADS, Executor, Launch, Needs, Prepared};
use crate::ops::sampling::SamplingRule;
use crate::{Error, Result};

/// (ids i64 [rows], log-probabilities f32 [rows]) without top_k and top_p. `logits` f32 [rows, vocab], `keys` i64 [rows].
///
/// # Errors
/// `Runtime` naming the tensor of the wrong device, dtype, shape or strides; `Unavailable` without kernels or driver.
pub fn sample(
    executor: &dyn Executor,
    logits: &Tensor,
    keys: &Tensor,
    rule: &SamplingRule,
) -> Result<(Tensor, Tensor)> {
    let (prepared, sampled) = prepare(executor.device(), logits, keys, rule)?;
    prepared.run(executor)?;
    Ok(sampled)
}

/// The launch of [`sample`] and what it writes.
///
/// # Errors
/// As [`sample`].
pub fn prepare(
    device: Device,
    logits: &Tensor,
    keys: &Tensor,
    rule: &SamplingRule,
) -> Result<(Prepared, (Tensor, Tensor))> {
    let [rows, vocab] = logits.size()[..] else {
        return Err(Error::Runtime(format!("sample: logits: found shape {:?}, expected [rows, vocab]", logits.size())));
    };
    if !(1..=MOST_TOKENS).contains(&vocab) || rows > i64::from(i32::MAX) {
        return Err(Error::Runtime(format!(
            "sample: logits: found [{rows}, {vocab}], expected 1 to {MOST_TOKENS} tokens"
        )));
    }
    let needs = Needs { name: "sample: logits", kinds: &[Kind::Float], shape: &[rows, vocab], device };
    let logits_pointer = needs.check(logits)?;
    let keys_pointer = keys_of(keys, rows, device)?;
    let ids = Tensor::f_empty([rows], (Kind::Int64, device))?;
    let logprobs = Tensor::f_empty([rows], (Kind::Float, device))?;
    let args = Args {
        logits: logits_pointer,
        keys: keys_pointer,
        ids: ids.data_ptr(),
        logprobs: logprobs.data_ptr(),
        seed: rule.seed,
        stream: rule.stream,
        vocab: vocab as u32,
        temperature: rule.temperature as f32,
        is_greedy: u32::from(rule.greedy),
        is_whole: u32::from(vocab % 8 == 0 && are_aligned([logits_pointer])),
        unused: 0,
    };
    let shared_bytes = (vocab as u32).div_ceil(TILE) * size_of::<f32>() as u32;
    let launches = match rows {
        0 => Vec::new(),
        _ => vec![
            Launch::new("sample", "sample".into(), rows as u32, &args).with_blocks_of(SAMPLE_THREADS, shared_bytes),
        ],
    };
    let memory = [logits, keys, &ids, &logprobs].map(Tensor::shallow_clone).into();
    // SAFETY: `Needs` has checked everything that is read, the rest was made here; all of it is in `memory`.
    Ok((unsafe { Prepared::new(launches, device, memory) }, (ids, logprobs)))
}

/// The uniform number of each row, f32 [rows]; `keys` i64 [rows].
///
/// # Errors
/// As [`sample`].
pub fn uniforms(executor: &dyn Executor, keys: &Tensor, rule: &SamplingRule) -> Result<Tensor> {
    let (device, rows) = (executor.device(), keys.numel());
    let keys_pointer = keys_of(keys, rows as i64, device)?;
    let uniforms = Tensor::f_empty([rows as i64], (Kind::Float, device))?;
    let args = UniformArgs {
        keys: keys_pointer,
        uniforms: uniforms.data_ptr(),
        seed: rule.seed,
        stream: rule.stream,
        rows: rows as u32,
    };
    let launches = match rows {
        0 => Vec::new(),
        _ => vec![Launch::new("sample", "sample_uniforms".into(), (rows as u32).div_ceil(BLOCK_THREADS), &args)],
    };
    let memory = [keys, &uniforms].map(Tensor::shallow_clone).into();
    // SAFETY: as in `prepare`.
    unsafe { Prepared::new(launches, device, memory) }.run(executor)?;
    Ok(uniforms)
}

fn keys_of(keys: &Tensor, rows: i64, device: Device) -> Result<*mut c_void> {
    Needs { name: "sample: keys", kinds: &[Kind::Int64], shape: &[rows], device }.check(keys)
}

/// `kSampleThreads` and `kTile` of kernels/sample.cu.
const SAMPLE_THREADS: u32 = 1024;
const TILE: u32 = 1024;
/// Whose tiles' sums fit the 48 KiB of shared memory that need no asking, with room to spare.
const MOST_TOKENS: i64 = 8 << 20;

/// `SampleArgs`.
#[repr(C)]
struct Args {
    logits: *const c_void,
    keys: *const c_void,
    ids: *mut c_void,
    logprobs: *mut c_void,
    seed: u64,
    stream: u32,
    vocab: u32,
    temperature: f32,
    is_greedy: u32,
    is_whole: u32,
    unused: u32,
}

/// `UniformArgs`.
#[repr(C)]
struct UniformArgs {
    keys: *const c_void,
    uniforms: *mut c_void,
    seed: u64,
    stream: u32,
    rows: u32,
}
