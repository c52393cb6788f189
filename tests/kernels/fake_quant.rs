//! fake_quant.cu against numerics::block_format, bit for bit, and against the outputs of public libraries.

use half::bf16;
use temper::numerics::block_format::{self, TensorScale};
use temper::numerics::format::Format;

use crate::host::{self, FORMATS, LAUNCHES};
use crate::support::{assert_bits, assert_bits_bf16, nasty, shared};

/// (rows, cols): one element, less than a block, ragged tails of both block sizes, several warps.
const SHAPES: [(usize, usize); 8] = [(1, 1), (3, 15), (2, 16), (5, 33), (4, 64), (3, 100), (7, 250), (33, 96)];

#[test]
fn f32_is_the_definition() {
    for (case, (rows, cols)) in SHAPES.into_iter().enumerate() {
        for nonfinite in [false, rows * cols > 64] {
            let x = nasty(rows, cols, case as u64, nonfinite);
            for (number, name) in FORMATS {
                for per_row in [false, true] {
                    let format: Format = name.parse().unwrap();
                    let scale = if per_row { TensorScale::Row } else { TensorScale::Tensor };
                    let expected = block_format::fake_quant_scaled(&x, rows, cols, format, scale);
                    // Every thread order where the amax is the tensor's; one of them, by turns, where it is a row's.
                    let launches = if per_row { &LAUNCHES[case % 4..=case % 4] } else { &LAUNCHES[..] };
                    for &launch in launches {
                        let found = host::fake_quant_f32(launch, &x, rows, cols, number, per_row);
                        let what = format!("{name} [{rows}, {cols}] per_row {per_row} {launch:?}");
                        assert_bits(&found.out, &expected.dequantized, &what);
                        let counts = [expected.nonfinite_blocks as u64, expected.saturated as u64];
                        assert_eq!(found.counts, counts, "{what}");
                        if !per_row {
                            assert_bits(&found.amax, &[block_format::finite_amax(&x, cols, format)], &what);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn bf16_is_the_definition_rounded_once() {
    for (case, (rows, cols)) in SHAPES.into_iter().enumerate() {
        let x: Vec<bf16> =
            nasty(rows, cols, 100 + case as u64, rows * cols > 64).into_iter().map(bf16::from_f32).collect();
        let wide: Vec<f32> = x.iter().map(|v| v.to_f32()).collect();
        for (number, name) in FORMATS {
            let expected = block_format::fake_quant(&wide, rows, cols, name.parse().unwrap());
            let rounded: Vec<bf16> = expected.dequantized.iter().map(|&v| bf16::from_f32(v)).collect();
            for launch in LAUNCHES {
                let found = host::fake_quant_bf16(launch, &x, rows, cols, number, false);
                assert_bits_bf16(&found.out, &rounded, &format!("{name} [{rows}, {cols}] {launch:?}"));
            }
        }
    }
}

#[test]
fn a_nonfinite_block_is_nan_and_its_neighbours_are_not() {
    for (number, name) in FORMATS {
        let size = if number <= 2 { 32 } else { 16 };
        let mut x = vec![1.0f32; 4 * size];
        x[size + 3] = f32::INFINITY;
        let found = host::fake_quant_f32(LAUNCHES[2], &x, 2, 2 * size, number, false);
        for (i, y) in found.out.iter().enumerate() {
            assert_eq!(y.is_nan(), i / size == 1, "{name} element {i}: {y}");
        }
        assert_eq!(found.counts[0], 1, "{name}");
        assert_eq!(found.amax, [1.0], "{name}: a non-finite block is left out of the amax");
    }
}

#[test]
fn outputs_of_public_libraries() {
    let oracles = [
        (0, ["spec.mxfp4_floor.dq", "ao.mxfp4_floor.dq"]),
        (1, ["spec.mxfp4_even.dq", "ct.mxfp4.dq"]),
        (2, ["spec.mxfp4_rceil.dq", "spec.mxfp4_rceil.dq"]), // torchao's f32 rceil differs from it on ties
        (3, ["spec.nvfp4_te.dq", "te.nvfp4.dq"]),
        (4, ["original.nvfp4.dq", "original.nvfp4.dq"]),
    ];
    for stem in ["gauss_s0", "student3", "ties_mx", "zeros"] {
        for dtype in ["f32", "bf16"] {
            let Some(path) = shared(&format!("vectors/{stem}.{dtype}.safetensors")) else {
                return;
            };
            let bytes = std::fs::read(path).unwrap();
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let x = floats(&file, "x").unwrap();
            let shape = file.tensor("x").unwrap().shape().to_vec();
            for (number, names) in oracles {
                let found = if dtype == "bf16" {
                    let narrow: Vec<bf16> = x.iter().map(|&v| bf16::from_f32(v)).collect();
                    let out = host::fake_quant_bf16(LAUNCHES[2], &narrow, shape[0], shape[1], number, false).out;
                    out.iter().map(|v| v.to_f32()).collect()
                } else {
                    host::fake_quant_f32(LAUNCHES[2], &x, shape[0], shape[1], number, false).out
                };
                for name in names {
                    let Some(expected) = floats(&file, name) else {
                        continue;
                    };
                    for (i, (f, e)) in found.iter().zip(&expected).enumerate() {
                        let e = if dtype == "bf16" { bf16::from_f32(*e).to_f32() } else { *e };
                        // The codes decide y; how value, S and 1/G are multiplied differs by library, and with three
                        // roundings by up to three places of an f32 (a wrong code is off by 2^21 places or more).
                        let ulps = if number == 3 && dtype == "f32" { 3 } else { 0 };
                        let near = f.to_bits().abs_diff(e.to_bits()) <= ulps;
                        assert!(
                            *f == e || near,
                            "{stem}.{dtype} {name} element {i} of x {}: found {f:e}, expected {e:e}",
                            x[i]
                        );
                    }
                }
            }
        }
    }
}

fn floats(file: &safetensors::SafeTensors, name: &str) -> Option<Vec<f32>> {
    let tensor = file.tensor(name).ok()?;
    Some(match tensor.dtype() {
        safetensors::Dtype::F32 => {
            tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
        }
        safetensors::Dtype::BF16 => {
            tensor.data().chunks_exact(2).map(|b| bf16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect()
        }
        other => panic!("{name}: {other:?}"),
    })
}
