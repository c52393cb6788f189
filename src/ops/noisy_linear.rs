//! The noisy linear layer, forward and backward (numerics.md section 4).
//!
//! y' = law(x W^T) + bias; in autograd the error is a constant, so with dY' the incoming gradient
//! dX = law(dY' W), dW = law(dY'^T x), each with its own draw; the bias gradient is exact.
//! W is the weight that the product uses (fake-quantized where the plan says so); dW reaches the unquantized master
//! (straight-through) by accumulating into an f32 buffer of ours, never through torch's bf16 `.grad`.
//!
//! Shapes: x [tokens, in], W [out, in], bias [out] f32, y [tokens, out]. x and W share a dtype (f32 or bf16).

use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use super::autograd::{Backward, attach};
use super::cuda::launch::Executor;
use super::cuda::matmul::{Layout, PackedWeight, Product, matmul, matmul_together};
use super::cuda::noise::Destination;
use super::cuda::place::Place;
use super::matmul_error::{ErrorDraw, RowKeys, SumsSink, accumulate_rows, finish_product};
use crate::numerics::error_law::NoiseSums;
use crate::{Error, Result};

/// The error of one of the three products, and where its measurement goes.
#[derive(Clone, Default)]
pub struct ProductError {
    pub draw: Option<ErrorDraw>,
    pub sink: Option<SumsSink>,
}

/// dW's own draw when `dw_draw: per_microbatch`: its rows are out features.
#[derive(Clone)]
pub struct WeightGradientError {
    pub error: ProductError,
    pub keys: RowKeys, // [out]
}

/// Everything one call captures at forward; backward reads nothing else.
#[derive(Clone)]
pub struct NoisyLinearCall {
    pub keys: RowKeys, // [tokens]
    /// False where no backward will follow (rollout, validation, log-probs of old and reference policy).
    pub differentiable: bool,
    pub forward: ProductError,
    pub dx: ProductError,
    /// None: no error on the micro-batch's dW (it is drawn per update, or not at all).
    pub dw: Option<WeightGradientError>,
}

impl NoisyLinearCall {
    /// A call without any error.
    pub fn clean(keys: RowKeys, differentiable: bool) -> NoisyLinearCall {
        let (forward, dx) = (ProductError::default(), ProductError::default());
        NoisyLinearCall { keys, differentiable, forward, dx, dw: None }
    }
}

/// a [m, k] times b [k, n], accumulated in f32, result f32.
fn product_f32(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.kind() == Kind::Float {
        return Ok(a.f_mm(b)?);
    }
    if a.device() == Device::Cpu {
        // The CPU's bf16 product would round its result; numerics.md wants the unrounded f32 sum.
        return Ok(a.f_to_kind(Kind::Float)?.f_mm(&b.f_to_kind(Kind::Float)?)?);
    }
    Ok(a.f_mm_dtype(b, Kind::Float)?)
}

/// Products over at most so many rows on a GPU take as long as their launches.
const FEW_ROWS: i64 = 128;

/// Whether a forward product of x [tokens, in] has a kernel of ours for few rows, and as few.
pub fn has_few_rows(x: &Tensor) -> bool {
    Place::of(x).is_some() && x.kind() == Kind::BFloat16 && x.size()[0] <= FEW_ROWS
}

/// Where the error of a product is added up on the device; None: it has none, or nobody asks.
fn device_sums(executor: &dyn Executor, draw: &Option<ErrorDraw>, sink: Option<&SumsSink>) -> Result<Option<Tensor>> {
    sink.filter(|_| draw.is_some()).map(|sink| sink.device_sums(executor.device())).transpose()
}

/// The product and its error in one launch of our kernel; whether there is one for it. A product without error is the library's,
/// but where ours keeps step, on a Hopper and over few rows: the library's f32 result would be read again to be rounded or added.
fn own_product(
    place: &Place,
    layout: Layout,
    (a, b): (&Tensor, &Tensor),
    into: Destination,
    bias: Option<&Tensor>,
    (draw, sink): (&Option<ErrorDraw>, Option<&SumsSink>),
    keys: &RowKeys,
) -> Result<bool> {
    let (a, b) = (a.f_contiguous()?, b.f_contiguous()?);
    let product = Product { layout, a: &a, b: &b, scales: None, into, bias, error: draw.as_ref(), keys, sums: None };
    let is_whole = matches!(into, Destination::Store(out) if out.kind() == Kind::Float);
    let is_short = layout == Layout::Nt && has_few_rows(&a);
    if draw.is_none() && (is_whole || !is_short && !product.is_for_hopper(place)?) {
        return Ok(false);
    }
    let sums = device_sums(place, draw, sink)?;
    matmul(place, &Product { sums: sums.as_ref(), ..product })?;
    Ok(true)
}

