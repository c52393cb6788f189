//! The noisy matrix product on a GPU: a linear's forward, dX and dW, each beside torch's clean product of the same operands;
//! decoding steps with packed weights; and all linears of a layer in turn, which weighs shapes by their time.

use tch::{Device, Kind, Tensor};

use super::OnDevice;
use crate::Result;
use crate::bench::timing::{Runner, Times, in_turns};
use crate::bench::{Options, Row};
use crate::numerics::error_law::ErrorLaw;
use crate::numerics::format::Format;
use crate::ops::cuda::launch::Prepared;
use crate::ops::cuda::matmul::{Layout, PACKED_K, PackedWeight, Product, prepare, prepare_as};
use crate::ops::cuda::noise::{Destination, new_sums};
use crate::ops::matmul_error::{ErrorDraw, RowKeys};

const SCALE: f32 = 0.05;
const DRAW: ErrorDraw = ErrorDraw { law: ErrorLaw::RelativeGaussian, scale: SCALE, seed: 1, stream: 1 };
/// Up to so many tokens it is a decoding step, which has no backward.
pub const DECODE_TOKENS: usize = 64;

pub fn rows(device: &OnDevice, options: &Options) -> Result<Vec<Row>> {
    let (mut rows, mut ceiling) = (Vec::new(), None);
    let mut group = |name: String, measure: &dyn Fn() -> Result<Vec<Row>>| -> Result<()> {
        if options.begins(&name) {
            let ceiling = match &ceiling {
                Some(known) => *known,
                None => {
                    let row = self::ceiling(device)?;
                    let tflop_per_s = row.tflop_per_s.unwrap_or(f64::NAN);
                    rows.push(row);
                    *ceiling.insert(tflop_per_s)
                }
            };
            rows.extend(measure()?.into_iter().map(|row| row.beside_ceiling(ceiling)));
        }
        Ok(())
    };
    for model in device.shapes.models {
        for &tokens in device.shapes.tokens {
            for &linear in model.linears.iter().map(|(shape, _)| shape) {
                let name = format!("matmul bf16 [{tokens}, {}] x [{}, {}]", linear.1, linear.0, linear.1);
                group(name, &|| self::linear(device, tokens, linear))?;
            }
            let name = format!("matmul layer of {}, {tokens} tokens", model.name);
            match tokens <= DECODE_TOKENS {
                true => group(name, &|| decoded_layer(device, model, tokens))?,
                false => group(name, &|| trained_layer(device, model, tokens))?,
            }
        }
    }
    Ok(rows)
}

/// What torch's own product can do: a large square one.
fn ceiling(device: &OnDevice) -> Result<Row> {
    let size = device.shapes.square;
    let (a, b) = (device.matrices((size, size), Kind::BFloat16)?, device.matrices((size, size), Kind::BFloat16)?);
    let out = a[0].f_empty_like()?;
    let runner = Runner::new(|turn| Ok(a[turn % 2].f_mm_out(&out, &b[turn % 2]).map(drop)?));
    let times = in_turns(device.clock, vec![runner])?;
    let flops = 2.0 * (size as f64).powi(3);
    Ok(Row::new("torch matmul, square", &[size, size, size], "bf16", &times[0]).computing(flops))
}

/// A linear's operands and results, several times, to take turns.
pub struct Linear {
    sizes: (usize, usize, usize), // tokens, out, in
    x: Vec<Tensor>,               // [tokens, in]
    w: Vec<Tensor>,               // [out, in]
    y: Vec<Tensor>,               // [tokens, out]
    dy: Vec<Tensor>,              // [tokens, out]; none in a decoding step
    dx: Vec<Tensor>,              // [tokens, in]
    dw: Vec<Tensor>,              // f32 [out, in]
    keys: RowKeys,
    rows_of_w: RowKeys,
    sums: Tensor,
}

impl Linear {
    /// Of several linears that run one after the other: with as many turns as make them exceed the caches together.
    pub fn all(device: &OnDevice, tokens: usize, shapes: &[(usize, usize)]) -> Result<Vec<Linear>> {
        let bytes: usize = shapes.iter().map(|(out, inner)| 2 * (tokens * inner + out * inner + tokens * out)).sum();
        let turns = device.shapes.rotated_bytes.div_ceil(bytes).max(2);
        shapes.iter().map(|&shape| Linear::new(device, tokens, shape, turns)).collect()
    }

