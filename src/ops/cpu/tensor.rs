//! A tensor's memory as a slice: contiguous CPU tensors only, checked.

#![allow(unsafe_code)]

use half::{bf16, f16};
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

fn check(tensor: &Tensor, kind: Kind) -> Result<usize> {
    if tensor.device() != Device::Cpu || tensor.kind() != kind || !tensor.is_contiguous() {
        return Err(Error::Runtime(format!(
            "expected a contiguous {kind:?} tensor on the CPU, found {:?} on {:?} (contiguous: {})",
            tensor.kind(),
            tensor.device(),
            tensor.is_contiguous()
        )));
    }
    Ok(tensor.numel())
}

/// The elements of a contiguous f32 CPU tensor.
pub fn f32_slice(tensor: &Tensor) -> Result<&[f32]> {
    let len = check(tensor, Kind::Float)?;
    // SAFETY: check() holds type, place and layout; the borrow keeps the tensor alive.
    Ok(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<f32>(), len) })
}

/// The elements of a contiguous f32 CPU tensor, writable. No other tensor may share its storage in use.
pub fn f32_slice_mut(tensor: &mut Tensor) -> Result<&mut [f32]> {
    let len = check(tensor, Kind::Float)?;
    // SAFETY: as above; &mut keeps a second slice of this handle away, and callers pass tensors they just made or own.
    Ok(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<f32>(), len) })
}

/// The elements of a contiguous bf16 CPU tensor.
pub fn bf16_slice(tensor: &Tensor) -> Result<&[bf16]> {
    let len = check(tensor, Kind::BFloat16)?;
    // SAFETY: as f32_slice; half::bf16 is a transparent u16, the layout of torch's BFloat16.
    Ok(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<bf16>(), len) })
}

/// The elements of a contiguous bf16 CPU tensor, writable.
pub fn bf16_slice_mut(tensor: &mut Tensor) -> Result<&mut [bf16]> {
    let len = check(tensor, Kind::BFloat16)?;
    // SAFETY: as f32_slice_mut and bf16_slice.
    Ok(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<bf16>(), len) })
}

/// The elements of a contiguous f16 CPU tensor.
pub fn f16_slice(tensor: &Tensor) -> Result<&[f16]> {
    let len = check(tensor, Kind::Half)?;
    // SAFETY: as f32_slice; half::f16 is a transparent u16, the layout of torch's Half.
    Ok(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<f16>(), len) })
}

/// The elements of a contiguous f16 CPU tensor, writable.
pub fn f16_slice_mut(tensor: &mut Tensor) -> Result<&mut [f16]> {
    let len = check(tensor, Kind::Half)?;
    // SAFETY: as f32_slice_mut and f16_slice.
    Ok(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<f16>(), len) })
}
