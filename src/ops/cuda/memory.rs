//! Torch's memory (memory.cpp): the most that it had given out of a device's, and what new tensors hold.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::sync::{Mutex, PoisonError};

use tch::Device;

unsafe extern "C" {
    fn temper_peak_cuda_bytes(device: c_int) -> i64;
    fn temper_reset_peak_cuda_bytes(device: c_int);
    fn temper_fill_new_tensors(on: bool);
}

/// Bytes; None on a CPU, and on a GPU that torch has not used.
pub fn peak_bytes(device: Device) -> Option<u64> {
    let Device::Cuda(index) = device else { return None };
    // SAFETY: takes a number and returns one; C++ exceptions end inside.
    u64::try_from(unsafe { temper_peak_cuda_bytes(index as c_int) }).ok()
}

/// Counts from what is given out now.
pub fn reset_peak(device: Device) {
    if let Device::Cuda(index) = device {
        // SAFETY: takes a number; C++ exceptions end inside.
        unsafe { temper_reset_peak_cuda_bytes(index as c_int) }
    }
}

static FILLERS: Mutex<usize> = Mutex::new(0);

/// While one lives, every new tensor of the process begins as NaN (integers: their largest value). Memory that is given out
/// again holds what lay there: a check that compares a kernel twice would take a launch that wrote nothing for a right one.
pub struct FilledMemory(());

impl FilledMemory {
    pub fn new() -> FilledMemory {
        FilledMemory::count(|fillers| fillers + 1);
        FilledMemory(())
    }

    fn count(change: impl Fn(usize) -> usize) {
        let mut fillers = FILLERS.lock().unwrap_or_else(PoisonError::into_inner);
        *fillers = change(*fillers);
        // SAFETY: takes a truth value, sets two flags of torch's.
        unsafe { temper_fill_new_tensors(*fillers > 0) }
    }
}

impl Default for FilledMemory {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for FilledMemory {
    fn drop(&mut self) {
        FilledMemory::count(|fillers| fillers.saturating_sub(1));
    }
}

/// Waits until the device has done what it was given; nothing to wait for on a CPU.
pub fn synchronize(device: Device) {
    if let Device::Cuda(index) = device {
        tch::Cuda::synchronize(index as i64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_tensors_are_filled_while_asked_for() {
        let outer = FilledMemory::new();
        drop(FilledMemory::new());
        for _ in 0..3 {
            let mut made = tch::Tensor::empty([1000], (tch::Kind::Half, Device::Cpu));
            assert!(bool::try_from(made.isnan().all()).is_ok_and(|all| all));
            let _ = made.fill_(1.0);
        }
        drop(outer);
    }

    #[test]
    fn where_there_is_no_gpu_there_is_no_peak() {
        assert_eq!(peak_bytes(Device::Cpu), None);
        if tch::Cuda::is_available() {
            println!("skipped: this machine has a GPU");
            return;
        }
        reset_peak(Device::Cuda(0));
        assert_eq!(peak_bytes(Device::Cuda(0)), None);
    }
}
