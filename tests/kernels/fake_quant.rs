//! fake_quant_*.cu and amax.cu against numerics::block_format: y, codes, scales and amaxes bit for bit, and the sums behind
//! the error metrics; and y against the outputs of public libraries.

use half::bf16;
use tch::{Kind, Tensor};
use temper::numerics::block_format::{self, Quantized, RoundingDraw, TensorScale};
use temper::numerics::format::{Family, Format, SPELLINGS as FORMATS};
use temper::numerics::tensor_error::TensorErrorSums;
use temper::ops::cuda::fake_quant::{Batch, Matrix, MatrixScale, Wanted, amax, quantize};
use temper::ops::fake_quant::StochasticDraw;
use temper::ops::matmul_error::RowKeys;

use crate::host::{ORDERS, Shim};
use crate::support::{assert_bits, floats, nasty, rounded, shared, tensor};

const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];
/// (rows, cols): one element, less than a block, ragged blocks and octets, several tiles of the grid.
const SHAPES: [(usize, usize); 9] =
    [(1, 1), (3, 15), (2, 16), (5, 33), (4, 64), (3, 100), (7, 250), (33, 96), (9, 1160)];
const EVERYTHING: Wanted = Wanted { dequantized: true, codes: true, error_sums: true };

/// A matrix, what it is quantized with, and what the definition makes of it.
struct Case {
    x: Tensor,
    wide: Vec<f32>,
    cols: usize,
    draw: StochasticDraw,
}

impl Case {
    fn new(values: &[f32], rows: usize, cols: usize, kind: Kind, keys: RowKeys) -> Case {
        let x = tensor(values, rows, cols, kind);
        Case { wide: floats(&x), x, cols, draw: StochasticDraw { seed: 5 << 40 | 9, stream: 5 << 28 | 3, keys } }
    }

    fn rows(&self) -> usize {
        self.wide.len() / self.cols
    }

    fn matrix(&self, scale: MatrixScale) -> Matrix<'_> {
        Matrix { x: &self.x, scale, draw: Some(&self.draw) }
    }

    fn expected(&self, format: Format, scale: TensorScale) -> Quantized {
        let draw = RoundingDraw { seed: self.draw.seed, stream: self.draw.stream, row_keys: self.draw.keys.host() };
        block_format::quantize(&self.wide, self.rows(), self.cols, format, scale, Some(&draw))
    }

    /// Compares matrix `number` of a batch that has everything.
    fn check(&self, format: Format, scale: TensorScale, batch: &Batch, number: usize, what: &str) {
        let (expected, made) = (self.expected(format, scale), &batch.matrices[number]);
        let y = rounded(&expected.dequantized, self.x.kind());
        let found = made.dequantized.as_ref().unwrap();
        assert_eq!(found.kind(), self.x.kind(), "{what}");
        assert_bits(&floats(found), &y, what);
        assert_eq!(bytes(made.codes.as_ref().unwrap()), self.packed(&expected.codes, format), "{what}: codes");
        let scales = made.block_scales.as_ref().unwrap();
        match format.family {
            Family::Fp8 { .. } => assert_bits(&floats(scales), &expected.fp8_scales, &format!("{what}: scales")),
            _ => assert_eq!(bytes(scales), expected.block_scales, "{what}: scales"),
        }
        let nonfinite = Vec::<i64>::try_from(&batch.nonfinite_blocks).unwrap()[number];
        assert_eq!(nonfinite as usize, expected.nonfinite_blocks, "{what}: non-finite blocks");
        let sums = TensorErrorSums::of(&self.wide, &y, expected.saturated as u64);
        assert_sums(&batch.error_sums().unwrap()[number], &sums, what);
    }

    /// Codes as the kernels store them.
    fn packed(&self, codes: &[u8], format: Format) -> Vec<u8> {
        if format.has_e4m3_elements() {
            return codes.to_vec();
        }
        let pack = |pair: &[u8]| pair[0] | pair.get(1).copied().unwrap_or(0) << 4;
        codes.chunks(self.cols).flat_map(|row| row.chunks(2).map(pack)).collect()
    }
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    Vec::<u8>::try_from(tensor.flatten(0, -1)).unwrap()
}

