//! matmul_*.cu: every layout, dtype and tile, split and not: values within the bound of a sum of rounded terms, draws bit for
//! bit, what is measured of them; and the noisy linear layer, forward and backward, against the CPU.

use tch::{Device, Kind, Tensor};

use super::{Check, Compared, Sizes, dtype, enter, inputs};
use crate::numerics::block_format::TensorScale;
use crate::numerics::error_law::{ErrorLaw, NoiseSums};
use crate::ops::cuda::launch::Executor;
use crate::ops::cuda::matmul::{
    Choice, Layout, PACKED_K, PackedWeight, Product, choose_together, prepare_as, prepare_together,
};
use crate::ops::cuda::noise::{Destination, new_sums, read_sums};
use crate::ops::fake_quant::fake_quant;
use crate::ops::matmul_error::{ErrorDraw, RowKeys, SumsSink, finish_product};
use crate::ops::noisy_linear::{self, NoisyLinearCall, ProductError, WeightGradientError};
use crate::{Error, Result};

const LAYOUTS: [Layout; 3] = [Layout::Nt, Layout::Nn, Layout::Tn];
const KINDS: [Kind; 3] = [Kind::BFloat16, Kind::Half, Kind::Float];
const DRAW: ErrorDraw = ErrorDraw { law: ErrorLaw::AbsoluteGaussian, scale: 0.05, seed: 77, stream: 0x1400_0003 };
const RELATIVE: ErrorDraw = ErrorDraw { law: ErrorLaw::RelativeGaussian, ..DRAW };
/// Splits that are checked, of all that a product may have.
const SPLITS: [u32; 4] = [1, 2, 5, 16];

pub fn checks(executor: &dyn Executor, sizes: &Sizes, checks: &mut Vec<Check>) -> Result<()> {
    products(executor, sizes, checks, false)?;
    for layout in [Layout::Nt, Layout::NtMxfp4, Layout::NtNvfp4] {
        let run = |compared: &mut Compared| together(executor, layout, compared);
        enter(checks, "matmul", format!("{layout:?}, three in one launch"), Kind::BFloat16, (16, 512), run)?;
    }
    for kind in [Kind::BFloat16, Kind::Float] {
        let run = |compared: &mut Compared| linear(executor.device(), kind, (96, 200, 320), true, compared);
        enter(checks, "noisy_linear", "forward and backward".into(), kind, (96, 320), run)?;
    }
    // Enough tiles in all three for a Hopper's own kernel.
    let run = |compared: &mut Compared| linear(executor.device(), Kind::BFloat16, (512, 2304, 2304), false, compared);
    enter(checks, "noisy_linear", "forward and backward, clean".into(), Kind::BFloat16, (512, 2304), run)?;
    // Last: after a fault of these, whose waits are the hardware's, nothing else could run.
    if executor.properties()?.is_hopper { products(executor, sizes, checks, true) } else { Ok(()) }
}

/// Of sm_90a's kernels, or of all others.
fn products(executor: &dyn Executor, sizes: &Sizes, checks: &mut Vec<Check>, of_hopper: bool) -> Result<()> {
    for &(m, n, k) in sizes.products {
        let mut operands: Vec<_> = LAYOUTS.into_iter().flat_map(|layout| KINDS.map(|kind| (layout, kind))).collect();
        if k as i64 % PACKED_K == 0 {
            operands.extend([Layout::NtMxfp4, Layout::NtNvfp4].map(|layout| (layout, Kind::BFloat16)));
        }
        if of_hopper {
            operands.retain(|(layout, kind)| *kind == Kind::BFloat16 && layout.packed_format().is_none());
        }
        for (layout, kind) in operands {
            let case = Case::new(executor, layout, kind, (m, n, k))?;
            let choices = case.choices(executor)?.into_iter().filter(|c| c.tile.is_hopper == of_hopper);
            for choice in choices.filter(|c| SPLITS.contains(&c.splits)) {
                let Choice { tile, splits } = choice;
                let name = format!("{layout:?} {}x{} splits {splits}", tile.m, tile.n);
                let run = |compared: &mut Compared| case.check(executor, choice, compared);
                enter(checks, "matmul", format!("{name} k {k}"), kind, (m, n), run)?;
            }
        }
    }
    Ok(())
}

