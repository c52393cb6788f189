//! Fake quantization x -> y of a row-major matrix, the definition: slow, plain, and what the fast versions are tested
//! against. x [rows, cols] f32; a block is consecutive elements of one row (or a square tile, option `2d`); a ragged
//! last block acts as if padded with zeros. Scales: block_scale.rs; elements: element.rs; random bits:
//! stochastic_rounding.rs. For every block of amax b (numerics.md section 2):
//!
//! scaled = x * E (or x / s);  code = round(scaled), saturating;  y = value(code) * decode
//!
//! All steps in f32 as written. -0 is kept. A block that holds NaN or infinity becomes NaN, is left out of A and
//! counted; in fp8, which has no smaller block, that is the row.

use super::block_scale::{BlockScale, block_scales, nonfinite_byte, tensor_scale};
pub use super::block_scale::{mx_exponent, nvfp4_block_scale, tensor_encode_scale};
use super::format::{Family, Format};
pub use super::stochastic_rounding::RoundingDraw;
use super::{e2m1, e4m3};

/// What the tensor amax A of nvfp4 and fp8:tensor is taken from. The other formats have no tensor scale and ignore it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TensorScale {
    /// One A over the whole matrix (weights).
    Tensor,
    /// An A for every row (activations: a token's codes do not depend on its neighbours). Not with 2-D tiles.
    Row,
    /// A given A: shared by fused siblings, or calibrated.
    Amax(f32),
}

/// A quantized matrix [rows, cols].
#[derive(Clone, Debug)]
pub struct Quantized {
    /// y [rows, cols]; the caller rounds it to the input's dtype.
    pub dequantized: Vec<f32>,
    /// E2M1 codes or E4M3 bytes [rows, cols], one a byte.
    pub codes: Vec<u8>,
    /// E8M0 (mx) or E4M3 (nvfp4) bytes [rows, blocks of a row], a tile's in each of its rows; empty in fp8.
    pub block_scales: Vec<u8>,
    /// G; 1 where the format has none, and with `TensorScale::Row`.
    pub tensor_encode_scale: f32,
    /// G of every row with `TensorScale::Row` in nvfp4, else empty.
    pub row_encode_scales: Vec<f32>,
    /// s of every row in fp8 (all the same in fp8:tensor with one A), else empty. NaN for a row that became NaN.
    pub fp8_scales: Vec<f32>,
    /// Blocks that held NaN or infinity.
    pub nonfinite_blocks: usize,
    /// Elements whose scaled magnitude exceeded the element's maximum before clamping.
    pub saturated: usize,
}

/// Quantizes x [rows, cols] with one tensor amax, for formats that draw nothing.
///
/// # Panics
/// Where `x.len() != rows * cols`, and where the format rounds stochastically.
pub fn fake_quant(x: &[f32], rows: usize, cols: usize, format: Format) -> Quantized {
    fake_quant_scaled(x, rows, cols, format, TensorScale::Tensor)
}

/// Quantizes x [rows, cols] with the given source of the tensor amax, for formats that draw nothing.
///
/// # Panics
/// Where `x.len() != rows * cols`, where the format rounds stochastically, and for row scales of 2-D tiles.
pub fn fake_quant_scaled(x: &[f32], rows: usize, cols: usize, format: Format, scale: TensorScale) -> Quantized {
    quantize(x, rows, cols, format, scale, None)
}

/// Quantizes x [rows, cols]; `draw` is what a stochastic rounding draws from, ignored by the others.
///
/// # Panics
/// Where `x.len() != rows * cols`, where a stochastic rounding has no draw or a key for every row, and for row scales of
/// 2-D tiles.
pub fn quantize(
    x: &[f32],
    rows: usize,
    cols: usize,
    format: Format,
    scale: TensorScale,
    draw: Option<&RoundingDraw>,
) -> Quantized {
    assert_eq!(x.len(), rows * cols, "x holds [rows, cols]");
    let row_scales = format.has_tensor_scale() && scale == TensorScale::Row;
    assert!(!(row_scales && format.two_d), "a tile has one tensor scale");
    let draw = draw.filter(|_| format.rounding.is_stochastic());
    assert!(draw.is_some() || !format.rounding.is_stochastic(), "{format} needs a draw");
    let nvfp4 = matches!(format.family, Family::Nvfp4 { .. });
    let mut tensor = match scale {
        TensorScale::Tensor => tensor_scale(format, finite_amax(x, cols, format)),
        TensorScale::Amax(amax) => tensor_scale(format, amax),
        TensorScale::Row => 1.0,
    };
    let mut result = Quantized {
        dequantized: vec![0.0; x.len()],
        codes: vec![0; x.len()],
        block_scales: vec![0; if nonfinite_byte(format).is_some() { rows * format.blocks_per_row(cols) } else { 0 }],
        tensor_encode_scale: if nvfp4 { tensor } else { 1.0 },
        row_encode_scales: Vec::new(),
        fp8_scales: Vec::new(),
        nonfinite_blocks: 0,
        saturated: 0,
    };
    for first_row in (0..rows).step_by(format.block_rows()) {
        if row_scales {
            tensor = tensor_scale(format, finite_amax(&x[first_row * cols..][..cols], cols, format));
            if nvfp4 {
                result.row_encode_scales.push(tensor);
            }
        }
        for block in blocks(first_row, rows, cols, format) {
            quantize_block(x, cols, &block, format, tensor, draw, &mut result);
        }
    }
    result
}

