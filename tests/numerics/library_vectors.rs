//! Codes, scales and values of public libraries on fixed inputs (the README beside the vectors names the libraries).

use crate::support::{floats, shared};
use half::bf16;
use safetensors::{Dtype, SafeTensors};
use temper::numerics::block_format::{Quantized, fake_quant, fake_quant_scaled};
use temper::numerics::block_scale::tensor_scale;
use temper::numerics::format::{Family, Format};
use temper::numerics::{e2m1, e4m3};

const INPUTS: [&str; 4] = ["gauss_s0", "student3", "ties_mx", "zeros"];

/// Library results that follow a format's definition.
const APPLICABLE: [(&str, &str); 19] = [
    ("ao.mxfp4_floor", "mxfp4"),
    ("ao.mxfp4_even", "mxfp4:even"),
    ("ao.mxfp4_rceil", "mxfp4:rceil"),
    ("ct.mxfp4", "mxfp4:even"),
    ("mx.mxfp4_even_f32in", "mxfp4"),
    ("spec.mxfp4_floor", "mxfp4"),
    ("spec.mxfp4_even", "mxfp4:even"),
    ("spec.mxfp4_rceil", "mxfp4:rceil"),
    ("spec.nvfp4_te", "nvfp4"),
    ("te.nvfp4", "nvfp4"),
    ("fos.nvfp4_4over6_mse", "nvfp4:4over6"),
    ("ao.mxfp8_floor", "mxfp8"),
    ("ao.mxfp8_rceil", "mxfp8:rceil"),
    ("ct.mxfp8", "mxfp8:even"),
    ("spec.mxfp8_floor", "mxfp8"),
    ("spec.mxfp8_even", "mxfp8:even"),
    ("spec.mxfp8_rceil", "mxfp8:rceil"),
    ("original.mxfp4", "mxfp4:half_away"),
    ("original.nvfp4", "nvfp4_single_level"),
];

#[test]
fn results_equal_the_libraries() {
    let mut compared = 0;
    for input in INPUTS {
        for dtype in ["f32", "bf16"] {
            let Some(path) = shared(&format!("vectors/{input}.{dtype}.safetensors")) else {
                return;
            };
            let bytes = std::fs::read(path).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            for (library, format) in APPLICABLE {
                compare(&file, library, format.parse().unwrap(), &format!("{input}.{dtype} {library}"));
                compared += 1;
            }
        }
    }
    println!("{compared} library results compared");
}

fn compare(file: &SafeTensors, library: &str, format: Format, place: &str) {
    let x_tensor = file.tensor("x").unwrap();
    let (rows, cols) = (x_tensor.shape()[0], x_tensor.shape()[1]);
    let x = floats(file, "x");
    let ours = fake_quant(&x, rows, cols, format);
    let block = format.block_size(cols);
    let round = |v: f32| {
        if x_tensor.dtype() == Dtype::BF16 { bf16::from_f32(v).to_f32() } else { v }
    };
    let amax = x.iter().fold(0f32, |a, v| a.max(v.abs()));
    let theirs = floats(file, &format!("{library}.dq"));
    for (i, (value, theirs)) in ours.dequantized.iter().zip(&theirs).enumerate() {
        if excepted(library, &x, i) {
            continue;
        }
        // Two libraries multiply the factors of y in another order than numerics.md's value * (S * (1 / G)): our codes and
        // scales must give their f32 value exactly, and our own may differ in the last place.
        let (code, s) = (e2m1::decode(ours.codes[i]), e4m3::decode(*ours.block_scales.get(i / block).unwrap_or(&0)));
        let reordered = match library {
            "te.nvfp4" | "spec.nvfp4_te" => Some(code * ((s * amax) * (1.0 / 2688.0))),
            "fos.nvfp4_4over6_mse" => Some(code * ((s * amax) / 1536.0)),
            _ => None,
        };
        let (value, theirs) = match reordered {
            Some(reordered) => {
                assert!(reordered == *theirs, "{place}: element {i} x {} ours {reordered} theirs {theirs}", x[i]);
                assert!((value - theirs).abs() <= 3.6e-7 * theirs.abs(), "{place}: element {i}");
                (bf16::from_f32(*value).to_f32(), bf16::from_f32(*theirs).to_f32())
            }
            None => (round(*value), round(*theirs)),
        };
        // == : the sign of zero is not part of it.
        assert!(value == theirs, "{place}: element {i} x {} ours {value} theirs {theirs}", x[i]);
    }
    if let Ok(g) = file.tensor(&format!("{library}.g")) {
        let stored = f32::from_le_bytes(g.data().try_into().unwrap());
        // `te` and `fos` store the amax from which G follows.
        let of_amax = library.starts_with("te.") || library.starts_with("fos.");
        let g = if of_amax { tensor_scale(format, stored) } else { stored };
        assert_eq!(g, ours.tensor_encode_scale, "{place}: tensor encode scale");
    }
    if let Ok(scales) = file.tensor(&format!("{library}.scales")) {
        for (index, (theirs, ours)) in scales.data().iter().zip(&ours.block_scales).enumerate() {
            if !excepted(library, &x, index * block) {
                assert_eq!(theirs, ours, "{place}: scale of block {index}");
            }
        }
    }
    if let Ok(codes) = file.tensor(&format!("{library}.codes")) {
        compare_codes(&ours, codes.data(), format, place, |i| excepted(library, &x, i));
    }
}

