//! FlashAttention over sequences without padding: libtorch's operator, which tch does not name (flash.cpp).
#![allow(unsafe_code)]

use std::ffi::c_char;

use tch::Tensor;
use torch_sys::C_tensor;

use super::take_text;
use crate::{Error, Result};

unsafe extern "C" {
    fn temper_flash_attention(
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        starts: *const C_tensor,
        longest: i64,
        scale: f64,
        result: *mut *mut C_tensor,
    ) -> *mut c_char;
}

/// Causal within each sequence, differentiable: q [tokens, heads, dim], k and v [tokens, kv_heads, dim], bf16 or f16 on a
/// GPU; starts i32 [sequences + 1], where each begins and the last ends; -> [tokens, heads, dim].
pub fn flash_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    starts: &Tensor,
    longest: i64,
    scale: f64,
) -> Result<Tensor> {
    let mut result = std::ptr::null_mut();
    let (q, k, v, starts) = (q.as_ptr(), k.as_ptr(), v.as_ptr(), starts.as_ptr());
    // SAFETY: live handles; result has room for one.
    let error = unsafe { temper_flash_attention(q, k, v, starts, longest, scale, &mut result) };
    if !error.is_null() {
        // SAFETY: a text from strdup, ours to free.
        return Err(Error::of_torch(&unsafe { take_text(error) }));
    }
    // SAFETY: on success C++ stored a new handle; we own it.
    Ok(unsafe { Tensor::from_ptr(result) })
}
