//! The small operations of a model on a GPU, each beside the chain of torch's operations that it stands for.

use tch::{Kind, Tensor};

use super::{Copy, OnDevice, moving};
use crate::Result;
use crate::bench::selftest::norm_backward_chain;
use crate::bench::timing::{Runner, in_turns};
use crate::bench::{Options, Row};
use crate::ops::cuda::launch::Prepared;
use crate::ops::cuda::rms_norm::{Norm, NormBackward, prepare, prepare_backward};
use crate::ops::cuda::{rotary as cuda_rotary, swiglu as cuda_swiglu};
use crate::ops::{rms_norm, rotary, swiglu};

const EPS: f64 = 1e-6;
/// Of an element of bf16, in which all of it is timed.
const BYTES: usize = 2;
const KIND: Kind = Kind::BFloat16;

pub fn rows(device: &OnDevice, options: &Options) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for &shape in device.shapes.streams {
        if options.begins(&format!("rms_norm of a sum bf16 [{}, {}]", shape.0, shape.1)) {
            rows.extend(norms(device, shape)?);
        }
    }
    for &shape in device.shapes.gates {
        if options.begins(&format!("swiglu bf16 [{}, {}]", shape.0, shape.1)) {
            rows.extend(gates(device, shape)?);
        }
    }
    for &shape in device.shapes.heads {
        if options.begins(&format!("rotary bf16 {shape:?}")) {
            rows.push(rotations(device, shape)?);
        }
    }
    Ok(rows)
}

/// What is timed for one row: a kernel's calls in turns and the chain that it stands for.
pub struct Beside<'a> {
    pub name: &'a str,
    pub shape: &'a [usize],
    pub calls: &'a [Prepared],
    pub chain: &'a dyn Fn(usize) -> Result<()>,
    /// That the kernel has to move.
    pub bytes: usize,
    /// Whose copy shows what the memory can do.
    pub copied: &'a [Tensor],
}

impl Beside<'_> {
    /// In bf16.
    pub fn row(&self, device: &OnDevice) -> Result<Row> {
        let to = self.copied.iter().map(|x| Ok(x.f_empty_like()?)).collect::<Result<Vec<Tensor>>>()?;
        let copy = |turn: usize| {
            let place = turn % to.len();
            Ok(to[place].shallow_clone().f_copy_(&self.copied[place])?)
        };
        let times = in_turns(
            device.clock,
            vec![
                Runner::new(copy),
                Runner::new(|turn| device.run(self.calls, turn)),
                Runner::slow(|turn| (self.chain)(turn)),
            ],
        )?;
        let bytes = self.copied.first().map_or(0, |x| 2 * x.numel() * x.kind().elt_size_in_bytes());
        let copy = Copy { times: &times[0], bytes };
        Ok(moving(self.name, self.shape, "bf16", &times[1], self.bytes, &copy).beside_chain(&times[2]))
    }
}

/// s = x + delta and its norm; dx and dw.
fn norms(device: &OnDevice, shape: (usize, usize)) -> Result<Vec<Row>> {
    let (x, delta) = (device.matrices(shape, KIND)?, device.matrices(shape, KIND)?);
    let place = device.executor.device();
    let weight = Tensor::f_ones([shape.1 as i64], (Kind::Float, place))?;
    let forward = |(x, delta): (&Tensor, &Tensor)| {
        let norm = Norm { x, delta: Some(delta), weight: &weight, clean: None, eps: EPS as f32 };
        Ok(prepare(place, &norm)?.0)
    };
    let calls = x.iter().zip(&delta).map(forward).collect::<Result<Vec<Prepared>>>()?;
    let chain = |turn: usize| {
        let at = turn % x.len();
        rms_norm::definition(&x[at], Some(&delta[at]), &weight, None, EPS).map(drop)
    };
    let (elements, sizes) = (shape.0 * shape.1, [shape.0, shape.1]);
    let bytes = 4 * BYTES * elements;
    let name = "rms_norm of a sum";
    let forward = Beside { name, shape: &sizes, calls: &calls, chain: &chain, bytes, copied: &x }.row(device)?;
    let backward = |(s, dy): (&Tensor, &Tensor)| {
        let back = NormBackward { s, dy, ds: Some(s), weight: &weight, eps: EPS as f32, wants_dweight: true };
        Ok(prepare_backward(place, &back)?.0)
    };
    let calls = x.iter().zip(&delta).map(backward).collect::<Result<Vec<Prepared>>>()?;
    let chain = |turn: usize| {
        let at = turn % x.len();
        norm_backward_chain(&x[at], &delta[at], Some(&x[at]), &weight).map(drop)
    };
    let name = "rms_norm of a sum, backward";
    let backward = Beside { name, shape: &sizes, calls: &calls, chain: &chain, bytes, copied: &x }.row(device)?;
    Ok(vec![forward, backward])
}

