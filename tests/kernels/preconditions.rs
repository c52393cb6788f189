//! The CUDA operations refuse what they cannot take, with an error that names the tensor.

use std::sync::Arc;

use tch::{Kind, Tensor};
use temper::numerics::block_format::TensorScale;
use temper::numerics::error_law::ErrorLaw;
use temper::numerics::format::Format;
use temper::ops::cuda::fake_quant::{Matrix, MatrixScale, Wanted, quantize};
use temper::ops::cuda::launch::{Boxes, Executor, Gpu, Launch, Properties, TensorMap};
use temper::ops::cuda::noise::{Destination, Law, Noisy, add_noise};
use temper::ops::cuda::place::{Place, with_host};
use temper::ops::fake_quant::StochasticDraw;
use temper::ops::matmul_error::RowKeys;

use crate::host::Shim;
use crate::support::tensor;

const WANTED: Wanted = Wanted { dequantized: true, codes: false, error_sums: false };

fn error_of(x: &Tensor, format: &str, scale: TensorScale, draw: Option<&StochasticDraw>) -> String {
    let matrix = Matrix { x, scale: MatrixScale::Own(scale), draw };
    let error = quantize(&Shim(0), format.parse().unwrap(), &[matrix], WANTED).err().unwrap();
    assert_eq!(error.exit_code(), 1);
    error.to_string()
}

#[test]
fn fake_quant_names_what_it_cannot_take() {
    let x = tensor(&[1.0; 64], 2, 32, Kind::Float);
    let whole = TensorScale::Tensor;
    for (text, part) in [
        (error_of(&x.to_kind(Kind::Double), "mxfp4", whole, None), "Double"),
        (error_of(&x.view(-1), "mxfp4", whole, None), "[64]"),
        (error_of(&x.transpose(0, 1), "mxfp4", whole, None), "strides"),
        (error_of(&x, "nvfp4:2d", TensorScale::Row, None), "one per row"),
        (error_of(&x, "mxfp4:sr", whole, None), "0 row keys for 2 rows"),
    ] {
        assert!(text.contains("fake_quant") && text.contains(part), "{text}");
    }
    let draw = StochasticDraw { seed: 0, stream: 0, keys: RowKeys::consecutive(0, 3) };
    assert!(error_of(&x, "mxfp4:sr", whole, Some(&draw)).contains("3 row keys for 2 rows"));
}

#[test]
fn noise_names_what_it_cannot_take() {
    let (y, keys) = (tensor(&[1.0; 64], 2, 32, Kind::Float), RowKeys::consecutive(0, 2));
    let law = Law { law: ErrorLaw::default(), seed: 0, sums: None };
    let error = |y: &Tensor, out: &Tensor, bias: Option<&Tensor>, keys: &RowKeys, law: &Law| {
        let noisy = Noisy { y, into: Destination::Store(out), bias, keys, scale: 0.1, stream: 0 };
        add_noise(&Shim(0), law, &[noisy]).err().unwrap().to_string()
    };
    let sums = Tensor::zeros([4], (Kind::Double, tch::Device::Cpu));
    for (text, part) in [
        (error(&y.to_kind(Kind::Half), &y, None, &keys, &law), "from Half to Float"),
        (error(&y, &y.narrow(1, 0, 16), None, &keys, &law), "shape [2, 16]"),
        (error(&y, &y, Some(&sums), &keys, &law), "bias"),
        (error(&y, &y, None, &RowKeys::consecutive(0, 5), &law), "5 row keys for 2 rows"),
        (error(&y, &y, None, &keys, &Law { sums: Some(&sums), ..law }), "sums"),
    ] {
        assert!(text.contains("noise") && text.contains(part), "{text}");
    }
}

#[test]
fn a_cpu_tensor_has_no_place_but_the_hosts() {
    let x = tensor(&[1.0; 64], 2, 32, Kind::Float);
    assert!(Place::of(&x).is_none());
    assert!(with_host(&NoGpu, || matches!(Place::of(&x), Some(Place::Host(_)))));
    assert!(Place::of(&x).is_none());
}

/// Device 0 without a tensor on it.
struct NoGpu;

impl Executor for NoGpu {
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
        // SAFETY: without a driver nothing is launched.
        unsafe { Gpu::number(0).run(launch) }
    }
}

#[test]
fn a_launch_without_driver_is_an_error_not_a_panic() {
    if tch::Cuda::is_available() {
        return;
    }
    let x = tensor(&[1.0; 64], 2, 32, Kind::Float);
    let matrix = Matrix { x: &x, scale: MatrixScale::Own(TensorScale::Tensor), draw: None };
    let error = quantize(&NoGpu, Format::MXFP4, &[matrix], WANTED).err().unwrap();
    assert!(matches!(error, temper::Error::Unavailable(_)), "{error}");
}
