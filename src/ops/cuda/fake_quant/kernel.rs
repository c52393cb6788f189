//! The launches of kernels/fake_quant_*.cu and amax.cu: their argument structs, names and grids.

use std::ffi::c_void;

use tch::{Device, Kind, Tensor};

use crate::Result;
use crate::numerics::format::{Family, Format, MxScaleRule, Rounding};
use crate::numerics::tensor_error::TensorErrorSums;
use crate::ops::cuda::batch::Divider;
use crate::ops::cuda::launch::{BLOCK_THREADS, Launch};

/// `FakeQuantTensor` of kernels/include/octets.cuh.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct KernelTensor {
    pub x: *const c_void,
    pub y: *mut c_void,
    pub codes: *mut c_void,
    pub scales: *mut c_void,
    pub amax: *mut c_void,
    pub of_rows: *mut c_void,
    pub first_key: u64,
    pub rows: u32,
    pub cols: u32,
    pub first_tile: u32,
    pub stream: u32,
    pub octets_of_row: u32,
    pub flags: u32,
    pub by_row: Divider, // by octets_of_row
}

impl Default for KernelTensor {
    fn default() -> KernelTensor {
        let null = std::ptr::null_mut();
        KernelTensor {
            x: null,
            y: null,
            codes: null,
            scales: null,
            amax: null,
            of_rows: null,
            first_key: 0,
            rows: 0,
            cols: 0,
            first_tile: 0,
            stream: 0,
            octets_of_row: 0,
            flags: 0,
            by_row: Divider::default(),
        }
    }
}

/// `FakeQuantFlags`.
pub const WHOLE: u32 = 1;
pub const AMAX_PER_ROW: u32 = 2;

/// `FakeQuantBatch`.
#[repr(C)]
struct KernelBatch {
    count: u32,
    rule: u32,
    rounding: u32,
    octets_of_thread: u32,
    seed: u64,
    nonfinite_blocks: *mut c_void,
    sums: *mut c_void,
    tensors: [KernelTensor; BATCH],
}

/// Matrices of one launch.
const BATCH: usize = 46;
/// Octets of a tile where matrices are large: `kMostOctetsOfThread` a thread.
pub const TILE_OCTETS: u32 = MOST_OCTETS_OF_THREAD * BLOCK_THREADS;
const MOST_OCTETS_OF_THREAD: u32 = 4;
/// Blocks of a multiprocessor, over time, that a launch shall have before their threads take a second octet.
const BLOCKS_WANTED: u64 = 16;
/// `kErrorSums`.
pub const ERROR_SUMS: usize = 11;

/// From the order of the kernels' `ErrorSum`.
pub fn error_sums(sums: &[f64]) -> TensorErrorSums {
    TensorErrorSums {
        x_sq: sums[0],
        q_sq: sums[1],
        x_q: sums[2],
        error_sq: sums[3],
        relative: sums[4],
        elements: sums[5] as u64,
        nonzero: sums[6] as u64,
        deadzone: sums[7] as u64,
        saturated: sums[8] as u64,
        nonfinite: sums[9] as u64,
        max_abs_error: sums[10],
    }
}

/// Octets of a row of `cols`, filled up to whole blocks.
pub fn octets_of_row(format: Format, cols: usize) -> usize {
    let octets_of_block = if matches!(format.family, Family::Fp8 { .. }) { 1 } else { format.block_size(cols) / 8 };
    cols.div_ceil(8 * octets_of_block) * octets_of_block
}

/// What all launches of a call share.
pub struct Call {
    pub device: Device,
    pub multiprocessors: u32,
    pub format: Format,
    pub kind: Kind,
    pub seed: u64,
}

impl Call {
    pub fn empty(&self, shape: &[i64], kind: Kind) -> Result<Tensor> {
        Ok(Tensor::f_empty(shape, (kind, self.device))?)
    }

    /// f32 [1].
    pub fn filled(&self, value: f32) -> Result<Tensor> {
        Ok(Tensor::f_full([1], f64::from(value), (Kind::Float, self.device))?)
    }

    /// Finds the amaxes of tensors; with each, whether that of the tensor is wanted, or in fp8 those of its rows alone.
    pub fn find_amaxes(&self, tensors: &[(KernelTensor, bool)]) -> Vec<Launch> {
        let all: Vec<KernelTensor> = tensors.iter().map(|(tensor, _)| *tensor).collect();
        let dtype = self.dtype();
        if !matches!(self.format.family, Family::Fp8 { .. }) {
            let shape = if self.format.two_d { "tiles" } else { "blocks" };
            return self
                .launches("amax", &format!("amax_{shape}_{dtype}"), &all, |tensor, octets| self.tiles(tensor, octets));
        }
        let of_tensor: Vec<KernelTensor> = tensors.iter().filter(|(_, wanted)| *wanted).map(|(t, _)| *t).collect();
        let mut launches =
            self.launches("amax", &format!("amax_rows_{dtype}"), &all, |tensor, octets| self.tiles(tensor, octets));
        launches.extend(self.launches("amax", "amax_of_rows", &of_tensor, |_, _| 1));
        launches
    }