/// The forward product with its error. No gradient.
pub fn forward(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    call: &NoisyLinearCall,
    record: bool,
    out_kind: Kind,
) -> Result<Tensor> {
    let sink = call.forward.sink.as_ref().filter(|_| record);
    if let Some(place) = Place::of(x) {
        let out = Tensor::f_empty([x.size()[0], weight.size()[0]], (out_kind, x.device()))?;
        let (into, error) = (Destination::Store(&out), (&call.forward.draw, sink));
        if own_product(&place, Layout::Nt, (x, weight), into, bias, error, &call.keys)? {
            return Ok(out);
        }
    }
    let y = product_f32(x, &weight.f_transpose(0, 1)?)?;
    finish_product(y, bias, call.forward.draw.as_ref(), &call.keys, sink, out_kind)
}

/// The weight of a product: [out, in], or the same numbers held packed.
pub enum Weight {
    Dense(Tensor),
    Packed(Rc<PackedWeight>),
}

impl Weight {
    pub fn out_features(&self) -> i64 {
        match self {
            Weight::Dense(weight) => weight.size()[0],
            Weight::Packed(packed) => packed.codes.size()[0],
        }
    }
}

/// One of several forward products.
pub struct Part<'a> {
    pub x: Tensor,
    pub weight: Weight,
    pub bias: Option<&'a Tensor>,
    pub call: NoisyLinearCall,
}

/// [`forward`] of several in bf16 on a GPU, in one launch where there is a kernel for them. No gradient.
///
/// # Errors
/// As `ops::cuda::matmul::matmul`.
pub fn forward_together(parts: &[Part]) -> Result<Vec<Tensor>> {
    let missing = || Error::Runtime("noisy_linear: several products at once are a GPU's".into());
    let place = parts.first().and_then(|part| Place::of(&part.x)).ok_or_else(missing)?;
    let xs = parts.iter().map(|part| Ok(part.x.f_contiguous()?)).collect::<Result<Vec<Tensor>>>()?;
    let errors = parts.iter().map(|part| &part.call.forward);
    let sums = errors.map(|error| device_sums(&place, &error.draw, error.sink.as_ref())).collect::<Result<Vec<_>>>()?;
    let out = xs
        .iter()
        .zip(parts)
        .map(|(x, part)| Ok(Tensor::f_empty([x.size()[0], part.weight.out_features()], (x.kind(), x.device()))?));
    let out = out.collect::<Result<Vec<Tensor>>>()?;
    let products = parts.iter().enumerate().map(|(i, part)| {
        let (layout, b, scales) = match &part.weight {
            Weight::Dense(weight) => (Layout::Nt, weight, None),
            Weight::Packed(packed) => (packed.layout, &packed.codes, Some(packed.scales())),
        };
        Product {
            layout,
            a: &xs[i],
            b,
            scales,
            into: Destination::Store(&out[i]),
            bias: part.bias,
            error: part.call.forward.draw.as_ref(),
            keys: &part.call.keys,
            sums: sums[i].as_ref(),
        }
    });
    matmul_together(&place, &products.collect::<Vec<_>>())?;
    Ok(out)
}

/// dX = law(dY W) in the dtype of `weight`. No gradient.
pub fn backward_dx(dy: &Tensor, weight: &Tensor, call: &NoisyLinearCall) -> Result<Tensor> {
    let error = &call.dx;
    if let Some(place) = Place::of(dy) {
        let out = Tensor::f_empty([dy.size()[0], weight.size()[1]], (weight.kind(), dy.device()))?;
        let (into, error) = (Destination::Store(&out), (&error.draw, error.sink.as_ref()));
        if own_product(&place, Layout::Nn, (dy, weight), into, None, error, &call.keys)? {
            return Ok(out);
        }
    }
    let dx = product_f32(dy, weight)?;
    finish_product(dx, None, error.draw.as_ref(), &call.keys, error.sink.as_ref(), weight.kind())
}

