//! Noise on a GPU: the error of a finished product, with and without what is measured of it, and AQN on all norms of a model.

use tch::{Kind, Tensor};

use super::{Copy, OnDevice, moving};
use crate::Result;
use crate::bench::timing::{Runner, in_turns};
use crate::bench::{Options, Row};
use crate::numerics::error_law::ErrorLaw;
use crate::ops::cuda::launch::Prepared;
use crate::ops::cuda::noise::{Destination, Law, Noisy, new_sums, prepare};
use crate::ops::matmul_error::RowKeys;

const SCALE: f32 = 0.05;

pub fn rows(device: &OnDevice, options: &Options) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for &shape in device.shapes.products {
        if options.begins(&format!("noise f32 to bf16 [{}, {}]", shape.0, shape.1)) {
            rows.extend(product(device, shape)?);
        }
    }
    if options.begins("aqn") {
        rows.extend(aqn(device)?);
    }
    Ok(rows)
}

/// y f32 [tokens, out] -> y' bf16.
fn product(device: &OnDevice, shape: (usize, usize)) -> Result<Vec<Row>> {
    let y = device.matrices(shape, Kind::Float)?;
    let out = y.iter().map(|y| Ok(y.f_empty_like()?.f_to_kind(Kind::BFloat16)?)).collect::<Result<Vec<Tensor>>>()?;
    let copies = y.iter().map(|y| Ok(y.f_empty_like()?)).collect::<Result<Vec<Tensor>>>()?;
    let keys = RowKeys::new((0..shape.0 as u64).collect());
    let sums = new_sums(1, device.executor.device())?;
    let calls = |sums: Option<&Tensor>| -> Result<Vec<Prepared>> {
        let call = |(y, out): (&Tensor, &Tensor)| {
            let into = Destination::Store(out);
            let noisy = Noisy { y, into, bias: None, keys: &keys, scale: SCALE, stream: 1 };
            prepare(device.executor.device(), &Law { law: ErrorLaw::RelativeGaussian, seed: 1, sums }, &[noisy])
        };
        y.iter().zip(&out).map(call).collect()
    };
    let (measured, unmeasured) = (calls(Some(&sums))?, calls(None)?);
    let at = |turn: usize| &y[turn % y.len()];
    let times = in_turns(
        device.clock,
        vec![
            Runner::new(|turn| Ok(copies[turn % copies.len()].shallow_clone().f_copy_(at(turn))?)),
            Runner::new(|turn| device.run(&measured, turn)),
            Runner::new(|turn| device.run(&unmeasured, turn)),
            // As the original did it, on a product in bf16 that this leaves out: randn, abs, mul, mul, add.
            Runner::slow(|turn| {
                let y = at(turn).f_to_kind(Kind::BFloat16)?;
                let error = y.f_randn_like()?.f_mul(&y.f_abs()?)?.f_mul_scalar(f64::from(SCALE))?;
                Ok(y.f_add(&error).map(drop)?)
            }),
        ],
    )?;
    let elements = shape.0 * shape.1;
    let copy = Copy { times: &times[0], bytes: 8 * elements };
    let shape = [shape.0, shape.1];
    let row = |name: &str, place: usize| {
        moving(name, &shape, "f32 to bf16", &times[place], 6 * elements, &copy).beside_chain(&times[3])
    };
    Ok(vec![
        Row::new("copy", &shape, "f32", copy.times).moving(8 * elements),
        row("noise, measured", 1).beside("not measured", &times[2]),
        row("noise", 2),
    ])
}

/// w' of all norms in one call.
fn aqn(device: &OnDevice) -> Result<Vec<Row>> {
    let (count, size) = device.shapes.norms;
    let place = device.executor.device();
    let ones = |_| Ok(Tensor::f_ones([1, size as i64], (Kind::Float, place))?);
    let weights = (0..count).map(ones).collect::<Result<Vec<Tensor>>>()?;
    let out = weights.iter().map(|w| Ok(w.f_empty_like()?)).collect::<Result<Vec<Tensor>>>()?;
    let sums = new_sums(count as i64, place)?;
    let keys = RowKeys::consecutive(1 << 32, 1);
    let noisy = weights.iter().zip(&out).enumerate().map(|(number, (y, out))| {
        let into = Destination::Store(out);
        Noisy { y, into, bias: None, keys: &keys, scale: 0.01, stream: number as u32 }
    });
    let noisy: Vec<Noisy> = noisy.collect();
    let law = Law { law: ErrorLaw::AbsoluteGaussian, seed: 1, sums: Some(&sums) };
    let call = prepare(place, &law, &noisy)?;
    let times = in_turns(
        device.clock,
        vec![
            Runner::new(|_| call.run(device.executor)),
            Runner::slow(|_| {
                weights.iter().try_for_each(|w| {
                    let noise = w.f_randn_like()?.f_mul_scalar(0.01)?;
                    Ok(w.f_add(&noise).map(drop)?)
                })
            }),
        ],
    )?;
    let row = Row::new("aqn on all norms", &[count, size], "f32", &times[0]);
    Ok(vec![row.moving(8 * count * size).beside_chain(&times[1])])
}
