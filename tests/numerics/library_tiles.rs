//! 2-D tiles: codes, scales and values of public libraries, and what a tile is for: W and its transpose quantize alike.

use crate::support::{Random, floats, shared};
use half::bf16;
use safetensors::SafeTensors;
use temper::numerics::block_format::{Quantized, fake_quant, finite_amax};
use temper::numerics::block_scale::{mx_exponent, tensor_scale};
use temper::numerics::format::{Format, MxScaleRule};
use temper::numerics::{e2m1, e8m0, original};

const SIDE: usize = 64;

fn rounded(v: f32) -> f32 {
    bf16::from_f32(v).to_f32()
}

#[test]
fn results_equal_the_libraries() {
    let Some(path) = shared("vectors/sq64.bf16.safetensors") else { return };
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let x = floats(&file, "x");
    for (library, format) in
        [("te.nvfp4_2d16", "nvfp4:2d"), ("spec.nvfp4_te_2d16", "nvfp4:2d"), ("spec.mxfp4_even_2d32", "mxfp4:even,2d")]
    {
        let format: Format = format.parse().unwrap();
        let ours = fake_quant(&x, SIDE, SIDE, format);
        for (i, (ours, theirs)) in ours.dequantized.iter().zip(floats(&file, &format!("{library}.dq"))).enumerate() {
            assert_eq!(rounded(*ours), rounded(theirs), "{library}: element {i} x {}", x[i]);
        }
        let packed = file.tensor(&format!("{library}.codes")).unwrap();
        for (i, &code) in ours.codes.iter().enumerate() {
            let theirs = packed.data()[i / 2] >> (4 * (i % 2)) & 15;
            assert!(code == theirs || (code | theirs) == 8, "{library}: element {i} ours {code} theirs {theirs}");
        }
        let scales = file.tensor(&format!("{library}.scales")).unwrap();
        let blocks = format.blocks_per_row(SIDE);
        let rows_of_scales = scales.shape()[0]; // one per row, or one per tile
        for (i, ours) in ours.block_scales.iter().enumerate() {
            let (row, block) = (i / blocks, i % blocks);
            let theirs = scales.data()[row * rows_of_scales / SIDE * blocks + block];
            assert_eq!(*ours, theirs, "{library}: scale of row {row}, block {block}");
        }
        if let Ok(g) = file.tensor(&format!("{library}.g")) {
            let stored = f32::from_le_bytes(g.data().try_into().unwrap());
            let g = if library.starts_with("te.") { tensor_scale(format, stored) } else { stored };
            assert_eq!(g, ours.tensor_encode_scale, "{library}");
        }
    }
}

/// What the original called 2-D: 1024 consecutive values share a scale, whatever the rows.
#[test]
fn the_originals_2d_is_not_a_tile() {
    let Some(path) = shared("vectors/sq64.bf16.safetensors") else { return };
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (x, theirs) = (floats(&file, "x"), floats(&file, "original.mxfp4_2d.dq"));
    for (x, theirs) in x.chunks(1024).zip(theirs.chunks(1024)) {
        let k = mx_exponent(x.iter().fold(0f32, |a, v| a.max(v.abs())), MxScaleRule::Floor);
        for (x, theirs) in x.iter().zip(theirs) {
            let ours = e2m1::decode(original::encode_ties_away(x * e8m0::exp2(-k))) * e8m0::exp2(k);
            assert_eq!(ours, *theirs, "{x}");
        }
    }
    let tiles = fake_quant(&x, SIDE, SIDE, "mxfp4:half_away,2d".parse().unwrap());
    let differ = tiles.dequantized.iter().zip(&theirs).filter(|(a, b)| a != b).count();
    println!("{differ} of {} values differ from those of true tiles", theirs.len());
    assert!(differ > 0);
}

fn transposed<T: Copy>(x: &[T], rows: usize, cols: usize) -> Vec<T> {
    (0..cols).flat_map(|col| (0..rows).map(move |row| x[row * cols + col])).collect()
}

#[test]
fn a_matrix_and_its_transpose_quantize_alike() {
    let mut random = Random(31);
    for format in ["nvfp4:2d", "mxfp4:2d", "mxfp4:even,2d", "mxfp4:rceil,half_away,2d"] {
        let format: Format = format.parse().unwrap();
        for (rows, cols) in [(64, 64), (32, 80), (1, 1), (50, 33), (16, 7), (17, 100)] {
            let x: Vec<f32> = (0..rows * cols).map(|_| random.nasty()).collect();
            let Quantized { dequantized, codes, nonfinite_blocks, .. } = fake_quant(&x, rows, cols, format);
            let turned = fake_quant(&transposed(&x, rows, cols), cols, rows, format);
            let bits = |y: &[f32]| y.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&transposed(&dequantized, rows, cols)), bits(&turned.dequantized), "{format}");
            assert_eq!(transposed(&codes, rows, cols), turned.codes, "{format}");
            assert_eq!(nonfinite_blocks, turned.nonfinite_blocks);
        }
    }
}

/// Every tile is what its elements are as one block of a row; its scale stands in each of its rows.
#[test]
fn a_tile_is_one_block() {
    let mut random = Random(32);
    let (rows, cols) = (40, 72);
    for format in ["nvfp4:2d", "mxfp4:2d"] {
        let format: Format = format.parse().unwrap();
        let (side, blocks) = (format.block_rows(), format.blocks_per_row(cols));
        let x: Vec<f32> = (0..rows * cols).map(|_| random.normal()).collect();
        let q = fake_quant(&x, rows, cols, format);
        assert_eq!(q.block_scales.len(), rows * blocks);
        let amax = finite_amax(&x, cols, format);
        assert_eq!(amax, x.iter().fold(0f32, |a, v| a.max(v.abs())));
        for row in 0..rows {
            for block in 0..blocks {
                let first = row / side * side;
                assert_eq!(q.block_scales[row * blocks + block], q.block_scales[first * blocks + block]);
                let tile = (first..(first + side).min(rows))
                    .flat_map(|row| x[row * cols..][block * side..((block + 1) * side).min(cols)].iter());
                let b = tile.fold(0f32, |a, v| a.max(v.abs()));
                let (scale, _) = temper::numerics::block_scale::block_scales(format, b, tensor_scale(format, amax));
                assert_eq!(scale.byte, Some(q.block_scales[row * blocks + block]), "{format} row {row} block {block}");
            }
        }
    }
}
