//! Fake quantization x -> y of a row-major matrix, the definition: slow, plain, and what the fast versions are tested
//! against. x [rows, cols] f32; blocks are consecutive elements of one row; a ragged last block acts as if padded
//! with zeros. With b = the block's largest magnitude (numerics.md section 2, default rounding):
//!
//! mxfp4   b = m * 2^e:  k = e - 2 (+ 1 by rule), clamped to -127..127;  code = e2m1(x * 2^-k);  y = value(code) * 2^k
//! nvfp4   A = tensor amax:  G = 2688 / A;  S = e4m3(min(b * (G * (1/6)), 448));  D = 1 / G;
//!         E = min(1 / (S * D), f32 max);  code = e2m1(x * E);  y = value(code) * (S * D)
//!
//! All steps in f32 as written, in this order: TransformerEngine's exact path, bit for bit. -0 is kept. A block that
//! holds NaN or infinity becomes NaN, is left out of A and counted.

use super::format::{Format, MxScaleRule};
use super::{e2m1, e4m3, e8m0, original};

/// What nvfp4 takes its tensor amax A from. The other formats have no tensor scale and ignore it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TensorScale {
    /// One A over the whole matrix (weights).
    Tensor,
    /// An A for every row (activations: a token's codes do not depend on its neighbours).
    Row,
    /// A given A: shared by fused siblings, or calibrated.
    Amax(f32),
}

/// A quantized matrix [rows, cols].
#[derive(Clone, Debug)]
pub struct Quantized {
    /// y [rows, cols]; the caller rounds it to the input's dtype.
    pub dequantized: Vec<f32>,
    /// E2M1 codes [rows, cols], one a byte.
    pub codes: Vec<u8>,
    /// E8M0 (mxfp4) or E4M3 (nvfp4) bytes [rows, ceil(cols / block)].
    pub block_scales: Vec<u8>,
    /// G; 1 where the format has no tensor scale, and with `TensorScale::Row`.
    pub tensor_encode_scale: f32,
    /// G of every row with `TensorScale::Row` in nvfp4, else empty.
    pub row_encode_scales: Vec<f32>,
    /// Blocks that held NaN or infinity.
    pub nonfinite_blocks: usize,
    /// Elements whose scaled magnitude exceeded 6 before clamping.
    pub saturated: usize,
}

/// Quantizes x [rows, cols] with one tensor amax.
///
/// # Panics
/// Where `x.len() != rows * cols`.
pub fn fake_quant(x: &[f32], rows: usize, cols: usize, format: Format) -> Quantized {
    fake_quant_scaled(x, rows, cols, format, TensorScale::Tensor)
}

/// Quantizes x [rows, cols] with the given source of the tensor amax.
///
/// # Panics
/// Where `x.len() != rows * cols`.
pub fn fake_quant_scaled(x: &[f32], rows: usize, cols: usize, format: Format, scale: TensorScale) -> Quantized {
    assert_eq!(x.len(), rows * cols, "x holds [rows, cols]");
    let mut result = Quantized {
        dequantized: Vec::with_capacity(x.len()),
        codes: Vec::with_capacity(x.len()),
        block_scales: Vec::with_capacity(rows * format.blocks_per_row(cols)),
        tensor_encode_scale: 1.0,
        row_encode_scales: Vec::new(),
        nonfinite_blocks: 0,
        saturated: 0,
    };
    if format == Format::Nvfp4 {
        match scale {
            TensorScale::Tensor => result.tensor_encode_scale = tensor_encode_scale(finite_amax(x, cols, format)),
            TensorScale::Amax(amax) => result.tensor_encode_scale = tensor_encode_scale(amax),
            TensorScale::Row => {}
        }
    }
    for row in x.chunks(cols.max(1)) {
        let mut encode_scale = result.tensor_encode_scale;
        if format == Format::Nvfp4 && scale == TensorScale::Row {
            encode_scale = tensor_encode_scale(finite_amax(row, cols, format));
            result.row_encode_scales.push(encode_scale);
        }
        for block in row.chunks(format.block_size()) {
            quantize_block(block, format, encode_scale, &mut result);
        }
    }
    result
}