/// into += law(dY^T x); `into` f32 [out, in]. No gradient.
pub fn accumulate_dw(dy: &Tensor, x: &Tensor, call: &NoisyLinearCall, into: &mut Tensor) -> Result<()> {
    if let Some(place) = Place::of(dy) {
        let (error, keys) = match &call.dw {
            Some(WeightGradientError { error, keys }) => ((&error.draw, error.sink.as_ref()), keys),
            None => ((&None, None), &call.keys),
        };
        if !own_product(&place, Layout::Tn, (dy, x), Destination::Add(into), None, error, keys)? {
            let _ = into.f_add_(&product_f32(&dy.f_transpose(0, 1)?, x)?)?;
        }
        return Ok(());
    }
    let dy = dy.f_transpose(0, 1)?;
    let (dy, x) = (dy.f_to_kind(Kind::Float)?, x.f_to_kind(Kind::Float)?);
    match &call.dw {
        Some(WeightGradientError { error: ProductError { draw: Some(draw), sink }, keys }) => {
            accumulate_noisy(&dy, &x, draw, keys, sink.as_ref(), into)
        }
        // Without an error of its own the product needs no place of its own.
        _ => into.f_addmm_(&dy, &x).map(drop).map_err(Error::from),
    }
}

/// into += law(a b) on the CPU, by rows: the error enters while the product of some rows is still in the caches.
fn accumulate_noisy(
    a: &Tensor,
    b: &Tensor,
    draw: &ErrorDraw,
    keys: &RowKeys,
    sink: Option<&SumsSink>,
    into: &mut Tensor,
) -> Result<()> {
    const BLOCK_BYTES: i64 = 8 << 20;
    let ((rows, _), (_, cols)) = (a.size2()?, b.size2()?);
    if rows as usize != keys.len() {
        return Err(Error::Runtime(format!("{} row keys for {rows} rows", keys.len())));
    }
    let block_rows = (BLOCK_BYTES / (4 * cols.max(1))).clamp(64, rows.max(64));
    let buffer = Tensor::f_empty([block_rows, cols], (Kind::Float, Device::Cpu))?;
    let mut sums = NoiseSums::default();
    for start in (0..rows).step_by(block_rows as usize) {
        let len = block_rows.min(rows - start);
        let product = buffer.f_narrow(0, 0, len)?;
        let _ = a.f_narrow(0, start, len)?.f_mm_out(&product, b)?;
        let keys = &keys.host()[start as usize..][..len as usize];
        sums.merge(&accumulate_rows(&product, draw, keys, &mut into.f_narrow(0, start, len)?)?);
    }
    if let Some(sink) = sink {
        sink.add(&sums);
    }
    Ok(())
}

struct NoisyLinearBackward {
    call: NoisyLinearCall,
    gradient: Option<Tensor>, // f32 [out, in], shared with the parameter
    has_bias: bool,
}

impl Backward for NoisyLinearBackward {
    fn backward(&self, saved: &[Tensor], grads: &[Option<Tensor>], needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let mut result = vec![None, None];
        if self.has_bias {
            result.push(None);
        }
        let (Some(dy), Some(weight)) = (&grads[0], saved.first()) else {
            return Ok(result);
        };
        let dy = dy.f_contiguous()?.f_to_kind(weight.kind())?;
        if needs[0] {
            result[0] = Some(backward_dx(&dy, weight, &self.call)?);
        }
        if let (Some(gradient), Some(x)) = (&self.gradient, saved.get(1)) {
            accumulate_dw(&dy, x, &self.call, &mut gradient.shallow_clone())?;
        }
        if self.has_bias && needs[2] {
            result[2] = Some(dy.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Float)?);
        }
        Ok(result)
    }
}

/// The differentiable operation. `anchor`: the weight's f32 master (a leaf), so that the graph knows that the weight
/// wants a gradient; `gradient`: its f32 buffer. Both None for a frozen weight.
pub fn noisy_linear(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    anchor: Option<(&Tensor, &Tensor)>,
    call: &NoisyLinearCall,
) -> Result<Tensor> {
    let out = tch::no_grad(|| forward(x, weight, bias, call, true, x.kind()))?;
    let mut inputs = vec![x, anchor.map_or(weight, |(master, _)| master)];
    inputs.extend(bias);
    if !call.differentiable || inputs.iter().all(|t| !t.requires_grad()) {
        return Ok(out);
    }
    let operation = NoisyLinearBackward {
        call: call.clone(),
        gradient: anchor.map(|(_, gradient)| gradient.shallow_clone()),
        has_bias: bias.is_some(),
    };
    // A frozen weight has no dW, which alone reads x.
    let (weight, x) = (weight.detach(), x.detach());
    let saved: &[&Tensor] = if operation.gradient.is_some() { &[&weight, &x] } else { &[&weight] };
    let outputs = attach(&inputs, saved, &[&out], operation)?;
    Ok(outputs.into_iter().next().unwrap_or(out))
}
