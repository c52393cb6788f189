//! A linear layer under the injection plan: fake-quantized weight and input, AQN on the weight, noisy products.

use std::cell::RefCell;
use std::rc::Rc;

use tch::{Kind, Tensor};

use super::linear_input::LinearInput;
use super::lora::Adapter;
use super::parameter::Parameter;
use super::pass::Pass;
use crate::numerics::noise_key::Phase;
use crate::ops::cuda::matmul::PackedWeight;
use crate::ops::noisy_linear::{self, NoisyLinearCall, Part, Weight, has_few_rows, noisy_linear};
use crate::ops::token_logprobs::{TokenLogprobs, token_logprobs};
use crate::{Error, Result};

/// A product over at most so many rows reads a packed weight: it takes as long as the weight takes to arrive. With noise, on an
/// H200, MXFP4 takes .86 of bf16's time at 8 rows and 1.17 at 64 (NVFP4 1.0 and 1.7;
/// bench/results/2026-11-26-h200-kernels.json).
const PACKED_ROWS: i64 = 16;

fn as_many<T, const N: usize>(items: Vec<T>) -> Result<[T; N]> {
    items.try_into().map_err(|_| Error::Runtime(format!("linear: expected {N} products")))
}

/// One place of the module list whose product the plan may touch, and what is derived from its weight.
pub struct Site {
    pub index: u32, // position in the model's module list
    quantized: RefCell<Option<Tensor>>,
    packed: RefCell<Option<Rc<PackedWeight>>>, // Q(w) as codes, on a GPU
    aqn_weight: RefCell<Option<Tensor>>,
}

impl Site {
    fn new(index: u32) -> Site {
        Site { index, quantized: RefCell::new(None), packed: RefCell::new(None), aqn_weight: RefCell::new(None) }
    }

    /// Sets or removes the noised weight that the phases under AQN use.
    pub fn set_aqn(&self, weight: Option<Tensor>) {
        *self.aqn_weight.borrow_mut() = weight;
    }

    /// Drops what was derived from the weight; call after every change of it.
    pub fn invalidate(&self) {
        *self.quantized.borrow_mut() = None;
        *self.packed.borrow_mut() = None;
    }

    /// Q(w), as [`quantize_weights`](super::quantized::quantize_weights) made it.
    pub fn set_quantized(&self, weight: Tensor) {
        *self.quantized.borrow_mut() = Some(weight);
    }

    /// The same numbers as codes and scales.
    pub fn set_packed(&self, weight: PackedWeight) {
        *self.packed.borrow_mut() = Some(Rc::new(weight));
    }

    /// Q(w) where it has been made since the weight last changed, else w.
    pub fn quantized(&self, weight: &Parameter) -> Tensor {
        self.quantized.borrow().as_ref().unwrap_or(weight.value()).shallow_clone()
    }

    pub fn is_quantized(&self) -> bool {
        self.quantized.borrow().is_some()
    }

    /// The weight that the product of this pass uses.
    fn weight(&self, weight: &Parameter, pass: &Pass) -> Tensor {
        let Some(injector) = pass.injector else {
            return weight.value().shallow_clone();
        };
        if injector.aqn_applies(pass.phase)
            && let Some(noised) = self.aqn_weight.borrow().as_ref()
        {
            return noised.shallow_clone();
        }
        if pass.fake_quant && injector.quantizes(pass.phase) {
            return self.quantized(weight);
        }
        weight.value().shallow_clone()
    }

    /// Q(w) packed, where the product of this pass over `rows` reads it so: few rows, which wait for the weight, and no
    /// gradient; not where AQN's weight stands in its place.
    fn packed(&self, pass: &Pass, rows: i64) -> Option<Rc<PackedWeight>> {
        let injector = pass.injector.filter(|injector| pass.fake_quant && injector.quantizes(pass.phase))?;
        let noised = injector.aqn_applies(pass.phase) && self.aqn_weight.borrow().is_some();
        if pass.is_trained() || noised || rows > PACKED_ROWS {
            return None;
        }
        self.packed.borrow().clone()
    }

    fn call(&self, pass: &Pass, out_features: usize) -> NoisyLinearCall {
        match pass.injector {
            Some(injector) if pass.matmul_error => {
                let mut call = injector.linear_call(
                    self.index,
                    pass.phase,
                    &pass.keys,
                    pass.differentiable,
                    pass.microbatch_draw,
                    out_features,
                );
                if pass.recomputing {
                    call.forward.sink = None;
                }
                call
            }
            _ => NoisyLinearCall::clean(pass.keys.clone(), pass.differentiable),
        }
    }
}

pub struct Linear {
    pub site: Site,
    pub weight: Parameter,       // [out, in]
    pub bias: Option<Parameter>, // [out] f32
    pub adapter: Option<Box<Adapter>>,
}

impl Linear {
    pub fn new(index: u32, weight: Parameter, bias: Option<Parameter>) -> Linear {
        Linear { site: Site::new(index), weight, bias, adapter: None }
    }

    /// Whether it is a linear of this name, such as `q_proj`, in some layer.
    pub fn is(&self, name: &str) -> bool {
        self.weight.name.strip_suffix(".weight").is_some_and(|module| module.rsplit('.').next() == Some(name))
    }