fn assert_sums(found: &TensorErrorSums, expected: &TensorErrorSums, what: &str) {
    let counts = |s: &TensorErrorSums| [s.elements, s.nonzero, s.deadzone, s.saturated, s.nonfinite];
    assert_eq!(counts(found), counts(expected), "{what}: elements, nonzero, deadzone, saturated, non-finite");
    assert_eq!(found.max_abs_error, expected.max_abs_error, "{what}: largest error");
    // The terms of the relative error are taken in f32, where a tiny |x| + 1e-10 has lost places.
    let sums = |s: &TensorErrorSums| {
        [(s.x_sq, 1e-12), (s.q_sq, 1e-12), (s.x_q, 1e-12), (s.error_sq, 1e-12), (s.relative, 1e-6)]
    };
    for (i, ((f, tolerance), (e, _))) in sums(found).into_iter().zip(sums(expected)).enumerate() {
        assert!((f - e).abs() <= tolerance * e.abs(), "{what}: sum {i}: found {f:e}, expected {e:e}");
    }
}

fn per_row_keys(rows: usize) -> RowKeys {
    RowKeys::new((0..rows as u64).map(|row| row << 40 ^ 0xFFFF_0000_0000_0007).collect())
}

#[test]
fn every_format_dtype_and_shape_is_the_definition() {
    for (number, (rows, cols)) in SHAPES.into_iter().enumerate() {
        let values = nasty(rows, cols, number as u64, rows * cols > 64);
        for kind in KINDS {
            let case = Case::new(&values, rows, cols, kind, per_row_keys(rows));
            for (place, name) in FORMATS.into_iter().enumerate() {
                let format: Format = name.parse().unwrap();
                for (turn, scale) in
                    [TensorScale::Tensor, TensorScale::Row, TensorScale::Amax(4.0)].into_iter().enumerate()
                {
                    let invalid = format.two_d && scale == TensorScale::Row;
                    if turn > 0 && (!format.has_tensor_scale() || invalid) {
                        continue;
                    }
                    let shim = ORDERS[(number + place + turn) % ORDERS.len()];
                    let batch = quantize(&shim, format, &[case.matrix(MatrixScale::Own(scale))], EVERYTHING).unwrap();
                    case.check(
                        format,
                        scale,
                        &batch,
                        0,
                        &format!("{name} {kind:?} [{rows}, {cols}] {scale:?} {shim:?}"),
                    );
                }
            }
        }
    }
}

#[test]
fn thread_order_changes_nothing() {
    let case = Case::new(&nasty(35, 330, 3, true), 35, 330, Kind::BFloat16, per_row_keys(35));
    for name in FORMATS {
        let format: Format = name.parse().unwrap();
        for shim in ORDERS {
            let matrix = case.matrix(MatrixScale::Own(TensorScale::Tensor));
            let batch = quantize(&shim, format, &[matrix], EVERYTHING).unwrap();
            case.check(format, TensorScale::Tensor, &batch, 0, &format!("{name} {shim:?}"));
        }
    }
}

/// So large that a thread takes several octets, the last of which lie beyond the end.
#[test]
fn large_matrices_are_the_definition() {
    for (rows, cols) in [(90, 1056), (67, 1001)] {
        let case = Case::new(&nasty(rows, cols, 5, true), rows, cols, Kind::BFloat16, per_row_keys(rows));
        for (place, name) in ["mxfp4", "mxfp8:sr", "nvfp4", "fp8:tensor", "nvfp4:2d"].into_iter().enumerate() {
            let format: Format = name.parse().unwrap();
            let shim = ORDERS[place % ORDERS.len()];
            let batch =
                quantize(&shim, format, &[case.matrix(MatrixScale::Own(TensorScale::Tensor))], EVERYTHING).unwrap();
            case.check(format, TensorScale::Tensor, &batch, 0, &format!("{name} [{rows}, {cols}] {shim:?}"));
        }
    }
}

