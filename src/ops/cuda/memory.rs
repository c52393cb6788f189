//! The most device memory that torch had given out, since the last reset (memory.cpp).
#![allow(unsafe_code)]

use std::ffi::c_int;

use tch::Device;

unsafe extern "C" {
    fn temper_peak_cuda_bytes(device: c_int) -> i64;
    fn temper_reset_peak_cuda_bytes(device: c_int);
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
