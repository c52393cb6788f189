//! Noise and the noisy linear layer, forward and backward, each beside the same work without noise.

use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::timing::{Runner, WallClock, in_turns};
use super::{Options, ROTATED_BYTES, Row};
use crate::Result;
use crate::numerics::error_law::ErrorLaw;
use crate::numerics::noise_key::row_key;
use crate::ops::cpu::matmul_error::apply_f32;
use crate::ops::cpu::normals::normals_into;
use crate::ops::cpu::tensor::{f32_slice, f32_slice_mut};
use crate::ops::matmul_error::{ErrorDraw, RowKeys};
use crate::ops::noisy_linear::{self, NoisyLinearCall, ProductError, WeightGradientError};

/// A micro-batch through gate_proj of Qwen2.5-1.5B: x [TOKENS, IN], W [OUT, IN].
const TOKENS: usize = 512;
const IN: usize = 1536;
const OUT: usize = 8960;
const SCALE: f32 = 0.05;

pub fn rows(options: &Options) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    if options.begins(&format!("noise f32 [{TOKENS}, {OUT}]")) {
        rows.extend(elementwise()?);
    }
    if options.begins(&format!("noisy_linear f32 [{TOKENS}, {IN}] x [{OUT}, {IN}]")) {
        rows.extend(linear()?);
    }
    Ok(rows)
}

fn matrix(rows: usize, cols: usize, key: u64) -> Result<Tensor> {
    let mut values = Tensor::f_empty([rows as i64, cols as i64], (Kind::Float, Device::Cpu))?;
    let all = f32_slice_mut(&mut values)?.par_chunks_mut(cols).enumerate();
    all.for_each(|(row, out)| normals_into(1, 0, key << 32 | row as u64, out));
    Ok(values)
}

/// The law on a finished product, in place, and the normals alone.
fn elementwise() -> Result<Vec<Row>> {
    let bytes = TOKENS * OUT * 4;
    let count = ROTATED_BYTES.div_ceil(bytes);
    let y: Vec<Tensor> = (0..count as u64).map(|key| matrix(TOKENS, OUT, key)).collect::<Result<_>>()?;
    let copies: Vec<Tensor> = y.iter().map(|y| Ok(y.f_zeros_like()?)).collect::<Result<_>>()?;
    let tokens: Vec<u64> = (0..TOKENS as u64).collect();
    let at = |list: &[Tensor], turn: usize| list[turn % count].shallow_clone();
    let times = in_turns(
        &WallClock,
        vec![
            Runner::new(|turn| {
                let (x, mut out) = (at(&y, turn), at(&copies, turn));
                let rows = f32_slice(&x)?.par_chunks(OUT).zip(f32_slice_mut(&mut out)?.par_chunks_mut(OUT));
                rows.for_each(|(x, out)| out.copy_from_slice(x));
                Ok(())
            }),
            Runner::new(|turn| {
                let mut out = at(&copies, turn);
                let rows = f32_slice_mut(&mut out)?.par_chunks_mut(OUT).enumerate();
                rows.for_each(|(row, out)| normals_into(1, 2, row as u64, out));
                Ok(())
            }),
            Runner::new(|turn| {
                let law = ErrorLaw::RelativeGaussian;
                // A scale that leaves y as large as it was however often it is applied.
                apply_f32(law, 1e-6, 1, 2, &tokens, f32_slice_mut(&mut at(&y, turn))?, OUT, None);
                Ok(())
            }),
            Runner::slow(|turn| Ok(at(&copies, turn).f_normal_(0.0, 1.0).map(drop)?)),
            Runner::slow(|turn| {
                let y = at(&y, turn);
                let error = y.f_randn_like()?.f_mul_scalar(f64::from(SCALE))?.f_mul(&y.f_abs()?)?;
                Ok(y.f_add(&error).map(drop)?)
            }),
        ],
    )?;
    let [copy, normals, law, torch_normals, torch_law] = &times[..] else { return Ok(Vec::new()) };
    let row = |name, times| Row::new(name, &[TOKENS, OUT], "f32", times);
    Ok(vec![
        row("copy", copy).moving(2 * bytes),
        row("normals", normals).moving(bytes).beside_copy(copy).beside_chain(torch_normals),
        row("relative noise", law).moving(2 * bytes).beside_copy(copy).beside_chain(torch_law),
    ])
}

/// Forward, and backward with dW's error per update (none here) or per micro-batch.
fn linear() -> Result<Vec<Row>> {
    let (x, w, dy) = (matrix(TOKENS, IN, 1)?, matrix(OUT, IN, 2)?, matrix(TOKENS, OUT, 3)?);
    let gradient = w.f_zeros_like()?;
    let keys = RowKeys::new((0..TOKENS as u64).collect());
    let clean = NoisyLinearCall::clean(keys, true);
    let error = |stream: u32| ProductError {
        draw: Some(ErrorDraw { law: ErrorLaw::RelativeGaussian, scale: SCALE, seed: 1, stream }),
        sink: Some(Default::default()),
    };
    let per_update = NoisyLinearCall { forward: error(1), dx: error(2), ..clean.clone() };
    let out_keys = RowKeys::new((0..OUT as u32).map(|row| row_key(0, row)).collect());
    let dw = Some(WeightGradientError { error: error(3), keys: out_keys });
    let per_microbatch = NoisyLinearCall { dw, ..per_update.clone() };
    let forward = |call: &NoisyLinearCall| noisy_linear::forward(&x, &w, None, call, true, Kind::Float).map(drop);
    let backward = |call: &NoisyLinearCall| -> Result<()> {
        let _ = noisy_linear::backward_dx(&dy, &w, call)?;
        noisy_linear::accumulate_dw(&dy, &x, call, &mut gradient.shallow_clone())
    };
    let times = in_turns(
        &WallClock,
        vec![
            Runner::new(|_| forward(&clean)),
            Runner::new(|_| forward(&per_update)),
            Runner::new(|_| backward(&clean)),
            Runner::new(|_| backward(&per_update)),
            Runner::new(|_| backward(&per_microbatch)),
        ],
    )?;
    let flops = 2.0 * (TOKENS * IN * OUT) as f64;
    let row = |name: &str, products: f64, place: usize| {
        Row::new(name, &[TOKENS, IN, OUT], "f32", &times[place]).computing(products * flops)
    };
    Ok(vec![
        row("linear forward, clean", 1.0, 0),
        row("linear forward, noisy", 1.0, 1).beside("clean", &times[0]),
        row("linear backward, clean", 2.0, 2),
        row("linear backward, noisy dX", 2.0, 3).beside("clean", &times[2]),
        row("linear backward, noisy dX and dW", 2.0, 4).beside("clean", &times[2]),
    ])
}