#[test]
fn a_batch_of_many_matrices_is_each_alone_and_groups_share_their_amax() {
    let shape = |i: usize| (1 + i % 5, [64, 40, 7, 160][i % 4]);
    let cases: Vec<Case> = (0..50)
        .map(|i| {
            let (rows, cols) = shape(i);
            let values: Vec<f32> = nasty(rows, cols, i as u64, false).iter().map(|v| v.clamp(-1e3, 1e3)).collect();
            let keys = RowKeys::consecutive((i as u64) << 32, rows);
            Case::new(&values, rows, cols, Kind::BFloat16, keys)
        })
        .collect();
    for name in ["mxfp4:sr", "nvfp4", "nvfp4:sr,2d", "fp8:tensor", "fp8", "nvfp4:4over6"] {
        let format: Format = name.parse().unwrap();
        // Of every three the first two are siblings.
        let matrices: Vec<Matrix> =
            cases.iter().enumerate().map(|(i, case)| case.matrix(MatrixScale::Group(i / 3 * 2 + i % 3 / 2))).collect();
        let batch = quantize(&Shim(5), format, &matrices, EVERYTHING).unwrap();
        for (i, case) in cases.iter().enumerate() {
            let siblings = if i % 3 == 2 { i..i + 1 } else { i / 3 * 3..(i / 3 * 3 + 2).min(cases.len()) };
            let largest = cases[siblings].iter().map(|c| block_format::finite_amax(&c.wide, c.cols, format));
            let scale = TensorScale::Amax(largest.fold(0.0, f32::max));
            case.check(format, scale, &batch, i, &format!("{name} matrix {i}"));
        }
    }
}

#[test]
fn what_is_not_wanted_is_not_made_and_changes_nothing() {
    let case = Case::new(&nasty(6, 96, 1, true), 6, 96, Kind::BFloat16, per_row_keys(6));
    for name in FORMATS {
        let format: Format = name.parse().unwrap();
        let matrices = [case.matrix(MatrixScale::Own(TensorScale::Tensor))];
        let everything = quantize(&Shim(0), format, &matrices, EVERYTHING).unwrap();
        let y =
            quantize(&Shim(0), format, &matrices, Wanted { codes: false, error_sums: false, ..EVERYTHING }).unwrap();
        let codes = quantize(&Shim(0), format, &matrices, Wanted { codes: true, ..Wanted::default() }).unwrap();
        let (all, y, codes) = (&everything.matrices[0], &y.matrices[0], &codes.matrices[0]);
        assert!(y.codes.is_none() && y.block_scales.is_none() && codes.dequantized.is_none(), "{name}");
        let floats = |t: &Option<Tensor>| floats(t.as_ref().unwrap());
        assert_bits(&floats(&y.dequantized), &floats(&all.dequantized), name);
        assert_eq!(bytes(codes.codes.as_ref().unwrap()), bytes(all.codes.as_ref().unwrap()), "{name}");
        assert_bits(&floats(&codes.block_scales), &floats(&all.block_scales), name);
    }
}

#[test]
fn the_amax_leaves_non_finite_blocks_out() {
    for (rows, cols) in [(1, 1), (3, 40), (5, 2000), (40, 130)] {
        for nonfinite in [false, rows * cols > 64] {
            for kind in KINDS {
                let x = tensor(&nasty(rows, cols, 7, nonfinite), rows, cols, kind);
                for name in ["nvfp4", "nvfp4:2d", "fp8:tensor"] {
                    let format: Format = name.parse().unwrap();
                    let expected = block_format::finite_amax(&floats(&x), cols, format);
                    for shim in ORDERS {
                        let found = floats(&amax(&shim, &x, format).unwrap());
                        assert_bits(&found, &[expected], &format!("{name} {kind:?} [{rows}, {cols}] {shim:?}"));
                    }
                }
            }
        }
    }
    let x = tensor(&[1.0; 32], 1, 32, Kind::Float);
    assert!(amax(&Shim(0), &x, Format::MXFP4).is_err(), "mxfp4 has no tensor amax");
}

