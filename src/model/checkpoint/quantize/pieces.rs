//! One stored tensor in pieces of whole rows of blocks: read from the map, quantized in parallel, written, let go.
//!
//! Pieces are cut by shape alone and their sums merge in order, so neither bytes nor metrics depend on the number of
//! threads. A piece of stored bytes becomes values of its dtype, y and the sums of y against x; nothing is kept.

use half::{bf16, f16};
use rayon::prelude::*;

use super::super::{Checkpoint, StoredDtype, TensorSink, TensorView};
use crate::numerics::block_format::{RoundingDraw, TensorScale};
use crate::numerics::format::Format;
use crate::numerics::noise_key::{Phase, Purpose, ROUNDED_WEIGHT, row_key, stream};
use crate::numerics::tensor_error::TensorErrorSums;
use crate::ops::cpu::fake_quant::{Storage, Task, tensor_amax};
use crate::{Result, bail_input};

/// Elements of a piece, which one thread works on (at least one row of blocks).
const PIECE_ELEMENTS: usize = 1 << 16;
/// Pieces in memory at a time.
pub(super) const BATCH_PIECES: usize = 128;
/// Bytes of a piece of a tensor that is only copied.
const COPY_BYTES: usize = 8 << 20;

pub(super) struct Pieces<'a> {
    pub checkpoint: &'a Checkpoint,
    pub tensor: TensorView<'a>,
    pub format: Format,
}