    /// nonfinite_blocks i64 [tensors]; sums f64 [tensors, ERROR_SUMS] or None. Both are added to.
    pub fn quantize(&self, tensors: &[KernelTensor], nonfinite_blocks: &Tensor, sums: Option<&Tensor>) -> Vec<Launch> {
        let (file, stem) = kernel_name(self.format);
        let kernel = format!("fake_quant_{stem}_{}{}", self.dtype(), if sums.is_some() { "_errors" } else { "" });
        // Both have 8 bytes an element; row `number` on.
        let from = |tensor: &Tensor, number: usize, cols: usize| tensor.data_ptr().wrapping_byte_add(8 * number * cols);
        let launches = tensors.chunks(BATCH).enumerate().filter_map(|(number, chunk)| {
            let (mut batch, blocks) = self.batch(chunk, |tensor, octets| self.tiles(tensor, octets));
            batch.nonfinite_blocks = from(nonfinite_blocks, number * BATCH, 1);
            batch.sums = sums.map_or(std::ptr::null_mut(), |sums| from(sums, number * BATCH, ERROR_SUMS));
            (blocks > 0).then(|| Launch::new(file, kernel.clone(), blocks, &*batch))
        });
        launches.collect()
    }

    fn launches(
        &self,
        file: &'static str,
        kernel: &str,
        tensors: &[KernelTensor],
        tiles: impl Fn(&KernelTensor, u32) -> u32,
    ) -> Vec<Launch> {
        let launches = tensors.chunks(BATCH).filter_map(|chunk| {
            let (batch, blocks) = self.batch(chunk, &tiles);
            (blocks > 0).then(|| Launch::new(file, kernel.to_string(), blocks, &*batch))
        });
        launches.collect()
    }

    /// The arguments of a launch, and its blocks.
    fn batch(&self, tensors: &[KernelTensor], tiles: impl Fn(&KernelTensor, u32) -> u32) -> (Box<KernelBatch>, u32) {
        let octets: u64 = tensors.iter().map(|t| u64::from(t.rows) * u64::from(t.octets_of_row)).sum();
        let wanted = octets / (u64::from(BLOCK_THREADS * self.multiprocessors) * BLOCKS_WANTED);
        let octets_of_thread = wanted.clamp(1, u64::from(MOST_OCTETS_OF_THREAD)) as u32;
        let mut batch = Box::new(KernelBatch {
            count: tensors.len() as u32,
            rule: rule_number(self.format),
            rounding: rounding_number(self.format),
            octets_of_thread,
            seed: self.seed,
            nonfinite_blocks: std::ptr::null_mut(),
            sums: std::ptr::null_mut(),
            tensors: [KernelTensor::default(); BATCH],
        });
        let mut blocks = 0;
        for (to, from) in batch.tensors.iter_mut().zip(tensors) {
            *to = KernelTensor { first_tile: blocks, ..*from };
            blocks += tiles(from, octets_of_thread);
        }
        (batch, blocks)
    }

    /// Blocks of threads that a tensor takes.
    fn tiles(&self, tensor: &KernelTensor, octets_of_thread: u32) -> u32 {
        if !self.format.two_d {
            // Below 2^31: `batch::tiles` has seen it.
            return (tensor.rows * tensor.octets_of_row).div_ceil(octets_of_thread * BLOCK_THREADS);
        }
        let size = self.format.block_rows() as u32;
        tensor.rows.div_ceil(size) * tensor.octets_of_row.div_ceil(BLOCK_THREADS / size)
    }

    fn dtype(&self) -> &'static str {
        match self.kind {
            Kind::BFloat16 => "bf16",
            Kind::Half => "f16",
            _ => "f32",
        }
    }
}

/// File and stem of the kernels of a format.
fn kernel_name(format: Format) -> (&'static str, &'static str) {
    match (format.family, format.two_d) {
        (Family::Mxfp4 { .. }, false) => ("fake_quant_mxfp4", "mxfp4"),
        (Family::Mxfp4 { .. }, true) => ("fake_quant_mxfp4", "mxfp4_2d"),
        (Family::Mxfp8 { .. }, _) => ("fake_quant_fp8", "mxfp8"),
        (Family::Fp8 { .. }, _) => ("fake_quant_fp8", "fp8"),
        (Family::Nvfp4 { four_over_six: true }, _) => ("fake_quant_variants", "nvfp4_4over6"),
        (Family::Nvfp4 { .. }, false) => ("fake_quant_nvfp4", "nvfp4"),
        (Family::Nvfp4 { .. }, true) => ("fake_quant_nvfp4", "nvfp4_2d"),
        (Family::Nvfp4SingleLevel, _) => ("fake_quant_variants", "nvfp4_single_level"),
    }
}

/// `MxScaleRule` of kernels/include/block_scale.cuh; 0 where there is none.
fn rule_number(format: Format) -> u32 {
    match format.family {
        Family::Mxfp4 { rule } | Family::Mxfp8 { rule } => match rule {
            MxScaleRule::Floor => 0,
            MxScaleRule::Even => 1,
            MxScaleRule::Rceil => 2,
        },
        _ => 0,
    }
}

/// `Rounding` of kernels/include/grid.cuh.
fn rounding_number(format: Format) -> u32 {
    match (format.family, format.rounding) {
        (Family::Nvfp4SingleLevel, _) => 4,
        (_, Rounding::NearestEven) => 0,
        (_, Rounding::HalfAway) => 1,
        (_, Rounding::Stochastic16) => 2,
        (_, Rounding::Stochastic8) => 3,
    }
}
