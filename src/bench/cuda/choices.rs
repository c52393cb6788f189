//! Which tile and how many splits are fastest for every product of the models' linears on this device: what
//! src/ops/cuda/matmul/choices.json holds.

use super::OnDevice;
use super::matmul::{DECODE_TOKENS, Linear};
use crate::Result;
use crate::bench::Options;
use crate::bench::timing::{Runner, in_turns};
use crate::numerics::format::Format;
use crate::ops::cuda::launch::Prepared;
use crate::ops::cuda::matmul::{Choice, MeasuredChoice, PACKED_K, Product, prepare_as};

/// Splits that are tried, of all that a product may have.
const SPLITS: [u32; 10] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32];

pub fn measure(device: &OnDevice, options: &Options) -> Result<Vec<MeasuredChoice>> {
    let mut found = Vec::new();
    for model in device.shapes.models {
        let single = model.linears.iter().map(|(shape, _)| shape);
        for &shape in single.chain(model.fused) {
            for &tokens in device.shapes.tokens {
                if options.begins(&format!("choices [{tokens}, {}] x [{}, {}]", shape.1, shape.0, shape.1)) {
                    of_linear(device, tokens, shape, &mut found)?;
                }
            }
        }
    }
    found.sort_by_key(|c: &MeasuredChoice| (c.layout as u8, c.n, c.k, c.m));
    found.dedup_by_key(|c| (c.layout as u8, c.n, c.k, c.m));
    Ok(found)
}

fn of_linear(device: &OnDevice, tokens: usize, shape: (usize, usize), found: &mut Vec<MeasuredChoice>) -> Result<()> {
    let linears = Linear::all(device, tokens, &[shape])?;
    let linear = &linears[0];
    found.extend(fastest(device, linear, |turn| linear.forward(turn, true))?);
    if tokens > DECODE_TOKENS {
        found.extend(fastest(device, linear, |turn| linear.dx(turn))?);
        found.extend(fastest(device, linear, |turn| linear.dw(turn))?);
    } else if shape.1 as i64 % PACKED_K == 0 {
        for format in [Format::MXFP4, Format::NVFP4] {
            let weights = linear.packed_weights(device, format)?;
            found.extend(fastest(device, linear, |turn| linear.packed(turn, &weights, true))?);
        }
    }
    Ok(())
}

/// None where there is nothing to choose.
fn fastest<'a>(
    device: &OnDevice,
    linear: &'a Linear,
    product: impl Fn(usize) -> Product<'a>,
) -> Result<Option<MeasuredChoice>> {
    let properties = device.executor.properties()?;
    let of_turn = product(0);
    let mut choices = of_turn.choices(&properties)?;
    choices.retain(|choice| SPLITS.contains(&choice.splits));
    let calls = |choice: &Choice| -> Result<Vec<Prepared>> {
        (0..linear.turns()).map(|turn| prepare_as(device.executor, &product(turn), *choice)).collect()
    };
    let calls = choices.iter().map(calls).collect::<Result<Vec<_>>>()?;
    let runners = calls.iter().map(|of_choice| Runner::new(|turn| device.run(of_choice, turn))).collect();
    let times = in_turns(device.clock, runners)?;
    let timed = choices.iter().zip(&times);
    let best = timed.min_by(|(_, a), (_, b)| a.min_us().total_cmp(&b.min_us())).map(|(choice, _)| choice);
    let (m, n, k) = of_turn.sizes()?;
    Ok(best.map(|Choice { tile, splits }| MeasuredChoice {
        gpu: properties.name.clone(),
        layout: of_turn.layout,
        m,
        n,
        k,
        tile: [tile.m, tile.n],
        splits: *splits,
    }))
}
