//! Fake quantization on a GPU: single weights in every format, the tensor amax alone, and all linears of a model in one call.

use tch::{Kind, Tensor};

use super::{Copy, Formats, OnDevice, moving};
use crate::Result;
use crate::bench::timing::{Runner, in_turns};
use crate::bench::{Options, Row, torch_chain};
use crate::numerics::block_format::TensorScale;
use crate::numerics::format::Format;
use crate::ops::cuda::fake_quant::{Matrix, MatrixScale, Wanted, prepare, prepare_amax};
use crate::ops::cuda::launch::Prepared;
use crate::ops::fake_quant::StochasticDraw;
use crate::ops::matmul_error::RowKeys;

const VALUES: Wanted = Wanted { dequantized: true, codes: false, error_sums: false };
const CODES: Wanted = Wanted { dequantized: false, codes: true, error_sums: false };
const WITH_SUMS: Wanted = Wanted { error_sums: true, ..VALUES };

/// A format, what is made, and what it is held against.
type Case = (&'static str, Wanted, &'static str);
/// What the weights of a model are held in.
const WEIGHT_CASES: [Case; 4] =
    [("mxfp4", VALUES, "copy"), ("mxfp4:sr", VALUES, "mxfp4"), ("nvfp4", VALUES, "mxfp4"), ("mxfp8", VALUES, "mxfp4")];
const OTHER_CASES: [Case; 14] = [
    ("mxfp4", CODES, "mxfp4"),
    ("mxfp4", WITH_SUMS, "mxfp4"),
    ("mxfp4:rceil", VALUES, "mxfp4"),
    ("mxfp4:half_away", VALUES, "mxfp4"),
    ("mxfp4:sr8", VALUES, "mxfp4"),
    ("mxfp4:2d", VALUES, "mxfp4"),
    ("nvfp4:sr", VALUES, "nvfp4"),
    ("nvfp4:2d", VALUES, "nvfp4"),
    ("nvfp4:4over6", VALUES, "nvfp4"),
    ("nvfp4", WITH_SUMS, "nvfp4"),
    ("mxfp8:sr", VALUES, "mxfp8"),
    ("fp8", VALUES, "mxfp4"),
    ("fp8:tensor", VALUES, "mxfp4"),
    ("nvfp4_single_level", VALUES, "nvfp4"),
];

pub fn rows(device: &OnDevice, options: &Options) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for &(shape, formats) in device.shapes.weights {
        let kinds = [(Kind::BFloat16, "bf16"), (Kind::Half, "f16"), (Kind::Float, "f32")];
        for (kind, dtype) in kinds.into_iter().take(if formats == Formats::All { 3 } else { 1 }) {
            if options.begins(&format!("fake_quant {dtype} [{}, {}]", shape.0, shape.1)) {
                rows.extend(weight(device, shape, kind, dtype, formats)?);
            }
        }
    }
    if options.begins("fake_quant model") {
        rows.extend(model(device)?);
    }
    Ok(rows)
}

fn weight(
    device: &OnDevice,
    shape: (usize, usize),
    kind: Kind,
    dtype: &'static str,
    formats: Formats,
) -> Result<Vec<Row>> {
    let x = device.matrices(shape, kind)?;
    let copies = x.iter().map(|x| Ok(x.f_empty_like()?)).collect::<Result<Vec<Tensor>>>()?;
    let mut cases = WEIGHT_CASES.to_vec();
    if formats == Formats::All {
        cases.extend(OTHER_CASES);
    }
    let amax = x.iter().map(|x| Ok(prepare_amax(device.executor, x, Format::NVFP4)?.0));
    let amax = amax.collect::<Result<Vec<Prepared>>>()?;
    let mut prepared: Vec<(Format, Vec<Prepared>)> = Vec::new();
    for (name, wanted, _) in &cases {
        let format: Format = name.parse()?;
        let calls = x.iter().map(|x| single(device, x, format, *wanted)).collect::<Result<Vec<_>>>()?;
        prepared.push((format, calls));
    }
    let mut runners = vec![
        Runner::new(|turn| Ok(copies[turn % x.len()].shallow_clone().f_copy_(&x[turn % x.len()])?)),
        Runner::new(|turn| device.run(&amax, turn)),
        // Nothing but reading: torch's maximum of the same bytes as integers.
        Runner::new(|turn| Ok(x[turn % x.len()].f_view_dtype(Kind::Int)?.f_max().map(drop)?)),
    ];
    runners.extend(prepared.iter().map(|(_, calls)| Runner::new(move |turn| device.run(calls, turn))));
    let mut chained = Vec::new();
    for (place, (format, _)) in prepared.iter().enumerate().filter(|(place, _)| cases[*place].1 == VALUES) {
        if torch_chain::fake_quant(&x[0], *format)?.is_some() {
            chained.push(place);
            let x = &x;
            runners.push(Runner::slow(move |turn| torch_chain::fake_quant(&x[turn % x.len()], *format).map(drop)));
        }
    }
    let times = in_turns(device.clock, runners)?;
    let bytes = shape.0 * shape.1 * kind.elt_size_in_bytes();
    let (copy, quantized) = (Copy { times: &times[0], bytes: 2 * bytes }, &times[3..]);
    let shape = [shape.0, shape.1];
    let mut rows = vec![
        Row::new("copy", &shape, dtype, copy.times).moving(2 * bytes),
        moving("read", &shape, dtype, &times[2], bytes, &copy),
        moving("amax nvfp4", &shape, dtype, &times[1], bytes, &copy).beside("read", &times[2]),
    ];
    for (place, (name, wanted, baseline)) in cases.iter().enumerate() {
        let format = prepared[place].0;
        let suffix = if wanted.codes {
            " codes"
        } else if wanted.error_sums {
            " with error sums"
        } else {
            ""
        };
        // A tensor or row amax comes first: x is read twice.
        let reads = if format.has_tensor_scale() || name.starts_with("fp8") { 2 } else { 1 };
        let code_bits = if format.has_e4m3_elements() { 8 } else { 4 };
        let written = if wanted.codes { shape[0] * shape[1] * code_bits / 8 } else { bytes };
        let name = format!("fake_quant {name}{suffix}");
        let mut row = moving(&name, &shape, dtype, &quantized[place], reads * bytes + written, &copy);
        if let Some(other) = cases.iter().position(|(name, wanted, _)| name == baseline && *wanted == VALUES) {
            row = row.beside(baseline, &quantized[other]);
        }
        if let Some(chain) = chained.iter().position(|p| *p == place) {
            row = row.beside_chain(&quantized[cases.len() + chain]);
        }
        rows.push(row);
    }
    Ok(rows)
}