enum Operand {
    Dense(Tensor),        // on the CPU
    Packed(PackedWeight), // on the device
}

impl Operand {
    /// The matrix, or the codes.
    fn values(&self) -> &Tensor {
        match self {
            Operand::Dense(b) => b,
            Operand::Packed(packed) => &packed.codes,
        }
    }
}

struct Case {
    layout: Layout,
    a: Tensor, // on the CPU
    b: Operand,
    exact: Tensor,     // f64 [m, n]
    magnitude: Tensor, // f64 [m, n]: the sum of the terms' magnitudes
    k: usize,
}

impl Case {
    fn new(executor: &dyn Executor, layout: Layout, kind: Kind, (m, n, k): (usize, usize, usize)) -> Result<Case> {
        let normal = |shape: (usize, usize)| -> Result<Tensor> { inputs(shape, kind, false) };
        let (a, b) = match layout {
            Layout::Nt | Layout::NtMxfp4 | Layout::NtNvfp4 => (normal((m, k))?, normal((n, k))?),
            Layout::Nn => (normal((m, k))?, normal((k, n))?),
            Layout::Tn => (normal((k, m))?, normal((k, n))?),
        };
        let (operand, b) = match layout.packed_format() {
            None => (Operand::Dense(b.shallow_clone()), b),
            Some(format) => {
                let packed = PackedWeight::quantize(executor, &b.f_to_device(executor.device())?, format)?;
                // The product of what the CPU fake-quantizes.
                (Operand::Packed(packed), fake_quant(&b, format, TensorScale::Tensor, None)?)
            }
        };
        let wide = |t: &Tensor, transposed: bool| -> Result<Tensor> {
            let wide = t.f_to_kind(Kind::Double)?;
            Ok(if transposed { wide.f_transpose(0, 1)? } else { wide })
        };
        let (rows, columns) = (wide(&a, layout == Layout::Tn)?, wide(&b, !matches!(layout, Layout::Nn | Layout::Tn))?);
        let (exact, magnitude) = (rows.f_mm(&columns)?, rows.f_abs()?.f_mm(&columns.f_abs()?)?);
        Ok(Case { layout, a, b: operand, exact, magnitude, k })
    }

    fn choices(&self, executor: &dyn Executor) -> Result<Vec<Choice>> {
        let device = executor.device();
        // Alignment counts, and that is the same in all memory of torch's.
        let (a, b) = (self.a.f_to_device(device)?, self.b.values().f_to_device(device)?);
        let (out, keys) = (Tensor::f_zeros([1], (Kind::Float, device))?, RowKeys::consecutive(0, 0));
        self.product(&a, &b, &out, &keys).choices(&*executor.properties()?)
    }