    fn new(device: &OnDevice, tokens: usize, (out, inner): (usize, usize), turns: usize) -> Result<Linear> {
        let some = |turns, shape| device.some(turns, shape, Kind::BFloat16);
        let (x, w, y) = (some(turns, (tokens, inner))?, some(turns, (out, inner))?, some(turns, (tokens, out))?);
        let backward = if tokens > DECODE_TOKENS { turns } else { 0 };
        let (dy, dx) = (some(backward, (tokens, out))?, some(backward, (tokens, inner))?);
        let dw = w.iter().take(dy.len()).map(|w| Ok(w.f_zeros_like()?.f_to_kind(Kind::Float)?));
        let dw = dw.collect::<Result<Vec<Tensor>>>()?;
        let sums = new_sums(1, device.executor.device())?;
        let (keys, rows_of_w) = (RowKeys::new((0..tokens as u64).collect()), RowKeys::consecutive(0, out));
        Ok(Linear { sizes: (tokens, out, inner), x, w, y, dy, dx, dw, keys, rows_of_w, sums })
    }

    pub fn turns(&self) -> usize {
        self.w.len()
    }

    /// The prepared calls of every turn.
    fn calls<'a>(&'a self, device: &OnDevice, product: impl Fn(usize) -> Product<'a>) -> Result<Vec<Prepared>> {
        let call = |turn: usize| prepare(device.executor, &product(turn));
        (0..self.turns()).map(call).collect()
    }

    pub fn forward(&self, turn: usize, noisy: bool) -> Product<'_> {
        Product {
            layout: Layout::Nt,
            a: &self.x[turn],
            b: &self.w[turn],
            scales: None,
            into: Destination::Store(&self.y[turn]),
            bias: None,
            error: noisy.then_some(&DRAW),
            keys: &self.keys,
            sums: noisy.then_some(&self.sums),
        }
    }

    pub fn dx(&self, turn: usize) -> Product<'_> {
        let (a, into) = (&self.dy[turn], Destination::Store(&self.dx[turn]));
        Product { layout: Layout::Nn, a, into, ..self.forward(turn, true) }
    }

    pub fn dw(&self, turn: usize) -> Product<'_> {
        let (a, b, into) = (&self.dy[turn], &self.x[turn], Destination::Add(&self.dw[turn]));
        Product { layout: Layout::Tn, a, b, into, keys: &self.rows_of_w, ..self.forward(turn, true) }
    }

    pub fn packed<'a>(&'a self, turn: usize, packed: &'a [PackedWeight], noisy: bool) -> Product<'a> {
        let packed = &packed[turn];
        let (layout, scales) = (packed.layout, Some(packed.scales()));
        Product { layout, b: &packed.codes, scales, ..self.forward(turn, noisy) }
    }

    pub fn packed_weights(&self, device: &OnDevice, format: Format) -> Result<Vec<PackedWeight>> {
        self.w.iter().map(|w| PackedWeight::quantize(device.executor, w, format)).collect()
    }

    /// Torch's, without noise.
    fn torch_forward(&self, turn: usize) -> Result<()> {
        let turn = turn % self.turns();
        Ok(self.x[turn].f_mm_out(&self.y[turn], &self.w[turn].f_transpose(0, 1)?).map(drop)?)
    }

    fn torch_dx(&self, turn: usize) -> Result<()> {
        let turn = turn % self.turns();
        Ok(self.dy[turn].f_mm_out(&self.dx[turn], &self.w[turn]).map(drop)?)
    }

    /// Into f32, without adding to what is there.
    fn torch_dw(&self, turn: usize) -> Result<()> {
        let turn = turn % self.turns();
        let (dy, x, out) = (self.dy[turn].f_transpose(0, 1)?, &self.x[turn], &self.dw[turn]);
        match x.device() {
            // Which has no such product of bf16.
            Device::Cpu => dy.f_to_kind(Kind::Float)?.f_mm_out(out, &x.f_to_kind(Kind::Float)?).map(drop)?,
            _ => dy.f_mm_dtype_out(out, x, Kind::Float).map(drop)?,
        }
        Ok(())
    }

    /// As the original did it: four roundings to bf16 after the product.
    fn torch_chain(&self, turn: usize) -> Result<()> {
        let turn = turn % self.turns();
        let y = self.x[turn].f_mm(&self.w[turn].f_transpose(0, 1)?)?;
        let error = y.f_randn_like()?.f_mul(&y.f_abs()?)?.f_mul_scalar(f64::from(SCALE))?;
        Ok(y.f_add(&error).map(drop)?)
    }

    fn flops(&self) -> f64 {
        let (tokens, out, inner) = self.sizes;
        2.0 * (tokens * out * inner) as f64
    }

    fn row(&self, name: &str, times: &Times) -> Row {
        let (tokens, out, inner) = self.sizes;
        Row::new(name, &[tokens, out, inner], "bf16", times).computing(self.flops())
    }
}