/// Blocks in which a library departs from the rule it follows (numerics.md and `spec` do not). torchao's rceil takes
/// b / 6 (or b / 448) in f32 before it looks at the bits, so a b one place above 1.5 * 2^e (1.75 * 2^e) is no longer
/// above. microxcaling and the original take log2 in f32, which rounds up just below a power of two. `i`: any element
/// of the block.
fn excepted(library: &str, x: &[f32], i: usize) -> bool {
    let amax = x[i / 32 * 32..][..32].iter().fold(0f32, |a, v| a.max(v.abs()));
    match library {
        "ao.mxfp8_rceil" => amax.to_bits() & 0x7F_FFFF == 0x60_0001,
        "ao.mxfp4_rceil" => amax.to_bits() & 0x7F_FFFF == 0x40_0001,
        "mx.mxfp4_even_f32in" | "original.mxfp4" if amax > 0.0 => {
            let exponent = (amax.to_bits() >> 23) as f32 - 127.0;
            ((amax as f64).log2() as f32).floor() != exponent
        }
        _ => false,
    }
}

fn compare_codes(ours: &Quantized, stored: &[u8], format: Format, place: &str, excepted: impl Fn(usize) -> bool) {
    let e4m3 = format.has_e4m3_elements();
    for (i, &code) in ours.codes.iter().enumerate().filter(|(i, _)| !excepted(*i)) {
        let theirs = if e4m3 { stored[i] } else { stored[i / 2] >> (4 * (i % 2)) & 15 };
        let scale = ours.block_scales[i / format.block_size(0)];
        if matches!(format.family, Family::Nvfp4 { .. }) && e4m3::decode(scale) == 0.0 {
            // TransformerEngine's codes saturate under a zero scale (value 0 all the same); ours are 0.
            assert_eq!(code & 7, 0, "{place}: element {i}");
        } else {
            // The sign of zero is not part of it.
            let zero = if e4m3 { 0x80 } else { 8 };
            assert!(code == theirs || (code | theirs) == zero, "{place}: element {i} ours {code} theirs {theirs}");
        }
    }
}

/// Row scales are what the library gives for each row alone.
#[test]
fn row_scale_is_the_rows_own_tensor_scale() {
    use temper::numerics::block_format::TensorScale;
    let mut random = crate::support::Random(5);
    let x: Vec<f32> = (0..7 * 50).map(|_| random.normal()).collect();
    let all = fake_quant_scaled(&x, 7, 50, Format::NVFP4, TensorScale::Row);
    for (row, x) in x.chunks(50).enumerate() {
        let alone = fake_quant(x, 1, 50, Format::NVFP4);
        assert_eq!(all.dequantized[row * 50..][..50], alone.dequantized);
        assert_eq!(all.row_encode_scales[row], alone.tensor_encode_scale);
    }
}