    /// Clean.
    fn product<'a>(&'a self, a: &'a Tensor, b: &'a Tensor, out: &'a Tensor, keys: &'a RowKeys) -> Product<'a> {
        let scales = match &self.b {
            Operand::Dense(_) => None,
            Operand::Packed(packed) => Some(packed.scales()),
        };
        let into = Destination::Store(out);
        Product { layout: self.layout, a, b, scales, into, bias: None, error: None, keys, sums: None }
    }

    fn keys(&self) -> RowKeys {
        RowKeys::new((0..self.exact.size()[0] as u64).map(|row| row << 18 | 3).collect())
    }

    /// The product with this `a`, and what was measured of its error.
    fn run(
        &self,
        executor: &dyn Executor,
        a: &Tensor,
        error: Option<&ErrorDraw>,
        choice: Choice,
    ) -> Result<(Tensor, NoiseSums)> {
        let device = executor.device();
        let (a, b) = (a.f_to_device(device)?, self.b.values().f_to_device(device)?);
        let out = Tensor::f_full(self.exact.size(), f64::NAN, (Kind::Float, device))?;
        let (keys, sums) = (self.keys(), new_sums(1, device)?);
        let product = Product { error, sums: error.map(|_| &sums), ..self.product(&a, &b, &out, &keys) };
        prepare_as(executor, &product, choice)?.run(executor)?;
        Ok((out.f_to_device(Device::Cpu)?, NoiseSums::of_device(read_sums(&sums)?[0])))
    }

    fn check(&self, executor: &dyn Executor, choice: Choice, compared: &mut Compared) -> Result<()> {
        let (clean, _) = self.run(executor, &self.a, None, choice)?;
        // A tensor core adds sixteen terms at a time and cuts what it aligns: 2^-22 of the terms' magnitudes each time.
        let steps = (self.k as f64 / 16.0).ceil() + 4.0;
        let slack = self.magnitude.f_mul_scalar(steps / f64::from(1 << 22))?.f_add_scalar(1e-30)?;
        let far = clean.f_to_kind(Kind::Double)?.f_sub(&self.exact)?.f_abs()?.f_le_tensor(&slack)?.f_logical_not()?;
        compared.all += far.numel() as u64;
        compared.differing += i64::try_from(far.f_sum(Kind::Int64)?)? as u64;
        // On a product of zeros the error is s z itself; on the clean product, which comes out the same again, s |y| z.
        let zeros = self.a.f_zeros_like()?;
        let of_zeros = Tensor::f_zeros(self.exact.size(), (Kind::Float, Device::Cpu))?;
        for (a, y, draw) in [(&zeros, of_zeros, DRAW), (&self.a, clean, RELATIVE)] {
            let (found, measured) = self.run(executor, a, Some(&draw), choice)?;
            let sink = SumsSink::default();
            compared.tensors(&found, &finish_product(y, None, Some(&draw), &self.keys(), Some(&sink), Kind::Float)?)?;
            for (_, expected) in SumsSink::take_all(&[sink])? {
                compared.noise_sums(&measured, &expected, 1e-6);
            }
        }
        Ok(())
    }
}

/// Products in one launch, each as alone.
fn together(executor: &dyn Executor, layout: Layout, compared: &mut Compared) -> Result<()> {
    let device = executor.device();
    let case = |n| Case::new(executor, layout, Kind::BFloat16, (16, n, 512));
    let cases = [136, 70, 64].map(case).into_iter().collect::<Result<Vec<Case>>>()?;
    let there = |t: &Tensor| -> Result<Tensor> { Ok(t.f_to_device(device)?) };
    let a = cases.iter().map(|case| there(&case.a)).collect::<Result<Vec<Tensor>>>()?;
    let b = cases.iter().map(|case| there(case.b.values())).collect::<Result<Vec<Tensor>>>()?;
    let new = |case: &Case| Ok(Tensor::f_full(case.exact.size(), f64::NAN, (Kind::Float, device))?);
    let outs = || cases.iter().map(new).collect::<Result<Vec<Tensor>>>();
    let new_sums = || (0..cases.len()).map(|_| new_sums(1, device)).collect::<Result<Vec<Tensor>>>();
    let (alone, joined, of_alone, of_joined) = (outs()?, outs()?, new_sums()?, new_sums()?);
    let keys = cases[0].keys();
    let products = |outs, sums| -> Vec<Product> {
        let of = |((case, a), ((b, out), sums))| Product {
            error: Some(&RELATIVE),
            sums: Some(sums),
            ..Case::product(case, a, b, out, &keys)
        };
        cases.iter().zip(&a).zip(b.iter().zip(outs).zip(sums)).map(of).collect()
    };
    let together = products(&joined, &of_joined);
    let choice = choose_together(&together, &*executor.properties()?)?;
    let choice = choice.ok_or_else(|| Error::Runtime("matmul: three products have no launch".into()))?;
    prepare_together(executor, &together, choice)?.run(executor)?;
    for (number, product) in products(&alone, &of_alone).iter().enumerate() {
        prepare_as(executor, product, choice)?.run(executor)?;
        compared.tensors(&joined[number], &alone[number].f_to_device(Device::Cpu)?)?;
        let [found, expected] = [&of_joined[number], &of_alone[number]].map(read_sums);
        compared.noise_sums(&NoiseSums::of_device(found?[0]), &NoiseSums::of_device(expected?[0]), 1e-6);
    }
    Ok(())
}

