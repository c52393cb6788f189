//! Every kernel on this machine's GPU against the CPU operation, which the tests hold against the definition: bit for bit
//! where numerics.md says so. Without a GPU the tests run the same checks on the host's build of the kernels.

mod decoding;
mod fake_quant;
mod matmul;
mod model;
mod noise;
mod small_ops;
mod torch;

use serde::Serialize;
use tch::{Device, Kind, Tensor};

pub(super) use small_ops::backward_chain as norm_backward_chain;

use crate::numerics::error_law::NoiseSums;
use crate::ops::cuda::launch::Executor;
use crate::ops::cuda::memory::FilledMemory;
use crate::{Error, Result};

/// How large the checked matrices are.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// [rows, cols]: one element, ragged, aligned.
    pub small: &'static [(usize, usize)],
    /// Checked by values alone.
    pub large: &'static [(usize, usize)],
    /// (m, n, k) of products.
    pub products: &'static [(usize, usize, usize)],
}

/// Of a GPU: with weights of Qwen2.5-1.5B, and with a matrix of over 2^31 bytes.
pub const GPU: Sizes = Sizes {
    small: &[(1, 1), (3, 15), (7, 250), (33, 96), (64, 1536)],
    large: &[(256, 1536), (1536, 8960), (131_101, 8320)],
    products: &[(1, 1, 1), (5, 9, 33), (130, 136, 72), (70, 264, 1000), (17, 1536, 2048), (300, 520, 1536)],
};

/// From this size on only what training does most is checked, in bf16: the rest would take minutes.
const HUGE_ELEMENTS: usize = 1 << 28;

/// One kernel, format or law, dtype and shape.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    pub kernel: &'static str,
    /// Format, law, or what else distinguishes the call.
    pub case: String,
    pub dtype: &'static str,
    pub shape: [usize; 2],
    /// Values, codes, scales and sums compared.
    pub compared: u64,
    pub differing: u64,
    /// Why it could not be run.
    pub not_run: Option<String>,
}

impl Check {
    pub fn passed(&self) -> bool {
        self.not_run.is_none() && self.differing == 0
    }
}

/// Runs every check; `progress` is told each kernel's name before it begins.
///
/// # Errors
/// None for a difference or a check that could not run: `Check` says so. `Unavailable` without kernels or driver.
pub fn run(executor: &dyn Executor, sizes: &Sizes, progress: &dyn Fn(&str)) -> Result<Vec<Check>> {
    let _no_grad = tch::no_grad_guard();
    let _filled = FilledMemory::new();
    let mut checks = Vec::new();
    progress("fake_quant, amax");
    fake_quant::checks(executor, sizes, &mut checks)?;
    progress("noise");
    noise::checks(executor, sizes, &mut checks)?;
    progress("matmul, noisy_linear");
    matmul::checks(executor, sizes, &mut checks)?;
    progress("rms_norm, swiglu, rotary");
    small_ops::checks(executor, sizes, &mut checks)?;
    progress("sample, decode_attention");
    decoding::checks(executor, &mut checks)?;
    progress("packed_attention, cuda_graph");
    torch::checks(executor, &mut checks)?;
    progress("model");
    model::checks(executor, &mut checks)?;
    Ok(checks)
}

/// Values compared and found differing.
#[derive(Clone, Copy, Default)]
struct Compared {
    all: u64,
    differing: u64,
}

impl Compared {
    /// Bit for bit, but any NaN equals any NaN. `found` may lie on the device.
    fn tensors(&mut self, found: &Tensor, expected: &Tensor) -> Result<()> {
        let found = found.f_to_device(Device::Cpu)?.f_contiguous()?;
        self.all += expected.numel() as u64;
        if found.size() != expected.size() || found.kind() != expected.kind() {
            self.differing += expected.numel().max(1) as u64;
            return Ok(());
        }
        let integers = match found.kind() {
            Kind::Float => Kind::Int,
            Kind::BFloat16 | Kind::Half => Kind::Int16,
            other => other,
        };
        let bits = |t: &Tensor| -> Result<Tensor> { Ok(t.f_view_dtype(integers)?) };
        let mut differs = bits(&found)?.f_ne_tensor(&bits(expected)?)?;
        if found.kind() != integers {
            let both_nan = found.f_isnan()?.f_logical_and(&expected.f_isnan()?)?;
            differs = differs.f_logical_and(&both_nan.f_logical_not()?)?;
        }
        self.differing += i64::try_from(differs.f_sum(Kind::Int64)?)? as u64;
        Ok(())
    }