fn gates(device: &OnDevice, shape: (usize, usize)) -> Result<Vec<Row>> {
    let (gate, up) = (device.matrices(shape, KIND)?, device.matrices(shape, KIND)?);
    let place = device.executor.device();
    let forward = |(gate, up): (&Tensor, &Tensor)| Ok(cuda_swiglu::prepare(place, gate, up)?.0);
    let calls = gate.iter().zip(&up).map(forward).collect::<Result<Vec<Prepared>>>()?;
    let chain = |turn: usize| {
        let at = turn % gate.len();
        swiglu::definition(&gate[at], &up[at]).map(drop)
    };
    let (elements, sizes) = (shape.0 * shape.1, [shape.0, shape.1]);
    let bytes = 3 * BYTES * elements;
    let forward =
        Beside { name: "swiglu", shape: &sizes, calls: &calls, chain: &chain, bytes, copied: &gate }.row(device)?;
    // What arrives has the size of the others: up serves for it.
    let backward = |(gate, up): (&Tensor, &Tensor)| Ok(cuda_swiglu::prepare_backward(place, gate, up, up)?.0);
    let calls = gate.iter().zip(&up).map(backward).collect::<Result<Vec<Prepared>>>()?;
    let chain = |turn: usize| {
        let (gate, up) = (&gate[turn % gate.len()], &up[turn % gate.len()]);
        let dup = up.f_mul(&gate.f_silu()?)?;
        Ok(gate.f_silu_backward(&up.f_mul(up)?).map(|dgate| drop((dgate, dup)))?)
    };
    let (name, bytes) = ("swiglu, backward", 5 * BYTES * elements);
    let backward = Beside { name, shape: &sizes, calls: &calls, chain: &chain, bytes, copied: &gate }.row(device)?;
    Ok(vec![forward, backward])
}

fn rotations(device: &OnDevice, (tokens, heads, kv_heads, dim): (usize, usize, usize, usize)) -> Result<Row> {
    let place = device.executor.device();
    let by_heads = |x: Vec<Tensor>, heads: usize| {
        let view = |x: Tensor| Ok(x.f_view([tokens as i64, heads as i64, dim as i64])?);
        x.into_iter().map(view).collect::<Result<Vec<Tensor>>>()
    };
    let q = by_heads(device.matrices((tokens, heads * dim), KIND)?, heads)?;
    let k = by_heads(device.some(q.len(), (tokens, kv_heads * dim), KIND)?, kv_heads)?;
    let angle = Tensor::f_randn([tokens as i64, 1, dim as i64], (Kind::Float, place))?;
    let (cos, sin) = (angle.f_cos()?, angle.f_sin()?);
    let call = |(q, k): (&Tensor, &Tensor)| {
        Ok(cuda_rotary::prepare(place, &cuda_rotary::Rotation { q, k, cos: &cos, sin: &sin, is_back: false })?.0)
    };
    let calls = q.iter().zip(&k).map(call).collect::<Result<Vec<Prepared>>>()?;
    let chain = |turn: usize| {
        let at = turn % q.len();
        let rotated = (rotary::definition(&q[at], &cos, &sin)?, rotary::definition(&k[at], &cos, &sin)?);
        drop(rotated);
        Ok(())
    };
    let bytes = 2 * BYTES * tokens * (heads + kv_heads) * dim + 2 * size_of::<f32>() * tokens * dim;
    let shape = [tokens, heads, kv_heads, dim];
    Beside { name: "rotary", shape: &shape, calls: &calls, chain: &chain, bytes, copied: &q }.row(device)
}
