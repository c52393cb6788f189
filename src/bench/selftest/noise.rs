//! noise.cu: the error of a matrix product, every law and pair of dtypes, with and without bias, stored and added; and AQN
//! on a batch of weights.

use tch::{Kind, Tensor};

use super::{Check, Compared, HUGE_ELEMENTS, Sizes, enter, inputs};
use crate::Result;
use crate::numerics::error_law::{ErrorLaw, NoiseSums};
use crate::ops::cuda::launch::Executor;
use crate::ops::cuda::noise::{Destination, Law, Noisy, add_noise, new_sums, read_sums};
use crate::ops::matmul_error::{ErrorDraw, RowKeys, SumsSink, accumulate_product, finish_product};
use crate::ops::perturb::{Perturbation, perturb};

const LAWS: [ErrorLaw; 3] = [ErrorLaw::RelativeGaussian, ErrorLaw::AbsoluteGaussian, ErrorLaw::SystematicBias];
const SEED: u64 = 0x1234_5678_9ABC_DEF0;
const STREAM: u32 = 0x1400_0007;
const SCALE: f32 = 0.05;

pub fn checks(executor: &dyn Executor, sizes: &Sizes, checks: &mut Vec<Check>) -> Result<()> {
    for &shape in sizes.small.iter().chain(sizes.large) {
        let case = Case::new(shape)?;
        if shape.0 * shape.1 >= HUGE_ELEMENTS {
            let (law, kind) = (ErrorLaw::RelativeGaussian, Kind::BFloat16);
            let run = |compared: &mut Compared| case.stored(executor, law, false, kind, compared);
            enter(checks, "noise", format!("{law:?}"), kind, shape, run)?;
            continue;
        }
        for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
            for law in LAWS {
                for bias in [false, true] {
                    let name = format!("{law:?}{}", if bias { ", bias" } else { "" });
                    let run = |compared: &mut Compared| case.stored(executor, law, bias, kind, compared);
                    enter(checks, "noise", name, kind, shape, run)?;
                }
            }
        }
        let run = |compared: &mut Compared| case.added(executor, compared);
        enter(checks, "noise", "RelativeGaussian, added".into(), Kind::Float, shape, run)?;
    }
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        let run = |compared: &mut Compared| aqn(executor, kind, compared);
        enter(checks, "aqn", "70 norms and a linear".into(), kind, (1, 1536), run)?;
    }
    Ok(())
}

struct Case {
    y: Tensor,    // f32 [rows, cols] on the CPU
    bias: Tensor, // f32 [cols]
    keys: RowKeys,
}

impl Case {
    fn new((rows, cols): (usize, usize)) -> Result<Case> {
        let keys = RowKeys::new((0..rows as u64).map(|row| row << 18 | 5).collect());
        let y = inputs((rows, cols), Kind::Float, false)?;
        Ok(Case { y, bias: inputs((1, cols), Kind::Float, false)?.f_view([cols as i64])?, keys })
    }

    fn draw(law: ErrorLaw) -> ErrorDraw {
        ErrorDraw { law, scale: SCALE, seed: SEED, stream: STREAM }
    }

    /// Keys of their own: the others' copy is kept on the device where it was made.
    fn keys(&self) -> RowKeys {
        RowKeys::new(self.keys.host().to_vec())
    }

    fn stored(
        &self,
        executor: &dyn Executor,
        law: ErrorLaw,
        bias: bool,
        kind: Kind,
        compared: &mut Compared,
    ) -> Result<()> {
        let device = executor.device();
        let (y, bias_there) = (self.y.f_to_device(device)?, self.bias.f_to_device(device)?);
        let out = Tensor::f_empty(y.size(), (kind, device))?;
        let sums = new_sums(1, device)?;
        let noisy = Noisy {
            y: &y,
            into: Destination::Store(&out),
            bias: bias.then_some(&bias_there),
            keys: &self.keys(),
            scale: SCALE,
            stream: STREAM,
        };
        add_noise(executor, &Law { law, seed: SEED, sums: Some(&sums) }, &[noisy])?;
        let (draw, sink) = (Case::draw(law), SumsSink::default());
        let bias = bias.then_some(&self.bias);
        let out_kind = if kind == Kind::Half { Kind::Float } else { kind };
        let expected = finish_product(self.y.copy(), bias, Some(&draw), &self.keys, Some(&sink), out_kind)?;
        // From f32, which holds the sum unrounded, one rounding as well.
        compared.tensors(&out, &expected.f_to_kind(kind)?)?;
        for ((_, mut expected), found) in SumsSink::take_all(&[sink])?.into_iter().zip(read_sums(&sums)?) {
            let found = NoiseSums::of_device(found);
            if kind == Kind::Half {
                // Of what is rounded, which f32 is not.
                expected.error_sq = found.error_sq;
            }
            compared.noise_sums(&found, &expected, 1e-6);
        }
        Ok(())
    }

    fn added(&self, executor: &dyn Executor, compared: &mut Compared) -> Result<()> {
        let mut expected = self.y.f_ones_like()?;
        let into = expected.copy().f_to_device(executor.device())?;
        let y = self.y.f_to_device(executor.device())?;
        let keys = self.keys();
        let noisy =
            Noisy { y: &y, into: Destination::Add(&into), bias: None, keys: &keys, scale: SCALE, stream: STREAM };
        add_noise(executor, &Law { law: ErrorLaw::RelativeGaussian, seed: SEED, sums: None }, &[noisy])?;
        let draw = Case::draw(ErrorLaw::RelativeGaussian);
        accumulate_product(self.y.shallow_clone(), &draw, &self.keys, None, &mut expected)?;
        compared.tensors(&into, &expected)
    }
}

/// More norms than a launch takes, and a linear among them.
fn aqn(executor: &dyn Executor, kind: Kind, compared: &mut Compared) -> Result<()> {
    let weight = |number: usize| inputs(if number == 40 { (96, 1536) } else { (1, 1536) }, kind, false);
    let weights = (0..71).map(weight).collect::<Result<Vec<Tensor>>>()?;
    let keys = |weight: &Tensor| RowKeys::consecutive(11 << 32, weight.size()[0] as usize);
    let perturbations = weights.iter().enumerate().map(|(number, weight)| Perturbation {
        weight: weight.shallow_clone(),
        scale: 0.01 / (1 + number) as f32,
        stream: number as u32,
        keys: keys(weight),
    });
    let perturbations: Vec<Perturbation> = perturbations.collect();
    let expected = perturb(&perturbations, SEED)?;
    let there = weights.iter().map(|w| Ok(w.f_to_device(executor.device())?)).collect::<Result<Vec<Tensor>>>()?;
    let out = there.iter().map(|w| Ok(w.f_empty_like()?)).collect::<Result<Vec<Tensor>>>()?;
    let sums = new_sums(weights.len() as i64, executor.device())?;
    let noisy = there.iter().zip(&out).zip(&perturbations).map(|((y, out), p)| {
        let into = Destination::Store(out);
        Noisy { y, into, bias: None, keys: &p.keys, scale: p.scale, stream: p.stream }
    });
    let noisy: Vec<Noisy> = noisy.collect();
    add_noise(executor, &Law { law: ErrorLaw::AbsoluteGaussian, seed: SEED, sums: Some(&sums) }, &noisy)?;
    for ((out, expected), sums) in out.iter().zip(&expected).zip(read_sums(&sums)?) {
        compared.tensors(out, &expected.weight)?;
        compared.near(sums[1], expected.sum_sq, 1e-6);
        compared.counts(sums[4] as u64, expected.elements);
    }
    Ok(())
}