#[test]
fn an_empty_matrix_is_empty() {
    let empty = Case::new(&[], 0, 64, Kind::Float, per_row_keys(0));
    let case = Case::new(&nasty(2, 64, 1, false), 2, 64, Kind::Float, per_row_keys(2));
    for name in ["mxfp4", "nvfp4", "nvfp4:2d", "fp8:tensor"] {
        let format: Format = name.parse().unwrap();
        let own = MatrixScale::Own(TensorScale::Tensor);
        let batch = quantize(&Shim(0), format, &[empty.matrix(own), case.matrix(own), empty.matrix(own)], EVERYTHING);
        let batch = batch.unwrap();
        assert_eq!(batch.matrices[0].dequantized.as_ref().unwrap().size(), [0, 64]);
        case.check(format, TensorScale::Tensor, &batch, 1, name);
        assert!(quantize(&Shim(0), format, &[], EVERYTHING).unwrap().matrices.is_empty());
    }
}

#[test]
fn outputs_of_public_libraries() {
    let oracles = [
        ("mxfp4", ["spec.mxfp4_floor.dq", "ao.mxfp4_floor.dq"]),
        ("mxfp4:even", ["spec.mxfp4_even.dq", "ct.mxfp4.dq"]),
        ("mxfp4:rceil", ["spec.mxfp4_rceil.dq", "spec.mxfp4_rceil.dq"]), // torchao's f32 rceil differs from it on ties
        ("nvfp4", ["spec.nvfp4_te.dq", "te.nvfp4.dq"]),
        ("nvfp4_single_level", ["original.nvfp4.dq", "original.nvfp4.dq"]),
    ];
    for stem in ["gauss_s0", "student3", "ties_mx", "zeros"] {
        for (dtype, kind) in [("f32", Kind::Float), ("bf16", Kind::BFloat16)] {
            let Some(path) = shared(&format!("vectors/{stem}.{dtype}.safetensors")) else {
                return;
            };
            let bytes = std::fs::read(path).unwrap();
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let shape = file.tensor("x").unwrap().shape().to_vec();
            let x = tensor(&stored(&file, "x").unwrap(), shape[0], shape[1], kind);
            for (format, names) in oracles {
                let matrix = Matrix { x: &x, scale: MatrixScale::Own(TensorScale::Tensor), draw: None };
                let wanted = Wanted { dequantized: true, ..Wanted::default() };
                let batch = quantize(&Shim(3), format.parse().unwrap(), &[matrix], wanted).unwrap();
                let found = floats(batch.matrices[0].dequantized.as_ref().unwrap());
                for name in names {
                    let Some(expected) = stored(&file, name) else {
                        continue;
                    };
                    for (i, (f, e)) in found.iter().zip(&rounded(&expected, kind)).enumerate() {
                        // The codes decide y; how value, S and 1/G are multiplied differs by library, and with three
                        // roundings by up to three places of an f32 (a wrong code is off by 2^21 places or more).
                        let ulps = if format == "nvfp4" && dtype == "f32" { 3 } else { 0 };
                        let near = f.to_bits().abs_diff(e.to_bits()) <= ulps;
                        assert!(*f == *e || near, "{stem}.{dtype} {name} element {i}: found {f:e}, expected {e:e}");
                    }
                }
            }
        }
    }
}

fn stored(file: &safetensors::SafeTensors, name: &str) -> Option<Vec<f32>> {
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
