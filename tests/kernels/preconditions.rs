//! The CUDA operations refuse what they cannot take, with an error that names the tensor; and on a machine with a GPU
//! they give the definition's bits.

use tch::{Device, Kind, Tensor};
use temper::numerics::block_format::{self, TensorScale};
use temper::numerics::error_law::ErrorLaw;
use temper::numerics::{format::Format, generator};
use temper::ops::cuda;

use crate::host::FORMATS;
use crate::support::{assert_bits, nasty};

#[test]
fn a_cpu_tensor_is_an_error_that_says_so() {
    let x = Tensor::zeros([2, 16], (Kind::Float, Device::Cpu));
    let tokens = Tensor::zeros([2], (Kind::Int64, Device::Cpu));
    let sums = Tensor::zeros([4], (Kind::Double, Device::Cpu));
    let errors = [
        cuda::fake_quant::fake_quant(&x, Format::NVFP4).unwrap_err(),
        cuda::perturb::perturb(&x, &tokens, 0.1, 0, 0).unwrap_err(),
        cuda::matmul_error::matmul_error(&x, &tokens, ErrorLaw::default(), 0.1, 0, 0, None, Kind::Float, &sums)
            .unwrap_err(),
    ];
    for error in errors {
        let text = error.to_string();
        assert!(text.contains("Cpu") && text.contains("expected a CUDA device"), "{text}");
        assert_eq!(error.exit_code(), 1);
    }
}

#[test]
fn a_launch_without_driver_is_an_error_not_a_panic() {
    if tch::Cuda::is_available() {
        return;
    }
    // SAFETY: no argument is read: loading the kernel fails before the launch.
    let error = unsafe { cuda::launch::launch("perturb", "perturb_f32", 0, 1, &[]) }.unwrap_err();
    assert!(matches!(error, temper::Error::Unavailable(_)), "{error}");
}

/// A GPU's results as f32, beside the definition's. Skipped without a GPU.
fn gpu() -> Option<Device> {
    if temper::device::cuda_devices().is_err() {
        println!("skipped: no usable GPU");
        return None;
    }
    Some(Device::Cuda(0))
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::<f32>::try_from(tensor.to_device(Device::Cpu).to_kind(Kind::Float).flatten(0, -1)).unwrap()
}

#[test]
fn fake_quant_on_a_gpu() {
    let Some(device) = gpu() else { return };
    for (rows, cols) in [(1, 1), (7, 250), (128, 1536)] {
        let x = nasty(rows, cols, 9, rows > 1);
        let on_gpu = Tensor::from_slice(&x).view([rows as i64, cols as i64]).to_device(device);
        for (_, name) in FORMATS {
            let format: Format = name.parse().unwrap();
            for scale in [TensorScale::Tensor, TensorScale::Row, TensorScale::Amax(4.0)] {
                let expected = block_format::fake_quant_scaled(&x, rows, cols, format, scale);
                let found = cuda::fake_quant::fake_quant_scaled(&on_gpu, format, scale).unwrap();
                assert_bits(&floats(&found.dequantized), &expected.dequantized, &format!("{name} {scale:?}"));
                let counts = [expected.nonfinite_blocks as i64, expected.saturated as i64];
                assert_eq!(Vec::<i64>::try_from(found.counts.to_device(Device::Cpu)).unwrap(), counts);
            }
        }
    }
}

#[test]
fn noise_on_a_gpu() {
    let Some(device) = gpu() else { return };
    let (rows, cols, seed, stream) = (65usize, 1001usize, 77, 0x1400_0001);
    let y = nasty(rows, cols, 3, false);
    let tokens: Vec<u64> = (0..rows as u64).map(|r| r << 18 | 5).collect();
    let bias = vec![0.25f32; cols];
    let keys = Tensor::from_slice(&tokens.iter().map(|&t| t as i64).collect::<Vec<_>>()).to_device(device);
    let on_gpu = Tensor::from_slice(&y).view([rows as i64, cols as i64]).to_device(device);
    let bias_gpu = Tensor::from_slice(&bias).to_device(device);
    let z: Vec<f32> =
        (0..y.len()).map(|i| generator::normal(seed, stream, tokens[i / cols], (i % cols) as u32)).collect();
    for law in [ErrorLaw::RelativeGaussian, ErrorLaw::AbsoluteGaussian, ErrorLaw::SystematicBias] {
        let sums = Tensor::zeros([4], (Kind::Double, device));
        let found = cuda::matmul_error::matmul_error(
            &on_gpu,
            &keys,
            law,
            0.05,
            seed,
            stream,
            Some(&bias_gpu),
            Kind::Float,
            &sums,
        );
        let expected: Vec<f32> = y.iter().zip(&z).map(|(&y, &z)| law.apply(y, 0.05, z) + 0.25).collect();
        assert_bits(&floats(&found.unwrap()), &expected, &format!("{law:?}"));
        assert_eq!(Vec::<f64>::try_from(sums.to_device(Device::Cpu)).unwrap()[3], (rows * cols) as f64);
    }
    let found = cuda::perturb::perturb(&on_gpu, &keys, 0.01, seed, stream).unwrap();
    let expected: Vec<f32> = y.iter().zip(&z).map(|(&y, &z)| y + 0.01 * z).collect();
    assert_bits(&floats(&found), &expected, "perturb");
}