/// How many, and what was measured of them.
type Calls = (u64, NoiseSums);

/// y, dX and dW of a layer [tokens, k] -> [tokens, n], here and on the CPU; `noisy`: with error in all three.
fn linear(
    device: Device,
    kind: Kind,
    (tokens, n, k): (usize, usize, usize),
    noisy: bool,
    compared: &mut Compared,
) -> Result<()> {
    let (x, w, dy) =
        (inputs((tokens, k), kind, false)?, inputs((n, k), kind, false)?, inputs((tokens, n), kind, false)?);
    let error = |stream: u32, sink: &SumsSink| ProductError {
        draw: noisy.then_some(ErrorDraw { law: ErrorLaw::RelativeGaussian, scale: 0.05, seed: 3, stream }),
        sink: noisy.then(|| sink.clone()),
    };
    let on = |device: Device| -> Result<([Tensor; 3], Vec<Calls>)> {
        let sinks: [SumsSink; 3] = Default::default();
        let dw = WeightGradientError { error: error(3, &sinks[2]), keys: RowKeys::consecutive(5 << 32, n) };
        let keys = RowKeys::new((0..tokens as u64).map(|row| row << 18).collect());
        let (forward, dx) = (error(1, &sinks[0]), error(2, &sinks[1]));
        let call = NoisyLinearCall { keys, differentiable: true, forward, dx, dw: Some(dw) };
        let there = |t: &Tensor| -> Result<Tensor> { Ok(t.f_to_device(device)?) };
        let (x, w, dy) = (there(&x)?, there(&w)?, there(&dy)?);
        let y = noisy_linear::forward(&x, &w, None, &call, true, kind)?;
        // As a step does after its rollout.
        sinks[0].settle();
        let dx = noisy_linear::backward_dx(&dy, &w, &call)?;
        let mut gradient = Tensor::f_zeros([n as i64, k as i64], (Kind::Float, device))?;
        noisy_linear::accumulate_dw(&dy, &x, &call, &mut gradient)?;
        Ok(([y, dx, gradient].map(|t| t.to_device(Device::Cpu)), SumsSink::take_all(&sinks)?))
    };
    let ((found, measured), (expected, of_expected)) = (on(device)?, on(Device::Cpu)?);
    for ((calls, found), (expected_calls, expected)) in measured.iter().zip(&of_expected) {
        compared.counts(*calls, *expected_calls);
        // Of results that are rounded to the dtype.
        compared.noise_sums(found, expected, if dtype(kind) == "bf16" { 2e-2 } else { 1e-4 });
    }
    for (found, expected) in found.iter().zip(&expected) {
        let (found, expected) = (found.f_to_kind(Kind::Double)?, expected.f_to_kind(Kind::Double)?);
        // Sums in another order, then one rounding to the dtype.
        let tolerance = if dtype(kind) == "bf16" { 1e-2 } else { 1e-5 };
        let scale = f64::try_from(expected.f_abs()?.f_max()?)?;
        let worst = f64::try_from(found.f_sub(&expected)?.f_abs()?.f_max()?)?;
        compared.all += expected.numel() as u64;
        if !worst.is_finite() || !scale.is_finite() {
            return Err(Error::Runtime("noisy_linear: a result is not finite".into()));
        }
        compared.differing += u64::from(worst > tolerance * scale);
    }
    Ok(())
}
