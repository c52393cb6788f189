//! Adaptive Quantization Noise on weights: w' = round(w + scale * z), the sum in f32 (numerics.md section 5).
//!
//! z is keyed by (seed, stream, row key, column). `w` itself is never changed.

use tch::{Kind, Tensor};

use super::cpu;
use super::cuda::noise::{self, Destination, Law, Noisy};
use super::cuda::place::Place;
use super::matmul_error::RowKeys;
use crate::numerics::error_law::ErrorLaw;
use crate::{Error, Result};

/// A weight that gets noise.
pub struct Perturbation {
    pub weight: Tensor, // [rows, cols] f32, bf16 or f16; a norm is one row
    pub scale: f32,
    pub stream: u32,
    pub keys: RowKeys, // [rows]
}

/// w' and what was added: over its elements d = w' - w.
pub struct Perturbed {
    pub weight: Tensor, // of the shape and dtype of w
    pub elements: u64,
    /// Sum of d.
    pub sum: f64,
    /// Sum of d^2.
    pub sum_sq: f64,
}

/// Every w', in a few launches on CUDA; what was added is read from the device once.
///
/// # Errors
/// `Runtime` where the number of row keys is not that of rows, or for another dtype.
pub fn perturb(weights: &[Perturbation], seed: u64) -> Result<Vec<Perturbed>> {
    match weights.first().and_then(|first| Place::of(&first.weight)) {
        Some(place) => {
            // A launch takes one dtype.
            let of_kind = |kind: Kind| weights.iter().enumerate().filter(move |(_, w)| w.weight.kind() == kind);
            let mut perturbed: Vec<Option<Perturbed>> = weights.iter().map(|_| None).collect();
            for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
                let (places, weights): (Vec<usize>, Vec<&Perturbation>) = of_kind(kind).unzip();
                for (place, made) in places.into_iter().zip(on_device(&place, &weights, seed)?) {
                    perturbed[place] = Some(made);
                }
            }
            let missing = || Error::Runtime("perturb: w: expected f32, bf16 or f16".into());
            perturbed.into_iter().map(|made| made.ok_or_else(missing)).collect()
        }
        None => weights.iter().map(|weight| on_cpu(weight, seed)).collect(),
    }
}

fn on_device(place: &Place, weights: &[&Perturbation], seed: u64) -> Result<Vec<Perturbed>> {
    let Some(first) = weights.first() else { return Ok(Vec::new()) };
    let sums = noise::new_sums(weights.len() as i64, first.weight.device())?;
    let out = weights.iter().map(|w| Ok(w.weight.f_empty_like()?)).collect::<Result<Vec<Tensor>>>()?;
    let matrix = |t: &Tensor, w: &Perturbation| -> Result<Tensor> { Ok(t.f_view([w.keys.len() as i64, -1])?) };
    let views = weights.iter().zip(&out).map(|(w, out)| Ok((matrix(&w.weight.f_contiguous()?, w)?, matrix(out, w)?)));
    let views = views.collect::<Result<Vec<(Tensor, Tensor)>>>()?;
    let noisy = views.iter().zip(weights).map(|((y, out), w)| {
        let into = Destination::Store(out);
        Noisy { y, into, bias: None, keys: &w.keys, scale: w.scale, stream: w.stream }
    });
    let matrices: Vec<Noisy> = noisy.collect();
    noise::add_noise(place, &Law { law: ErrorLaw::AbsoluteGaussian, seed, sums: Some(&sums) }, &matrices)?;
    let read = noise::read_sums(&sums)?;
    let perturbed = out.into_iter().zip(read).map(|(weight, [sum, sum_sq, _, _, elements])| Perturbed {
        weight,
        elements: elements as u64,
        sum,
        sum_sq,
    });
    Ok(perturbed.collect())
}

fn on_cpu(w: &Perturbation, seed: u64) -> Result<Perturbed> {
    let (rows, numel) = (w.keys.len(), w.weight.numel());
    if rows == 0 || !numel.is_multiple_of(rows) {
        return Err(Error::Runtime(format!("perturb: {rows} row keys for {numel} elements")));
    }
    let wide = w.weight.f_to_kind(Kind::Float)?.f_contiguous()?;
    let mut out = wide.f_empty_like()?;
    cpu::matmul_error::perturb_f32(
        cpu::tensor::f32_slice(&wide)?,
        rows,
        numel / rows,
        w.scale,
        seed,
        w.stream,
        w.keys.host(),
        cpu::tensor::f32_slice_mut(&mut out)?,
    );
    let weight = out.f_to_kind(w.weight.kind())?;
    // In the dtype that the product reads.
    let difference = weight.f_to_kind(Kind::Double)?.f_sub(&wide)?;
    let sum = f64::try_from(difference.f_sum(Kind::Double)?)?;
    let sum_sq = f64::try_from(difference.f_square()?.f_sum(Kind::Double)?)?;
    Ok(Perturbed { weight, elements: numel as u64, sum, sum_sq })
}