fn linear(device: &OnDevice, tokens: usize, shape: (usize, usize)) -> Result<Vec<Row>> {
    let linears = Linear::all(device, tokens, &[shape])?;
    let linear = &linears[0];
    let forward = |noisy| linear.calls(device, |turn| linear.forward(turn, noisy));
    let properties = device.executor.properties()?;
    // Each beside the torch product of that place below.
    let mut cases =
        vec![(NOISY.to_string(), forward(true)?, 0), ("linear forward, clean".to_string(), forward(false)?, 0)];
    let mut torch = vec![("torch linear forward, clean", Runner::new(|turn| linear.torch_forward(turn)))];
    if tokens > DECODE_TOKENS {
        cases.push(("linear dX, noisy".into(), linear.calls(device, |turn| linear.dx(turn))?, 1));
        cases.push(("linear dW added, noisy".into(), linear.calls(device, |turn| linear.dw(turn))?, 2));
        torch.push(("torch linear dX, clean", Runner::new(|turn| linear.torch_dx(turn))));
        torch.push(("torch linear dW, clean", Runner::new(|turn| linear.torch_dw(turn))));
    } else if shape.1 as i64 % PACKED_K == 0 {
        for (format, noisy, name) in PACKED {
            let weights = linear.packed_weights(device, format)?;
            cases.push((name.into(), linear.calls(device, |turn| linear.packed(turn, &weights, noisy))?, 0));
        }
    }
    // Whatever is chosen, a Hopper shows both kernels.
    if properties.is_hopper && tokens > DECODE_TOKENS {
        let product = linear.forward(0, true);
        for choice in product.choices(&properties)?.into_iter().filter(|c| c.splits == 1) {
            let kernel = if choice.tile.is_hopper { "sm_90a" } else { "sm_80" };
            let name = format!("{NOISY}, {kernel} {}x{}", choice.tile.m, choice.tile.n);
            let call = |turn| prepare_as(device.executor, &linear.forward(turn, true), choice);
            cases.push((name, (0..linear.turns()).map(call).collect::<Result<_>>()?, 0));
        }
    }
    let (names, mut runners): (Vec<&str>, Vec<Runner>) = torch.into_iter().unzip();
    runners.push(Runner::slow(|turn| linear.torch_chain(turn)));
    runners.extend(cases.iter().map(|(_, calls, _)| Runner::new(|turn| device.run(calls, turn))));
    let times = in_turns(device.clock, runners)?;
    let (torch, ours) = times.split_at(names.len() + 1);
    let mut rows: Vec<Row> = names.iter().zip(torch).map(|(name, times)| linear.row(name, times)).collect();
    for ((name, _, baseline), times) in cases.iter().zip(ours) {
        let row = linear.row(name, times).beside("torch, clean", &torch[*baseline]);
        rows.push(if name == NOISY { row.beside_chain(&torch[names.len()]) } else { row });
    }
    Ok(rows)
}

const NOISY: &str = "linear forward, noisy";

const PACKED: [(Format, bool, &str); 4] = [
    (Format::MXFP4, false, "linear mxfp4 weights, clean"),
    (Format::MXFP4, true, "linear mxfp4 weights, noisy"),
    (Format::NVFP4, false, "linear nvfp4 weights, clean"),
    (Format::NVFP4, true, "linear nvfp4 weights, noisy"),
];

/// The linears of a model's layer.
pub struct Model {
    pub name: &'static str,
    /// Each ([out, in], how many of it a layer has).
    pub linears: &'static [((usize, usize), usize)],
    /// About as decoding runs them: q, k and v in one launch, gate and up in one.
    pub fused: &'static [(usize, usize)],
}

