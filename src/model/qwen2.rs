//! Qwen2: token ids in, hidden states out; every linear and norm goes through the injection plan.
//!
//! Rows are flattened tokens [tokens] of several sequences, without padding; hidden states [tokens, hidden].

use tch::{Device, Kind, Tensor};

use super::attention::{Attend, Attention, Rotary};
use super::config::Qwen2Config;
use super::linear::{Head, Linear, Site};
use super::linear_input::LinearInput;
use super::lora::{self, Lora};
use super::norm::RmsNorm;
use super::parameter::{Parameter, Role};
use super::pass::Pass;
use super::quantized::quantize_weights;
use crate::Result;
use crate::inject::plan::ModuleSpec;
use crate::ops::autograd::exact_products;
use crate::ops::embedding::embedding;
use crate::ops::swiglu::swiglu;

pub struct Mlp {
    pub gate_proj: Linear,
    pub up_proj: Linear,
    pub down_proj: Linear,
}

impl Mlp {
    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let input = LinearInput::new(x);
        let [gate, up] = Linear::forward_each([&self.gate_proj, &self.up_proj], [&input; 2], pass)?;
        self.down_proj.forward(&swiglu(&gate, &up)?, pass)
    }
}

pub struct Block {
    pub input_layernorm: RmsNorm,
    pub attention: Attention,
    pub post_attention_layernorm: RmsNorm,
    pub mlp: Mlp,
}

pub struct Qwen2 {
    pub config: Qwen2Config,
    pub embed_tokens: Parameter, // [vocab, hidden]
    pub blocks: Vec<Block>,
    pub norm: RmsNorm,
    pub lm_head: Option<Parameter>, // [vocab, hidden]; None: tied to embed_tokens
    pub head: Head,
    /// Set where linears have adapters.
    pub lora: Option<Lora>,
    device: Device,
    kind: Kind,
    update_number: u32,
}

/// A residual stream x + delta [tokens, hidden], or x: the norm that reads it adds, to the same bits. Gradients are those of a
/// sum that was made: a block that is computed again begins with one.
struct Stream {
    x: Tensor,
    delta: Option<Tensor>,
}

impl Stream {
    fn sum(self) -> Result<Tensor> {
        match self.delta {
            Some(delta) => Ok(self.x.f_add(&delta)?),
            None => Ok(self.x),
        }
    }
}

/// A module of the plan that computes: where AQN and quantization reach it.
pub enum Module<'a> {
    Norm(&'a RmsNorm),
    Linear(&'a Site, &'a Parameter),
}

impl Qwen2 {
    /// Builds the model; `tensor(name, shape)` gives each weight by its Hugging Face name.
    pub fn build(
        config: Qwen2Config,
        device: Device,
        kind: Kind,
        mut tensor: impl FnMut(&str, &[usize]) -> Result<Tensor>,
    ) -> Result<Qwen2> {
        exact_products();
        let mut parameters: std::collections::HashMap<String, Parameter> = Default::default();
        for (name, shape) in config.parameter_shapes() {
            let role = if shape.len() == 1 { Role::Vector } else { Role::Matrix };
            let value = tensor(&name, &shape)?.f_to_device(device)?;
            parameters.insert(name.clone(), Parameter::frozen(&name, role, value, kind)?);
        }
        let mut index = 0u32;
        let mut next = || {
            index += 1;
            index
        };
        let mut take = |name: String| {
            parameters
                .remove(&name)
                .ok_or_else(|| crate::Error::Runtime(format!("{name}: not among the model's parameters")))
        };
        let embed_tokens = take("model.embed_tokens.weight".into())?;
        let eps = config.rms_norm_eps;
        let mut blocks = Vec::with_capacity(config.num_hidden_layers);
        for layer in 0..config.num_hidden_layers {
            let prefix = format!("model.layers.{layer}");
            let mut linear = |name: &str, bias: bool| -> Result<Linear> {
                let weight = take(format!("{prefix}.{name}.weight"))?;
                let bias = bias.then(|| take(format!("{prefix}.{name}.bias"))).transpose()?;
                Ok(Linear::new(next(), weight, bias))
            };
            // Construction order is the module list's order: the indices are part of the noise keys.
            let norm = |linear: &mut dyn FnMut(&str, bool) -> Result<Linear>, name: &str| -> Result<RmsNorm> {
                let Linear { site, weight, .. } = linear(name, false)?;
                Ok(RmsNorm::new(site.index, weight, eps))
            };
            let input_layernorm = norm(&mut linear, "input_layernorm")?;
            let attention = Attention {
                q_proj: linear("self_attn.q_proj", true)?,
                k_proj: linear("self_attn.k_proj", true)?,
                v_proj: linear("self_attn.v_proj", true)?,
                o_proj: linear("self_attn.o_proj", false)?,
            };
            let post_attention_layernorm = norm(&mut linear, "post_attention_layernorm")?;
            let mlp = Mlp {
                gate_proj: linear("mlp.gate_proj", false)?,
                up_proj: linear("mlp.up_proj", false)?,
                down_proj: linear("mlp.down_proj", false)?,
            };
            blocks.push(Block { input_layernorm, attention, post_attention_layernorm, mlp });
        }
        let norm = RmsNorm::new(next(), take("model.norm.weight".into())?, eps);
        let head = Head::new(next());
        let lm_head = (!config.tie_word_embeddings).then(|| take("lm_head.weight".into())).transpose()?;
        Ok(Qwen2 { config, embed_tokens, blocks, norm, lm_head, head, lora: None, device, kind, update_number: 0 })
    }

