//! The self-test of a GPU, on the host's build of the kernels: it passes, and it can fail.

use std::sync::Arc;

use temper::bench::selftest::{Check, Sizes, run};
use temper::ops::cuda::launch::{Boxes, Executor, Launch, Properties, TensorMap};

use crate::host::Shim;

#[test]
fn every_check_passes() {
    let sizes =
        Sizes { small: &[(1, 1), (7, 70)], large: &[(9, 256)], products: &[(1, 1, 1), (18, 72, 530), (20, 40, 256)] };
    let checks = run(&Shim(0), &sizes, &|_| {}).unwrap();
    let failed: Vec<&Check> = checks.iter().filter(|check| !check.passed()).collect();
    assert!(failed.is_empty(), "{failed:?}");
    assert!(checks.len() > 300 && checks.iter().all(|check| check.compared > 0), "{} checks", checks.len());
    for kernel in [
        "fake_quant",
        "amax",
        "noise",
        "aqn",
        "matmul",
        "noisy_linear",
        "rms_norm",
        "swiglu",
        "rotary",
        "sample",
        "decode_attention",
        "packed_attention",
    ] {
        assert!(checks.iter().any(|check| check.kernel == kernel), "{kernel}");
    }
}

/// Loses the launches of some kernels, or refuses them.
struct Faulty {
    kernels: &'static str,
    refuses: bool,
}

impl Executor for Faulty {
    fn device(&self) -> tch::Device {
        tch::Device::Cpu
    }

    fn properties(&self) -> temper::Result<Arc<Properties>> {
        Shim(0).properties()
    }

    unsafe fn tensor_map(&self, boxes: &Boxes) -> temper::Result<TensorMap> {
        // SAFETY: the caller's promise.
        unsafe { Shim(0).tensor_map(boxes) }
    }

    unsafe fn run(&self, launch: &Launch) -> temper::Result<()> {
        match (launch.kernel.starts_with(self.kernels), self.refuses) {
            // SAFETY: the caller's promise.
            (false, _) => unsafe { Shim(0).run(launch) },
            (true, false) => Ok(()),
            (true, true) => Err(temper::Error::OutOfMemory("refused".into())),
        }
    }
}

#[test]
fn a_lost_launch_differs_and_a_refused_one_is_counted() {
    let sizes = Sizes { small: &[(2, 70)], large: &[], products: &[(3, 40, 530)] };
    let lost = ["fake_quant_mxfp4_bf16", "amax_blocks", "noise_f32_to_bf16", "matmul_nt_16x256"];
    let lost = lost.map(|kernel| (kernel, false));
    for (kernels, refuses) in lost.into_iter().chain([("amax_of_rows", true)]) {
        let checks = run(&Faulty { kernels, refuses }, &sizes, &|_| {}).unwrap();
        let differs = checks.iter().any(|check| check.differing > 0);
        let not_run = checks.iter().any(|check| check.not_run.is_some());
        assert_eq!((differs, not_run), (!refuses, refuses), "{kernels} refuses {refuses}");
    }
}

#[test]
fn a_lost_launch_of_a_small_operation_differs() {
    let sizes = Sizes { small: &[(2, 70)], large: &[], products: &[] };
    for kernels in
        ["rms_norm_bf16", "rms_norm_dweight", "swiglu_backward", "rotary_f32", "sample", "decode_attention_join_f16"]
    {
        let checks = run(&Faulty { kernels, refuses: false }, &sizes, &|_| {}).unwrap();
        assert!(checks.iter().any(|check| check.differing > 0), "{kernels}");
    }
}
