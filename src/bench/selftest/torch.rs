//! What of libtorch carries our kernels: its attention over packed sequences, and CUDA graphs of its operators and our kernels.

use tch::{Device, Kind, Tensor};

use super::{Check, Compared, enter, inputs};
use crate::Result;
use crate::ops::autograd::run_backward;
use crate::ops::cuda::launch::Executor;
use crate::ops::cuda::torch_graph::TorchGraph;
use crate::ops::packed_attention::Packing;
use crate::ops::sampling::{SamplingRule, sample};

const LENGTHS: [usize; 6] = [130, 1, 64, 7, 64, 200];
/// (heads, kv_heads, dim): those of Qwen2.5-1.5B, and of 0.5B.
const HEADS: [(i64, i64, i64); 2] = [(12, 2, 128), (14, 2, 64)];
const REPLAYS: i64 = 3;

pub fn checks(executor: &dyn Executor, checks: &mut Vec<Check>) -> Result<()> {
    for heads in HEADS {
        for kind in [Kind::BFloat16, Kind::Half, Kind::Float] {
            let shape = (LENGTHS.iter().sum(), (heads.0 * heads.2) as usize);
            let run = |compared: &mut Compared| attend(executor.device(), heads, kind, compared);
            enter(checks, "packed_attention", format!("{LENGTHS:?}"), kind, shape, run)?;
        }
    }
    if let Device::Cuda(index) = executor.device() {
        let run = |compared: &mut Compared| graph(index, compared);
        enter(checks, "cuda_graph", format!("{REPLAYS} replays"), Kind::Float, (4, 4096), run)?;
    }
    Ok(())
}

/// Values and gradients against the sequences one by one on the CPU in f32.
fn attend(device: Device, (heads, kv_heads, dim): (i64, i64, i64), kind: Kind, compared: &mut Compared) -> Result<()> {
    let tokens = LENGTHS.iter().sum::<usize>() as i64;
    let new = |heads: i64, flip: bool| -> Result<Tensor> {
        let x = inputs(((tokens * heads) as usize, dim as usize), Kind::Float, false)?.f_clamp(-2.0, 2.0)?;
        let x = if flip { x.f_flip([0])? } else { x };
        Ok(x.f_view([tokens, heads, dim])?.f_to_kind(kind)?)
    };
    let leaves = [new(heads, false)?, new(kv_heads, false)?, new(kv_heads, true)?];
    let weights = new(heads, true)?.f_view([tokens, heads * dim])?;
    let scale = 1.0 / (dim as f64).sqrt();
    let backward = |out: &Tensor, leaves: &[Tensor; 3], weights: &Tensor| -> Result<Vec<Tensor>> {
        run_backward(&out.f_mul(weights)?.f_sum(Kind::Float)?)?;
        leaves.iter().map(|leaf| Ok(leaf.f_grad()?)).collect()
    };
    tch::with_grad(|| {
        let leaf = |t: &Tensor, kind: Kind, device: Device| -> Result<Tensor> {
            Ok(t.f_to_kind(kind)?.f_to_device(device)?.f_detach()?.f_set_requires_grad(true)?)
        };
        let all = |kind: Kind, device: Device| -> Result<[Tensor; 3]> {
            Ok([leaf(&leaves[0], kind, device)?, leaf(&leaves[1], kind, device)?, leaf(&leaves[2], kind, device)?])
        };
        let (ours, plain) = (all(kind, device)?, all(Kind::Float, Device::Cpu)?);
        let found = Packing::new(&LENGTHS, device)?.attention(&ours[0], &ours[1], &ours[2], scale)?;
        let mut outs = Vec::new();
        let mut start = 0;
        for length in LENGTHS {
            let part = |t: &Tensor| t.f_narrow(0, start, length as i64);
            let (q, k, v) = (part(&plain[0])?, part(&plain[1])?, part(&plain[2])?);
            outs.push(Packing::new(&[length], Device::Cpu)?.attention(&q, &k, &v, scale)?);
            start += length as i64;
        }
        let expected = Tensor::f_cat(&outs, 0)?;
        let found_gradients = backward(&found, &ours, &weights.f_to_device(device)?)?;
        let gradients = backward(&expected, &plain, &weights.f_to_kind(Kind::Float)?)?;
        let (relative, absolute) = match kind {
            Kind::BFloat16 => (1.0 / 32.0, 2e-2),
            Kind::Half => (1.0 / 256.0, 4e-3),
            _ => (1e-5, 1e-4),
        };
        compared.tensors_near(&found.detach(), &expected.detach().f_to_kind(kind)?, relative, absolute)?;
        for (found, expected) in found_gradients.iter().zip(&gradients) {
            // Sums over up to 200 queries, of either sign.
            compared.tensors_near(found, &expected.f_to_kind(kind)?, relative, 10.0 * absolute)?;
        }
        Ok(())
    })
}

/// A torch operation and a kernel of ours, captured once: each replay goes on where the last one ended.
fn graph(index: usize, compared: &mut Compared) -> Result<()> {
    let device = Device::Cuda(index);
    let rule = SamplingRule { greedy: false, temperature: 1.0, top_p: 1.0, top_k: 0, seed: 3, stream: 6 << 28 };
    let logits = inputs((4, 4096), Kind::Float, false)?;
    let there = logits.f_to_device(device)?;
    let start = Tensor::f_arange(4, (Kind::Int64, Device::Cpu))?.f_mul_scalar(1 << 18)?;
    let mut keys = start.f_to_device(device)?;
    let mut sum = Tensor::f_zeros([4], (Kind::Int64, device))?;
    let mut step = || -> Result<()> {
        let _ = keys.f_add_scalar_(1)?;
        let _ = sum.f_add_(&sample(&there, &keys, &rule)?.0)?;
        Ok(())
    };
    step()?;
    let captured = TorchGraph::capture(index, &mut step)?;
    (0..REPLAYS).try_for_each(|_| captured.replay())?;
    let mut expected = Tensor::f_zeros([4], (Kind::Int64, device))?;
    for step in 1..=REPLAYS + 1 {
        let keys = start.f_add_scalar(step)?.f_to_device(device)?;
        let _ = expected.f_add_(&sample(&there, &keys, &rule)?.0)?;
    }
    compared.tensors(&sum, &expected.f_to_device(Device::Cpu)?)
}
