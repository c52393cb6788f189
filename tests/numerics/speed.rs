//! Times on one core, by hand: `cargo test --release --test numerics -- --ignored --nocapture speed`.

use crate::support::Random;
use half::bf16;
use std::time::Instant;
use temper::numerics::error_law::ErrorLaw;
use temper::numerics::format::Format;
use temper::numerics::tensor_error::TensorErrorSums;
use temper::ops::cpu::fake_quant::{fake_quant_bf16_into, fake_quant_f32_into};
use temper::ops::cpu::matmul_error::{apply_bf16, apply_f32};
use temper::ops::cpu::normals::{Path, normals_into_by};

/// Best of `repeats`, in ns per element.
fn best_ns(elements: usize, repeats: usize, mut run: impl FnMut()) -> f64 {
    let times = (0..repeats).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    });
    times.fold(f64::MAX, f64::min) * 1e9 / elements as f64
}

#[test]
#[ignore = "a benchmark"]
fn speed() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(|| {
        let (rows, cols) = (1024, 1536);
        let elements = rows * cols;
        let mut z = vec![0f32; elements];
        for path in [Path::Avx2, Path::Portable] {
            let ns = best_ns(elements, 7, || normals_into_by(path, 1, 2, 3, &mut z));
            println!("normals {path:?}: {ns:.2} ns a value");
        }
        let mut random = Random(1);
        let x: Vec<f32> = (0..elements).map(|_| random.normal()).collect();
        let halves: Vec<bf16> = x.iter().map(|v| bf16::from_f32(*v)).collect();
        let (mut out, mut out_bf16) = (vec![0f32; elements], vec![bf16::ZERO; elements]);
        let scale = temper::numerics::block_format::TensorScale::Tensor;
        for format in ["mxfp4", "nvfp4", "nvfp4_single_level"] {
            let format: Format = format.parse().unwrap();
            let ns = best_ns(elements, 7, || {
                fake_quant_f32_into(&x, rows, cols, format, scale, &mut out);
            });
            println!("fake_quant {format} f32: {ns:.2} ns, {:.1} GB/s", 8.0 / ns);
            let ns = best_ns(elements, 7, || {
                fake_quant_bf16_into(&halves, rows, cols, format, scale, &mut out_bf16);
            });
            println!("fake_quant {format} bf16: {ns:.2} ns, {:.1} GB/s", 4.0 / ns);
        }
        let tokens: Vec<u64> = (0..rows as u64).collect();
        let law = ErrorLaw::RelativeGaussian;
        out.copy_from_slice(&x);
        let ns = best_ns(elements, 7, || {
            apply_f32(law, 0.05, 1, 2, &tokens, &mut out, cols, None);
        });
        println!("apply f32: {ns:.2} ns");
        let ns = best_ns(elements, 7, || {
            apply_bf16(law, 0.05, 1, 2, &tokens, &x, cols, Some(&x[..cols]), &mut out_bf16);
        });
        println!("apply bf16 + bias: {ns:.2} ns");
        let ns = best_ns(elements, 7, || {
            std::hint::black_box(TensorErrorSums::of(&x, &out, 0));
        });
        println!("tensor_error: {ns:.2} ns");
        let tokens: Vec<u64> = (0..4096).collect();
        let ns = best_ns(4096 * 64, 7, || {
            apply_f32(law, 0.05, 1, 2, &tokens, &mut out[..4096 * 64], 64, None);
        });
        println!("apply f32, 64 columns: {ns:.2} ns");
    });
}