/// The largest magnitude of x [rows, cols] over blocks that hold neither NaN nor infinity; 0 if there is none.
pub fn finite_amax(x: &[f32], cols: usize, format: Format) -> f32 {
    let blocks = x.chunks(cols.max(1)).flat_map(|row| row.chunks(format.block_size()));
    blocks.filter(|block| block.iter().all(|v| v.is_finite())).map(amax).fold(0.0, f32::max)
}

/// G = 2688 / A, 2688 = 6 * 448: the multiplier that maps the tensor's amax to the largest block scale times the
/// largest code. Capped at the largest f32; 1 if A = 0.
pub fn tensor_encode_scale(amax: f32) -> f32 {
    if amax == 0.0 { 1.0 } else { (2688.0 / amax).min(f32::MAX) }
}

/// The E4M3 byte of an nvfp4 block's scale S, from its amax b and G.
pub fn nvfp4_block_scale(block_amax: f32, encode_scale: f32) -> u8 {
    e4m3::encode((block_amax * (encode_scale * (1.0 / 6.0))).min(e4m3::MAX))
}

/// The exponent k of an mxfp4 block's scale 2^k, from the bits of its amax. Zero and subnormal give -127.
pub fn mx_exponent(block_amax: f32, rule: MxScaleRule) -> i32 {
    let bits = block_amax.to_bits();
    let (biased, mantissa) = ((bits >> 23) as i32, bits & 0x7F_FFFF);
    if biased == 0 {
        return -127;
    }
    let up = match rule {
        MxScaleRule::Floor => false,
        MxScaleRule::Even => mantissa >= 0x60_0000, // m >= 1.75
        MxScaleRule::Rceil => mantissa > 0x40_0000, // m > 1.5
    };
    (biased - 127 - 2 + up as i32).clamp(-127, 127)
}

fn quantize_block(block: &[f32], format: Format, encode_scale: f32, result: &mut Quantized) {
    if !block.iter().all(|v| v.is_finite()) {
        result.nonfinite_blocks += 1;
        result.block_scales.push(if matches!(format, Format::Mxfp4 { .. }) { e8m0::NAN } else { e4m3::NAN });
        result.codes.extend(block.iter().map(|_| e2m1::encode(f32::NAN)));
        result.dequantized.extend(block.iter().map(|_| f32::NAN));
        return;
    }
    match format {
        Format::Mxfp4 { rule } => {
            let k = mx_exponent(amax(block), rule);
            result.block_scales.push(e8m0::encode(k));
            emit(block, |x| x * e8m0::exp2(-k), e2m1::encode, e8m0::exp2(k), result);
        }
        Format::Nvfp4 => {
            let byte = nvfp4_block_scale(amax(block), encode_scale);
            result.block_scales.push(byte);
            let decode = e4m3::decode(byte) * (1.0 / encode_scale);
            let encode = (1.0 / decode).min(f32::MAX);
            if e4m3::decode(byte) == 0.0 {
                // Code 0 for every element; the sign stays, so that -0 is kept.
                emit(block, |x| x * 0.0, e2m1::encode, decode, result);
            } else {
                emit(block, |x| x * encode, e2m1::encode, decode, result);
            }
        }
        Format::Nvfp4SingleLevel => {
            let (byte, scale) = original::single_level_scale(amax(block));
            result.block_scales.push(byte);
            emit(block, |x| x / scale, original::encode_ties_toward_zero, scale, result);
        }
    }
}

/// Codes and values of a finite block: code = round(scaled(x)), y = value(code) * decode.
fn emit(block: &[f32], scaled: impl Fn(f32) -> f32, round: fn(f32) -> u8, decode: f32, result: &mut Quantized) {
    for &x in block {
        let code = round(scaled(x));
        result.saturated += (scaled(x).abs() > e2m1::MAX) as usize;
        result.codes.push(code);
        result.dequantized.push(e2m1::decode(code) * decode);
    }
}

fn amax(block: &[f32]) -> f32 {
    block.iter().fold(0.0, |a, v| a.max(v.abs()))
}