    pub fn device(&self) -> Device {
        self.device
    }

    /// Moves a frozen model.
    pub fn move_to(&mut self, device: Device) -> Result<()> {
        if device != self.device {
            self.parameters_mut().into_iter().try_for_each(|parameter| parameter.move_to(device))?;
            self.device = device;
            self.invalidate();
        }
        Ok(())
    }

    /// The dtype of the products' operands.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn head_weight(&self) -> &Parameter {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens)
    }

    /// ids, positions i64 [tokens] -> the residual stream after the last block, before the final norm.
    pub fn residual(&self, ids: &Tensor, positions: &Tensor, attend: &Attend, pass: &Pass) -> Result<Tensor> {
        if let Some(injector) = pass.injector
            && pass.fake_quant
            && injector.quantizes(pass.phase)
        {
            quantize_weights(self, injector)?;
        }
        let mut stream = Stream { x: self.embedded(ids, pass)?, delta: None };
        let rotary = Rotary::new(&self.config, positions)?;
        for layer in 0..self.blocks.len() {
            if pass.observer.is_none() && !pass.differentiable {
                stream = self.block_of(layer, stream, &rotary, attend, pass)?;
                continue;
            }
            let x = stream.sum()?;
            let y = self.block(layer, &x, &rotary, attend, pass)?;
            if let Some(observer) = pass.observer {
                observer.observe(layer, &x, &y)?;
            }
            stream = Stream { x: y, delta: None };
        }
        stream.sum()
    }

    /// What the first block reads: [tokens, hidden].
    pub fn embedded(&self, ids: &Tensor, pass: &Pass) -> Result<Tensor> {
        let x = embedding(ids, self.embed_tokens.value(), self.embed_tokens.anchor(), pass.differentiable)?;
        // Under a frozen embedding every block has a gradient to go back with all the same, as the plan counts them.
        Ok(if pass.differentiable && !x.requires_grad() { x.f_set_requires_grad(true)? } else { x })
    }

    /// The residual stream x [tokens, hidden] after block `layer`.
    pub fn block(&self, layer: usize, x: &Tensor, rotary: &Rotary, attend: &Attend, pass: &Pass) -> Result<Tensor> {
        self.block_of(layer, Stream { x: x.shallow_clone(), delta: None }, rotary, attend, pass)?.sum()
    }

    fn block_of(&self, layer: usize, stream: Stream, rotary: &Rotary, attend: &Attend, pass: &Pass) -> Result<Stream> {
        let block = &self.blocks[layer];
        // What has been read is let go: a pass without gradients may hold very many tokens.
        let (x, attention) = {
            let (x, normed) = block.input_layernorm.forward_after(&stream.x, stream.delta.as_ref(), pass)?;
            drop(stream);
            let attention = block.attention.forward(layer, &normed, &self.config, rotary, attend, pass)?;
            (x, attention)
        };
        let (x, normed) = block.post_attention_layernorm.forward_after(&x, Some(&attention), pass)?;
        drop(attention);
        Ok(Stream { x, delta: Some(block.mlp.forward(&normed, pass)?) })
    }

    /// Every parameter that the model itself has, once, in the order of the module list.
    pub fn base_parameters(&self) -> Vec<&Parameter> {
        let mut all = vec![&self.embed_tokens];
        for block in &self.blocks {
            all.push(&block.input_layernorm.weight);
            for linear in block.linears() {
                if std::ptr::eq(linear, &block.mlp.gate_proj) {
                    all.push(&block.post_attention_layernorm.weight);
                }
                all.push(&linear.weight);
                all.extend(&linear.bias);
            }
        }
        all.push(&self.norm.weight);
        all.extend(&self.lm_head);
        all
    }

    /// A and B of every adapter, in the order of the module list.
    pub fn adapters(&self) -> impl Iterator<Item = &Parameter> {
        self.adapter_linears().map(|linear| &linear.weight)
    }

    fn adapter_linears(&self) -> impl Iterator<Item = &Linear> {
        let linears = self.blocks.iter().flat_map(Block::linears);
        linears.filter_map(|linear| linear.adapter.as_deref()).flat_map(|adapter| [&adapter.a, &adapter.b])
    }

    /// Those of the model and of its adapters.
    pub fn parameters(&self) -> Vec<&Parameter> {
        self.base_parameters().into_iter().chain(self.adapters()).collect()
    }

    /// Makes all parameters trainable, or where there are adapters those alone.
    pub fn make_trainable(&mut self) -> Result<()> {
        if self.lora.is_none() {
            return self.parameters_mut().into_iter().try_for_each(Parameter::make_trainable);
        }
        let adapters = self.linears_mut().filter_map(|linear| linear.adapter.as_deref_mut());
        let matrices = adapters.flat_map(|adapter| [&mut adapter.a.weight, &mut adapter.b.weight]);
        matrices.into_iter().try_for_each(Parameter::make_trainable)
    }

    /// The modules that the plan counts: the model's, then its adapters'.
    pub fn module_specs(&self) -> Vec<ModuleSpec> {
        lora::all_modules(&self.config, self.lora.as_ref().map(|lora| &lora.section))
    }

    /// The linears of all blocks in the order of the module list.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.blocks.iter_mut().flat_map(|block| linears_of(&mut block.attention, &mut block.mlp))
    }

    /// As [`Qwen2::parameters`], writable, in another order. Call [`Qwen2::invalidate`] after changing values.
    pub fn parameters_mut(&mut self) -> Vec<&mut Parameter> {
        let mut all = vec![&mut self.embed_tokens];
        for block in &mut self.blocks {
            let Block { input_layernorm, attention, post_attention_layernorm, mlp } = block;
            all.extend([&mut input_layernorm.weight, &mut post_attention_layernorm.weight]);
            for linear in linears_of(attention, mlp) {
                all.push(&mut linear.weight);
                all.extend(&mut linear.bias);
                if let Some(adapter) = linear.adapter.as_deref_mut() {
                    all.extend([&mut adapter.a.weight, &mut adapter.b.weight]);
                }
            }
        }
        all.push(&mut self.norm.weight);
        all.extend(&mut self.lm_head);
        all
    }

    /// Norms and linears with their module index, in the order of the module list.
    pub fn modules(&self) -> Vec<(u32, Module<'_>)> {
        let mut all = Vec::new();
        for block in &self.blocks {
            all.push((block.input_layernorm.index, Module::Norm(&block.input_layernorm)));
            for linear in block.linears() {
                if std::ptr::eq(linear, &block.mlp.gate_proj) {
                    let norm = &block.post_attention_layernorm;
                    all.push((norm.index, Module::Norm(norm)));
                }
                all.push((linear.site.index, Module::Linear(&linear.site, &linear.weight)));
            }
        }
        all.push((self.norm.index, Module::Norm(&self.norm)));
        all.push((self.head.site.index, Module::Linear(&self.head.site, self.head_weight())));
        all.extend(self.adapter_linears().map(|l| (l.site.index, Module::Linear(&l.site, &l.weight))));
        all
    }

    /// Optimizer updates that the quantized weights have seen: part of the key of their stochastic rounding. 0 where frozen.
    pub fn update_number(&self) -> u32 {
        self.update_number
    }

    /// Counts an update. The quantized copies are dropped even if the weights stayed as they were (a skipped update):
    /// what they are may depend on the number alone, or a resumed run would differ. A base beside adapters counts none: it is
    /// quantized once.
    pub fn set_update_number(&mut self, updates: u32) {
        if self.lora.is_none() {
            self.update_number = updates;
            self.invalidate();
        }
    }

    /// Drops everything derived from the model's own weights (quantized copies).
    pub fn invalidate(&self) {
        for (_, module) in self.modules() {
            if let Module::Linear(site, _) = module {
                site.invalidate();
            }
        }
    }
}

impl Block {
    /// In the order of the module list.
    pub fn linears(&self) -> [&Linear; 7] {
        let (a, m) = (&self.attention, &self.mlp);
        [&a.q_proj, &a.k_proj, &a.v_proj, &a.o_proj, &m.gate_proj, &m.up_proj, &m.down_proj]
    }
}

/// In the order of the module list.
fn linears_of<'a>(attention: &'a mut Attention, mlp: &'a mut Mlp) -> [&'a mut Linear; 7] {
    let Attention { q_proj, k_proj, v_proj, o_proj } = attention;
    let Mlp { gate_proj, up_proj, down_proj } = mlp;
    [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
}