fn single(device: &OnDevice, x: &Tensor, format: Format, wanted: Wanted) -> Result<Prepared> {
    let draw = StochasticDraw { seed: 0, stream: 0, keys: RowKeys::consecutive(0, x.size()[0] as usize) };
    let matrix = Matrix { x, scale: MatrixScale::Own(TensorScale::Tensor), draw: Some(&draw) };
    Ok(prepare(device.executor, format, &[matrix], wanted)?.0)
}

/// All linears of a model in one call, siblings with one amax; beside a copy of as many bytes.
fn model(device: &OnDevice) -> Result<Vec<Row>> {
    let place = device.executor.device();
    let weights = (0..device.shapes.layers).flat_map(|_| device.shapes.layer).map(|&(rows, cols)| {
        let normal = Tensor::f_randn([rows as i64, cols as i64], (Kind::Float, place))?;
        Ok(normal.f_mul_scalar(0.02)?.f_to_kind(Kind::BFloat16)?)
    });
    let weights = weights.collect::<Result<Vec<Tensor>>>()?;
    let copies = weights.iter().map(|w| Ok(w.f_empty_like()?)).collect::<Result<Vec<Tensor>>>()?;
    let prepared = ["mxfp4", "mxfp4:sr", "nvfp4"].map(|name| -> Result<Prepared> {
        let format: Format = name.parse()?;
        let draws = weights.iter().map(|w| {
            let keys = RowKeys::consecutive(0, w.size()[0] as usize);
            StochasticDraw { seed: 0, stream: 0, keys }
        });
        let draws: Vec<StochasticDraw> = draws.collect();
        // q, k, v of a layer, and gate, up.
        let group = |i: usize| match i % 7 {
            0..=2 => i / 7 * 7,
            4..=5 => i / 7 * 7 + 4,
            _ => i,
        };
        let matrix = |(i, x)| Matrix { x, scale: MatrixScale::Group(group(i)), draw: Some(&draws[i]) };
        let matrices: Vec<Matrix> = weights.iter().enumerate().map(matrix).collect();
        Ok(prepare(device.executor, format, &matrices, VALUES)?.0)
    });
    let [mxfp4, stochastic, nvfp4] = prepared;
    let (mxfp4, stochastic, nvfp4) = (mxfp4?, stochastic?, nvfp4?);
    let times = in_turns(
        device.clock,
        vec![
            Runner::new(|_| {
                copies.iter().zip(&weights).try_for_each(|(to, from)| Ok(to.shallow_clone().f_copy_(from)?))
            }),
            Runner::new(|_| mxfp4.run(device.executor)),
            Runner::new(|_| stochastic.run(device.executor)),
            Runner::new(|_| nvfp4.run(device.executor)),
        ],
    )?;
    let bytes: usize = weights.iter().map(|w| 2 * w.numel()).sum();
    let copy = Copy { times: &times[0], bytes: 2 * bytes };
    let row = |name: &str, place: usize, passes: usize| {
        moving(name, &[weights.len()], "bf16", &times[place], passes * bytes, &copy)
    };
    Ok(vec![
        Row::new("copy of all linears", &[weights.len()], "bf16", copy.times).moving(2 * bytes),
        row("fake_quant mxfp4 of all linears", 1, 2),
        row("fake_quant mxfp4:sr of all linears", 2, 2).beside("mxfp4", &times[1]),
        row("fake_quant nvfp4 of all linears", 3, 3).beside("mxfp4", &times[1]),
    ])
}