    /// x [tokens, in] -> [tokens, out].
    pub fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.forward_shared(&LinearInput::new(x), pass)
    }

    /// As [`Linear::forward`], of what another linear may have read.
    pub fn forward_shared(&self, input: &LinearInput, pass: &Pass) -> Result<Tensor> {
        self.adapted(self.product(&self.part(input, pass)?)?, input, pass)
    }

    /// Of several linears, each with its input, of the same rows. Of few rows on a GPU their products are one launch, and so are
    /// those of their adapters.
    pub fn forward_each<const N: usize>(
        linears: [&Linear; N],
        inputs: [&LinearInput; N],
        pass: &Pass,
    ) -> Result<[Tensor; N]> {
        let all = || linears.iter().zip(inputs);
        if pass.is_trained() || !inputs.iter().all(|input| has_few_rows(input.x())) {
            return as_many(all().map(|(linear, input)| linear.forward_shared(input, pass)).collect::<Result<_>>()?);
        }
        let parts = all().map(|(linear, input)| linear.part(input, pass)).collect::<Result<Vec<Part>>>()?;
        let products = noisy_linear::forward_together(&parts)?;
        let adapters: Option<Vec<&Adapter>> = linears.iter().map(|linear| linear.active_adapter(pass)).collect();
        let outputs: Result<Vec<Tensor>> = match adapters {
            Some(adapters) => {
                let added = Adapter::forward_each(as_many(adapters)?, inputs, pass)?;
                products.iter().zip(added).map(|(y, added)| Ok(y.f_add(&added)?)).collect()
            }
            None => all().zip(products).map(|((linear, input), y)| linear.adapted(y, input, pass)).collect(),
        };
        as_many(outputs?)
    }

    fn part(&self, input: &LinearInput, pass: &Pass) -> Result<Part<'_>> {
        let x = input.read(self.site.index, pass)?;
        let weight = match self.site.packed(pass, x.size()[0]) {
            Some(packed) => Weight::Packed(packed),
            None => Weight::Dense(self.site.weight(&self.weight, pass)),
        };
        let call = self.site.call(pass, weight.out_features() as usize);
        Ok(Part { x, weight, bias: self.bias.as_ref().map(Parameter::leaf), call })
    }

    fn product(&self, part: &Part) -> Result<Tensor> {
        match &part.weight {
            Weight::Dense(weight) => noisy_linear(&part.x, weight, part.bias, self.weight.anchor(), &part.call),
            Weight::Packed(_) => {
                let mut y = noisy_linear::forward_together(std::slice::from_ref(part))?;
                y.pop().ok_or_else(|| Error::Runtime("packed linear: no product".into()))
            }
        }
    }

    /// With what the adapter adds.
    fn adapted(&self, y: Tensor, input: &LinearInput, pass: &Pass) -> Result<Tensor> {
        match self.active_adapter(pass) {
            Some(adapter) => Ok(y.f_add(&adapter.forward(input, pass)?)?),
            None => Ok(y),
        }
    }

    fn active_adapter(&self, pass: &Pass) -> Option<&Adapter> {
        self.adapter.as_deref().filter(|_| pass.phase != Phase::RefLogprobs)
    }
}

/// The language-model head: a linear without bias whose weight may be the embedding's, so it is passed in.
pub struct Head {
    pub site: Site,
    /// A tied head under matmul error keeps its dW apart: the embedding's share of the buffer carries no error.
    own_gradient: RefCell<Option<Tensor>>,
}

impl Head {
    pub fn new(index: u32) -> Head {
        Head { site: Site::new(index), own_gradient: RefCell::new(None) }
    }

    /// hidden [tokens, hidden] -> f32 logits [tokens, vocab]. No gradient.
    pub fn logits(&self, weight: &Parameter, hidden: &Tensor, pass: &Pass) -> Result<Tensor> {
        let w = self.site.weight(weight, pass);
        let call = self.site.call(pass, w.size()[0] as usize);
        let hidden = LinearInput::new(hidden).read(self.site.index, pass)?;
        noisy_linear::forward(&hidden, &w, None, &call, true, Kind::Float)
    }

    /// Log-probability and entropy of `targets` i64 [tokens], differentiable where the pass is.
    pub fn token_logprobs(
        &self,
        weight: &Parameter,
        hidden: &Tensor,
        targets: &Tensor,
        temperature: f64,
        pass: &Pass,
    ) -> Result<TokenLogprobs> {
        let w = self.site.weight(weight, pass);
        let call = self.site.call(pass, w.size()[0] as usize);
        let mut own = self.own_gradient.borrow_mut();
        let anchor = match weight.anchor() {
            Some((master, shared)) if pass.differentiable && call.dx.draw.is_some() => {
                if own.is_none() {
                    *own = Some(shared.f_zeros_like()?);
                }
                Some((master, own.as_ref().unwrap_or(shared)))
            }
            anchor => anchor,
        };
        let hidden = LinearInput::new(hidden).read(self.site.index, pass)?;
        token_logprobs(&hidden, &w, anchor, targets, temperature, &call)
    }

    /// The head's own dW since the last call, if it is kept apart.
    pub fn take_own_gradient(&self) -> Option<Tensor> {
        self.own_gradient.borrow_mut().take()
    }
}