    /// Every element to a relative and an absolute tolerance; any NaN is near any NaN. `found` may lie on the device.
    fn tensors_near(&mut self, found: &Tensor, expected: &Tensor, relative: f64, absolute: f64) -> Result<()> {
        let found = found.f_to_device(Device::Cpu)?;
        self.all += expected.numel() as u64;
        if found.size() != expected.size() || found.kind() != expected.kind() {
            self.differing += expected.numel().max(1) as u64;
            return Ok(());
        }
        let (found, expected) = (found.f_to_kind(Kind::Double)?, expected.f_to_kind(Kind::Double)?);
        let slack = expected.f_abs()?.f_mul_scalar(relative)?.f_add_scalar(absolute)?;
        let near =
            found.f_sub(&expected)?.f_abs()?.f_le_tensor(&slack)?.f_logical_or(&found.f_eq_tensor(&expected)?)?;
        let near = near.f_logical_or(&found.f_isnan()?.f_logical_and(&expected.f_isnan()?)?)?;
        self.differing += i64::try_from(near.f_logical_not()?.f_sum(Kind::Int64)?)? as u64;
        Ok(())
    }

    /// Sums in another order, and in f32 over a few columns.
    fn noise_sums(&mut self, found: &NoiseSums, expected: &NoiseSums, tolerance: f64) {
        self.counts(found.elements, expected.elements);
        self.near(found.error_sq, expected.error_sq, tolerance);
        self.near(found.clean_sq, expected.clean_sq, tolerance);
        self.near(found.clean_fourth, expected.clean_fourth, tolerance);
    }

    fn counts(&mut self, found: u64, expected: u64) {
        self.all += 1;
        self.differing += u64::from(found != expected);
    }

    /// To a relative tolerance; equal where neither is finite.
    fn near(&mut self, found: f64, expected: f64, tolerance: f64) {
        let neither_finite = !found.is_finite() && !expected.is_finite();
        let near = found == expected || neither_finite || (found - expected).abs() <= tolerance * expected.abs();
        self.all += 1;
        self.differing += u64::from(!near);
    }
}

/// Runs one check and enters it. What stops every check is an error; out of memory or a refused launch is an entry.
fn enter(
    checks: &mut Vec<Check>,
    kernel: &'static str,
    case: String,
    kind: Kind,
    shape: (usize, usize),
    run: impl FnOnce(&mut Compared) -> Result<()>,
) -> Result<()> {
    let mut compared = Compared::default();
    let not_run = match run(&mut compared) {
        Err(error @ Error::Unavailable(_)) => return Err(error),
        outcome => outcome.err().map(|error| error.to_string()),
    };
    let Compared { all, differing } = compared;
    let shape = [shape.0, shape.1];
    checks.push(Check { kernel, case, dtype: dtype(kind), shape, compared: all, differing, not_run });
    Ok(())
}

fn dtype(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bf16",
        Kind::Half => "f16",
        _ => "f32",
    }
}

/// x [rows, cols] on the CPU that can make a kernel fail: normal values of a weight's size, and among them outliers, ties of
/// E2M1, zeros of both signs, tiny magnitudes; where asked, NaN and infinities in a few blocks.
fn inputs((rows, cols): (usize, usize), kind: Kind, nonfinite: bool) -> Result<Tensor> {
    use crate::ops::cpu::normals::normals_into;
    use crate::ops::cpu::tensor::f32_slice_mut;
    use rayon::prelude::*;

    let mut x = Tensor::f_empty([rows as i64, cols as i64], (Kind::Float, Device::Cpu))?;
    const TIES: [f32; 10] = [0.25, 0.75, -1.25, 1.75, 2.5, -3.5, 5.0, 6.0, 7.0, 0.5];
    f32_slice_mut(&mut x)?.par_chunks_mut(cols.max(1)).enumerate().for_each(|(row, out)| {
        normals_into(9, 9, row as u64, out);
        for (column, value) in out.iter_mut().enumerate() {
            let at = row * 31 + column;
            *value *= match (column / 16 + row) % 7 {
                0 => 20.0,
                1 => 1e-6,
                2 => 1.0,
                _ => 0.02,
            };
            match at % 97 {
                0 => *value = TIES[at / 97 % TIES.len()],
                1 => *value = if at % 2 == 0 { 0.0 } else { -0.0 },
                2 if nonfinite && at % 1013 == 2 => *value = f32::NAN,
                3 if nonfinite && at % 2003 == 3 => *value = f32::INFINITY,
                _ => {}
            }
        }
    });
    Ok(x.f_to_kind(kind)?)
}