impl Pieces<'_> {
    /// Writes the tensor as it is.
    pub fn copy(&self, sink: &mut TensorSink, progress: &mut dyn FnMut(usize) -> Result<()>) -> Result<()> {
        for piece in self.tensor.data.chunks(COPY_BYTES) {
            sink.write(piece)?;
            self.checkpoint.release(piece);
            progress(piece.len())?;
        }
        Ok(())
    }

    /// The tensor amax A: over blocks without NaN or infinity.
    pub fn amax(&self) -> Result<f32> {
        let (cols, format) = (self.cols(), self.format);
        let of_piece = match self.tensor.dtype {
            StoredDtype::BF16 => |piece: &[u8], cols, format| tensor_amax(&bf16::read(piece), cols, format),
            StoredDtype::F16 => |piece: &[u8], cols, format| tensor_amax(&f16::read(piece), cols, format),
            StoredDtype::F32 => |piece: &[u8], cols, format| tensor_amax(&f32::read(piece), cols, format),
            other => bail_input!("found dtype {other}, expected F32, BF16 or F16"),
        };
        let mut largest = 0f32;
        for batch in self.tensor.data.chunks(BATCH_PIECES * self.piece_bytes()) {
            let pieces = batch.par_chunks(self.piece_bytes());
            largest = pieces.map(|piece| of_piece(piece, cols, format)).reduce(|| largest, f32::max);
            self.checkpoint.release(batch);
        }
        Ok(largest)
    }

    /// The draw of this tensor's stochastic rounding: seed 0 and update 0, so that the same file is quantized the same
    /// way whenever it is, each tensor its own way.
    pub fn stream(index: u32) -> Result<u32> {
        stream(Purpose::StochasticRounding, Phase::Shared, ROUNDED_WEIGHT, index)
    }

    /// Writes the quantized tensor; the sums of its error, and how many blocks held NaN or infinity.
    pub fn quantize(
        &self,
        index: u32,
        scale: TensorScale,
        sink: &mut TensorSink,
        progress: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<(TensorErrorSums, usize)> {
        let job =
            Job { cols: self.cols(), format: self.format, scale, stream: Pieces::stream(index)?, wants_bytes: true };
        let quantize = match self.tensor.dtype {
            StoredDtype::BF16 => Job::quantize_all::<bf16>,
            StoredDtype::F16 => Job::quantize_all::<f16>,
            StoredDtype::F32 => Job::quantize_all::<f32>,
            other => bail_input!("found dtype {other}, expected F32, BF16 or F16"),
        };
        let (mut sums, mut nonfinite_blocks, mut first_row) = (TensorErrorSums::default(), 0, 0);
        for batch in self.tensor.data.chunks(BATCH_PIECES * self.piece_bytes()) {
            let rows = self.piece_rows();
            let done = quantize(&job, batch, (first_row, rows));
            for piece in &done {
                sink.write(&piece.bytes)?;
                sums.merge(&piece.sums);
                nonfinite_blocks += piece.nonfinite_blocks;
            }
            first_row += BATCH_PIECES * rows;
            self.checkpoint.release(batch);
            progress(batch.len())?;
        }
        Ok((sums, nonfinite_blocks))
    }

    /// What each format, with its tensor scale, would do: the sums of its error, and how many blocks held NaN or infinity. Every
    /// piece is read once for all.
    pub fn measure(
        &self,
        index: u32,
        formats: &[(Format, TensorScale)],
        progress: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<(TensorErrorSums, usize)>> {
        let stream = Pieces::stream(index)?;
        let job = |&(format, scale): &(Format, TensorScale)| Job {
            cols: self.cols(),
            format,
            scale,
            stream,
            wants_bytes: false,
        };
        let jobs: Vec<Job> = formats.iter().map(job).collect();
        let measure = match self.tensor.dtype {
            StoredDtype::BF16 => Job::measure_all::<bf16>,
            StoredDtype::F16 => Job::measure_all::<f16>,
            StoredDtype::F32 => Job::measure_all::<f32>,
            other => bail_input!("found dtype {other}, expected F32, BF16 or F16"),
        };
        // A tile of any of them lies in one piece.
        let tile = formats.iter().map(|(format, _)| format.block_rows()).max().unwrap_or(1);
        let rows = (PIECE_ELEMENTS / self.cols()).max(1).next_multiple_of(tile);
        let bytes = rows * self.cols() * self.tensor.dtype.bitsize() / 8;
        let (mut sums, mut first_row) = (vec![(TensorErrorSums::default(), 0); jobs.len()], 0);
        for batch in self.tensor.data.chunks(BATCH_PIECES * bytes) {
            for piece in measure(&jobs, batch, (first_row, rows)) {
                for ((sums, nonfinite_blocks), done) in sums.iter_mut().zip(&piece) {
                    sums.merge(&done.sums);
                    *nonfinite_blocks += done.nonfinite_blocks;
                }
            }
            first_row += BATCH_PIECES * rows;
            self.checkpoint.release(batch);
            progress(batch.len())?;
        }
        Ok(sums)
    }

    pub fn cols(&self) -> usize {
        self.tensor.shape.last().copied().unwrap_or(1)
    }

    pub fn piece_rows(&self) -> usize {
        let rows = (PIECE_ELEMENTS / self.cols()).max(1);
        rows.next_multiple_of(self.format.block_rows())
    }

    pub fn piece_bytes(&self) -> usize {
        self.piece_rows() * self.cols() * self.tensor.dtype.bitsize() / 8
    }
}

/// What all pieces of a tensor share.
struct Job {
    cols: usize,
    format: Format,
    scale: TensorScale,
    stream: u32,
    wants_bytes: bool,
}

struct Done {
    bytes: Vec<u8>,
    sums: TensorErrorSums,
    nonfinite_blocks: usize,
}

impl Job {
    /// The pieces of a batch, which have `rows` rows each, but for the last.
    fn quantize_all<T: Stored>(&self, batch: &[u8], rows: (usize, usize)) -> Vec<Done> {
        Job::measure_all::<T>(std::slice::from_ref(self), batch, rows).into_iter().flatten().collect()
    }

    /// Of each piece, what each job makes of it; all jobs have the same columns.
    fn measure_all<T: Stored>(jobs: &[Job], batch: &[u8], (first_row, rows): (usize, usize)) -> Vec<Vec<Done>> {
        let cols = jobs.first().map_or(1, |job| job.cols);
        let pieces = batch.par_chunks(rows * cols * size_of::<T>()).enumerate();
        // A thread keeps its memory from piece to piece: new pages cost as much as the work.
        let done = pieces.map_init(<(Vec<T>, Vec<T>)>::default, |(x, y), (number, piece)| {
            T::read_into(piece, x);
            // Every value is written.
            y.resize(x.len(), T::default());
            jobs.iter().map(|job| job.quantize(x, first_row + number * rows, y)).collect()
        });
        done.collect()
    }

    fn quantize<T: Stored>(&self, x: &[T], first_row: usize, y: &mut [T]) -> Done {
        let rows = x.len() / self.cols;
        let keys = draw_keys(self.format, first_row, rows);
        let draw = RoundingDraw { seed: 0, stream: self.stream, row_keys: &keys };
        let task = Task { with_errors: true, ..Task::new(self.format, self.scale, Some(&draw)) };
        let (stats, sums) = task.run(x, rows, self.cols, y);
        let bytes = if self.wants_bytes { T::bytes(y) } else { Vec::new() };
        Done { bytes, sums, nonfinite_blocks: stats.nonfinite_blocks }
    }
}

/// The keys of the rows' draws; none where the format draws nothing.
pub(super) fn draw_keys(format: Format, first_row: usize, rows: usize) -> Vec<u64> {
    match format.rounding.is_stochastic() {
        true => (first_row..first_row + rows).map(|row| row_key(0, row as u32)).collect(),
        false => Vec::new(),
    }
}

/// A dtype as it lies in a file: little-endian, at any address.
trait Stored: Storage + Default {
    fn read(bytes: &[u8]) -> Vec<Self> {
        let mut values = Vec::new();
        Self::read_into(bytes, &mut values);
        values
    }
    fn read_into(bytes: &[u8], values: &mut Vec<Self>);
    fn bytes(values: &[Self]) -> Vec<u8>;
}

macro_rules! stored {
    ($dtype:ty, $size:literal) => {
        impl Stored for $dtype {
            fn read_into(bytes: &[u8], values: &mut Vec<$dtype>) {
                values.clear();
                values.extend(bytes.as_chunks::<$size>().0.iter().map(|b| <$dtype>::from_le_bytes(*b)));
            }
            fn bytes(values: &[$dtype]) -> Vec<u8> {
                values.iter().flat_map(|v| v.to_le_bytes()).collect()
            }
        }
    };
}

stored!(f32, 4);
stored!(bf16, 2);
stored!(f16, 2);