/// The largest magnitude of x [rows, cols] over blocks that hold neither NaN nor infinity; 0 if there is none.
pub fn finite_amax(x: &[f32], cols: usize, format: Format) -> f32 {
    let rows = x.len() / cols.max(1);
    let blocks = (0..rows).step_by(format.block_rows()).flat_map(|row| blocks(row, rows, cols, format));
    blocks.filter_map(|block| amax(block.indices(cols).map(|i| x[i]))).fold(0.0, f32::max)
}

/// Rows and columns that share a block scale.
struct Block {
    rows: std::ops::Range<usize>,
    cols: std::ops::Range<usize>,
    /// Position among the blocks of a row.
    index: usize,
}

impl Block {
    /// Positions of its elements in the matrix, row by row.
    fn indices(&self, cols: usize) -> impl Iterator<Item = usize> {
        let columns = self.cols.clone();
        self.rows.clone().flat_map(move |row| columns.clone().map(move |col| row * cols + col))
    }
}

/// The blocks that begin in `first_row`, left to right.
fn blocks(first_row: usize, rows: usize, cols: usize, format: Format) -> impl Iterator<Item = Block> {
    let size = format.block_size(cols);
    let last_row = (first_row + format.block_rows()).min(rows);
    (0..format.blocks_per_row(cols)).map(move |index| Block {
        rows: first_row..last_row,
        cols: index * size..((index + 1) * size).min(cols),
        index,
    })
}

fn quantize_block(
    x: &[f32],
    cols: usize,
    block: &Block,
    format: Format,
    tensor: f32,
    draw: Option<&RoundingDraw>,
    result: &mut Quantized,
) {
    let values: Vec<f32> = block.indices(cols).map(|i| x[i]).collect();
    let scale = if let Some(b) = amax(values.iter().copied()) {
        let uniforms: Vec<f32> = match draw {
            Some(draw) => block.indices(cols).map(|i| draw.uniform(format.rounding, i / cols, i % cols)).collect(),
            None => vec![0.0; values.len()],
        };
        let scale = chosen_scale(&values, b, format, tensor);
        for ((i, &x), &u) in block.indices(cols).zip(&values).zip(&uniforms) {
            let scaled = scale.encode.apply(x);
            result.saturated += (scaled.abs() > format.element_max()) as usize;
            result.codes[i] = format.encode_element(scaled, u);
            result.dequantized[i] = format.decode_element(result.codes[i]) * scale.decode;
        }
        scale
    } else {
        result.nonfinite_blocks += 1;
        let code = if format.has_e4m3_elements() { e4m3::NAN } else { e2m1::encode(f32::NAN) };
        for i in block.indices(cols) {
            result.codes[i] = code;
            result.dequantized[i] = f32::NAN;
        }
        BlockScale { byte: nonfinite_byte(format), decode: f32::NAN, ..block_scales(format, 0.0, tensor).0 }
    };
    for row in block.rows.clone() {
        match scale.byte {
            Some(byte) => result.block_scales[row * format.blocks_per_row(cols) + block.index] = byte,
            None => result.fp8_scales.push(scale.decode),
        }
    }
}

/// The block's scale; in 4over6 the one of smaller squared error, on a tie the one that maps b to 6.
fn chosen_scale(values: &[f32], b: f32, format: Format, tensor: f32) -> BlockScale {
    match block_scales(format, b, tensor) {
        (scale, None) => scale,
        (six, Some(four)) => {
            if squared_error(values, format, &four) < squared_error(values, format, &six) {
                four
            } else {
                six
            }
        }
    }
}

/// Sum of (y - x)^2 over a block of at most 16, the difference in f32, the rest in f64 (so that no scale of the data
/// overflows or vanishes). Summed in halves, i with i + 8, then with i + 4, 2, 1, as vectors and warps do.
fn squared_error(values: &[f32], format: Format, scale: &BlockScale) -> f64 {
    let mut squares = [0.0; 16];
    for (square, &x) in squares.iter_mut().zip(values) {
        let code = format.encode_element(scale.encode.apply(x), 0.0);
        let error = (format.decode_element(code) * scale.decode - x) as f64;
        *square = error * error;
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            squares[i] += squares[i + half];
        }
    }
    squares[0]
}

/// The largest magnitude; None where NaN or infinity is among the values.
fn amax(mut values: impl Iterator<Item = f32>) -> Option<f32> {
    values.try_fold(0.0, |a: f32, v| v.is_finite().then(|| a.max(v.abs())))
}