/// Forward, and backward, of a layer.
fn trained_layer(device: &OnDevice, model: &Model, tokens: usize) -> Result<Vec<Row>> {
    let repeated = model.linears.iter().flat_map(|&(shape, count)| std::iter::repeat_n(shape, count));
    let linears = Linear::all(device, tokens, &repeated.collect::<Vec<_>>())?;
    let of_all = |calls: &dyn Fn(&Linear) -> Result<Vec<Prepared>>| -> Result<Vec<Vec<Prepared>>> {
        linears.iter().map(calls).collect()
    };
    let noisy = of_all(&|linear| linear.calls(device, |turn| linear.forward(turn, true)))?;
    let clean = of_all(&|linear| linear.calls(device, |turn| linear.forward(turn, false)))?;
    let dx = of_all(&|linear| linear.calls(device, |turn| linear.dx(turn)))?;
    let dw = of_all(&|linear| linear.calls(device, |turn| linear.dw(turn)))?;
    let run = |calls: &[Vec<Prepared>], turn| calls.iter().try_for_each(|of_one| device.run(of_one, turn));
    let times = in_turns(
        device.clock,
        vec![
            Runner::new(|turn| linears.iter().try_for_each(|linear| linear.torch_forward(turn))),
            Runner::new(|turn| run(&noisy, turn)),
            Runner::new(|turn| run(&clean, turn)),
            Runner::slow(|turn| linears.iter().try_for_each(|linear| linear.torch_chain(turn))),
            Runner::new(|turn| {
                linears.iter().try_for_each(|linear| linear.torch_dx(turn).and_then(|()| linear.torch_dw(turn)))
            }),
            Runner::new(|turn| dx.iter().chain(&dw).try_for_each(|of_one| device.run(of_one, turn))),
        ],
    )?;
    let flops: f64 = linears.iter().map(Linear::flops).sum();
    let row = |what: &str, products: f64, times: &Times| {
        Row::new(&format!("layer of {} {what}", model.name), &[tokens], "bf16", times).computing(products * flops)
    };
    Ok(vec![
        row("forward, torch, clean", 1.0, &times[0]),
        row("forward, noisy", 1.0, &times[1]).beside("torch, clean", &times[0]).beside_chain(&times[3]),
        row("forward, clean", 1.0, &times[2]).beside("torch, clean", &times[0]),
        row("dX and dW, torch, clean", 2.0, &times[4]),
        row("dX and dW, noisy", 2.0, &times[5]).beside("torch, clean", &times[4]),
    ])
}

/// A decoding step's linears, in one CUDA graph; weights of several layers take turns, so that none is in the cache.
fn decoded_layer(device: &OnDevice, model: &Model, tokens: usize) -> Result<Vec<Row>> {
    let linears = Linear::all(device, tokens, model.fused)?;
    // A graph for each turn.
    let joined = |mut of_linears: Vec<Vec<Prepared>>| -> Result<Vec<Prepared>> {
        let turns = 0..linears[0].turns();
        let of_turn = |_| Prepared::joined(device.executor, of_linears.iter_mut().filter_map(Vec::pop).collect());
        turns.map(of_turn).collect()
    };
    let dense = |noisy| -> Result<Vec<Prepared>> {
        let of_linears = linears.iter().map(|l| l.calls(device, |turn| l.forward(turn, noisy)));
        joined(of_linears.collect::<Result<_>>()?)
    };
    let packed = |format, noisy| -> Result<Vec<Prepared>> {
        let of_linears = linears.iter().map(|l| {
            let weights = l.packed_weights(device, format)?;
            l.calls(device, |turn| l.packed(turn, &weights, noisy))
        });
        joined(of_linears.collect::<Result<_>>()?)
    };
    let mut cases = vec![("linear forward, noisy", dense(true)?)];
    for (format, noisy, name) in PACKED {
        cases.push((name, packed(format, noisy)?));
    }
    let mut runners = vec![Runner::new(|turn| linears.iter().try_for_each(|linear| linear.torch_forward(turn)))];
    runners.extend(cases.iter().map(|(_, graphs)| Runner::new(|turn| device.run(graphs, turn))));
    let times = in_turns(device.clock, runners)?;
    let flops: f64 = linears.iter().map(Linear::flops).sum();
    let row = |what: &str, times: &Times| {
        Row::new(&format!("layer of {}, decoding: {what}", model.name), &[tokens], "bf16", times).computing(flops)
    };
    let torch = row("torch, clean, no graph", &times[0]);
    let ours = cases.iter().zip(&times[1..]);
    let ours = ours.map(|((name, _), of)| row(name, of).beside("torch, clean, no graph", &times[0]));
    Ok(std::iter::once(torch).chain(ours).collect())
}
