//! W4A4 in the whole model, against Qwen2 in torch operations with torch's own autograd; and the same tokens' values in
//! other batches, with and without a KV cache.

use std::collections::HashMap;

use tch::{Kind, Tensor};
use temper::inject::injector::Injector;
use temper::inject::section::{ActivationScale, InjectPhase, NoisyOpsSection, PhaseSet};
use temper::model::calibration::calibrate;
use temper::model::generate::{Prompt, Request, Sampling, generate};
use temper::model::logprobs::response_logprobs;
use temper::model::pass::{Pass, Sequence};
use temper::model::qwen2::{Module, Qwen2};
use temper::numerics::error_law::ErrorLaw;
use temper::numerics::noise_key::{Phase, Purpose, stream};
use temper::ops::autograd::run_backward;
use temper::ops::matmul_error::{ErrorDraw, RowKeys};

use crate::activations::{quantized_input, straight_through, w4a4};
use crate::backward::with_error;
use crate::support::{SEED, bits, floats, largest_difference, model, noise_everywhere, sequences, trainable};

/// The model's values as leaves of torch's graph, and Q(w) of every linear.
struct Reference<'a> {
    model: &'a Qwen2,
    leaves: HashMap<String, Tensor>,
    quantized: HashMap<u32, Tensor>,
    format: &'a str,
    scale: ActivationScale,
    noisy: bool,
    keys: RowKeys,
}

impl<'a> Reference<'a> {
    fn new(
        model: &'a Qwen2,
        format: &'a str,
        scale: ActivationScale,
        noisy: bool,
        sequence: &Sequence,
    ) -> Reference<'a> {
        let leaf = |t: &Tensor| t.detach().copy().set_requires_grad(true);
        let leaves = model.parameters().iter().map(|p| (p.name.clone(), leaf(p.value()))).collect();
        let mut quantized = HashMap::new();
        for (index, module) in model.modules() {
            if let Module::Linear(site, weight) = module {
                assert!(site.is_quantized(), "{}", weight.name);
                quantized.insert(index, site.quantized(weight));
            }
        }
        let mut keys = sequence.keys().unwrap();
        keys.pop();
        Reference { model, leaves, quantized, format, scale, noisy, keys: RowKeys::new(keys) }
    }

    /// Q(x) Q(W)^T, the error a constant, then the bias.
    fn linear(&self, name: &str, x: &Tensor, keys: &RowKeys) -> Tensor {
        let index = self.model.config.modules().iter().position(|m| m.name == name).unwrap() as u32;
        let tied = if name == "lm_head" { "model.embed_tokens" } else { name };
        let weight = straight_through(&self.leaves[&format!("{tied}.weight")], &self.quantized[&index]);
        let input = straight_through(x, &quantized_input(x, index, keys, self.format, self.scale));
        let mut y = input.mm(&weight.tr());
        if self.noisy {
            let stream = stream(Purpose::MatmulForward, Phase::Update, 0, index).unwrap();
            let draw = ErrorDraw { law: ErrorLaw::RelativeGaussian, scale: 0.05, seed: SEED, stream };
            let values = with_error(&floats(&y), y.size()[1] as usize, &draw, keys);
            y = straight_through(&y, &Tensor::from_slice(&values).view_as(&y));
        }
        match self.leaves.get(&format!("{name}.bias")) {
            Some(bias) => y + bias,
            None => y,
        }
    }

    fn norm(&self, name: &str, x: &Tensor) -> Tensor {
        let mean_square = x.square().mean_dim([-1i64].as_slice(), true, Kind::Float);
        x * (mean_square + self.model.config.rms_norm_eps).rsqrt() * &self.leaves[&format!("{name}.weight")]
    }

    /// x [tokens, heads, dim] rotated by its position.
    fn rotated(&self, x: &Tensor) -> Tensor {
        let (tokens, dim) = (x.size()[0], x.size()[2]);
        let exponent = Tensor::arange_start_step(0, dim, 2, (Kind::Float, x.device())) / dim as f64;
        let frequency =
            Tensor::full([1], self.model.config.rope_theta, (Kind::Float, x.device())).pow(&exponent).reciprocal();
        let angle = Tensor::arange(tokens, (Kind::Float, x.device())).unsqueeze(1) * frequency;
        let angle = Tensor::cat(&[&angle, &angle], 1).unsqueeze(1);
        let halves = x.chunk(2, -1);
        x * angle.cos() + Tensor::cat(&[&-&halves[1], &halves[0]], -1) * angle.sin()
    }

    /// Log-probabilities of the response.
    fn logprobs(&self, sequence: &Sequence) -> Tensor {
        let config = &self.model.config;
        let (heads, kv_heads, dim) =
            (config.num_attention_heads as i64, config.num_key_value_heads as i64, config.head_dim as i64);
        let ids: Vec<i64> = sequence.ids.iter().map(|&id| i64::from(id)).collect();
        let tokens = ids.len() as i64 - 1;
        let mut x =
            self.leaves["model.embed_tokens.weight"].index_select(0, &Tensor::from_slice(&ids[..ids.len() - 1]));
        for layer in 0..config.num_hidden_layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let linear = |part: &str, x: &Tensor| self.linear(&name(part), x, &self.keys);
            let normed = self.norm(&name("input_layernorm"), &x);
            let split = |y: Tensor, heads: i64| y.view([tokens, heads, dim]);
            let q = self.rotated(&split(linear("self_attn.q_proj", &normed), heads));
            let k = self.rotated(&split(linear("self_attn.k_proj", &normed), kv_heads));
            let v = split(linear("self_attn.v_proj", &normed), kv_heads);
            let batch =
                |t: Tensor| t.repeat_interleave_self_int(heads / t.size()[1], 1, None).transpose(0, 1).unsqueeze(0);
            let scale = 1.0 / (dim as f64).sqrt();
            let mixed = Tensor::scaled_dot_product_attention(
                &batch(q),
                &batch(k),
                &batch(v),
                None::<&Tensor>,
                0.0,
                true,
                scale,
                false,
            );
            let mixed = mixed.squeeze_dim(0).transpose(0, 1).reshape([tokens, heads * dim]);
            x = x.g_add(&linear("self_attn.o_proj", &mixed));
            let normed = self.norm(&name("post_attention_layernorm"), &x);
            let gated = linear("mlp.gate_proj", &normed).silu() * linear("mlp.up_proj", &normed);
            x = x.g_add(&linear("mlp.down_proj", &gated));
        }
        let first = sequence.prompt_len as i64 - 1;
        let predicting: Vec<usize> = (first as usize..tokens as usize).collect();
        let hidden = self.norm("model.norm", &x.narrow(0, first, tokens - first));
        let logits = self.linear("lm_head", &hidden, &self.keys.select(&predicting));
        let targets = Tensor::from_slice(&ids[sequence.prompt_len..]).unsqueeze(1);
        logits.log_softmax(-1, Kind::Float).gather(1, &targets, false).squeeze_dim(1)
    }
}

#[test]
fn the_models_gradients_are_the_plain_straight_through_ones() {
    let sequence = &sequences()[3];
    for (format, scale) in [
        ("mxfp4", ActivationScale::Token),
        ("nvfp4", ActivationScale::Token),
        ("nvfp4", ActivationScale::Static),
        ("nvfp4:sr", ActivationScale::Token),
    ] {
        for noisy in [false, true] {
            let model = trainable(model(true));
            let phases = PhaseSet::of(&[InjectPhase::Forward]);
            let injector =
                w4a4(&model, format, scale, &NoisyOpsSection { enabled: noisy, phases, ..noise_everywhere() });
            let pass = Pass { differentiable: true, ..Pass::injected(&injector, Phase::Update, RowKeys::new(vec![])) };
            let got = response_logprobs(&model, &[sequence], 1.0, &pass).unwrap().logprobs;
            run_backward(&got.sum(Kind::Float).neg()).unwrap();

            let reference = Reference::new(&model, format, scale, noisy, sequence);
            let want = reference.logprobs(sequence);
            want.sum(Kind::Float).neg().backward();
            let difference = largest_difference(&floats(&got), &floats(&want));
            assert!(difference <= 1e-5, "{format} {scale:?} {noisy}: {difference}");
            for parameter in model.parameters() {
                let (got, want) =
                    (floats(&parameter.gradient().unwrap()), floats(&reference.leaves[&parameter.name].grad()));
                let largest = want.iter().fold(0f32, |m, v| m.max(v.abs()));
                let difference = largest_difference(&got, &want);
                let name = &parameter.name;
                assert!(difference <= 1e-5 * largest, "{name}: {difference} of {largest}: {format} {scale:?} {noisy}");
                assert!(largest > 0.0 || name.ends_with("k_proj.bias"), "{name}");
            }
        }
    }
}

/// The share of values that agree to 1e-5: products of other shapes sum in another order, and where that moves a value
/// across a rounding boundary of the format, the token and those after it differ visibly.
fn agreeing(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).filter(|(a, b)| (*a - *b).abs() <= 1e-5).count() as f64 / a.len() as f64
}

#[test]
fn batch_split_and_cache_do_not_matter() {
    let model = model(true);
    let all = sequences();
    for format in ["mxfp4", "nvfp4"] {
        let injector = w4a4(&model, format, ActivationScale::Token, &noise_everywhere());
        let pass = || Pass::injected(&injector, Phase::Update, RowKeys::new(vec![]));
        let of = |some: &[&Sequence]| floats(&response_logprobs(&model, some, 1.0, &pass()).unwrap().logprobs);
        let together = of(&all.iter().collect::<Vec<_>>());
        let alone: Vec<f32> = all.iter().flat_map(|s| of(&[s])).collect();
        let pairs: Vec<f32> = all.chunks(2).flat_map(|pair| of(&pair.iter().collect::<Vec<_>>())).collect();
        assert!(agreeing(&together, &alone) > 0.8, "{format}: {}", agreeing(&together, &alone));
        assert!(agreeing(&together, &pairs) > 0.8, "{format}: {}", agreeing(&together, &pairs));

        let completions = |kv_cache| completions(&model, &injector, &all, kv_cache);
        let (cached, recomputed) = (completions(true), completions(false));
        let same = cached.iter().zip(&recomputed).filter(|(a, b)| a.0 == b.0).count();
        assert!(same * 5 >= cached.len() * 4, "{format}: {same} of {} completions", cached.len());
        for ((ids, a), (other, b)) in cached.iter().zip(&recomputed).filter(|(a, b)| a.0 == b.0) {
            assert_eq!(ids, other);
            assert!(agreeing(a, b) > 0.5, "{format}: {a:?} {b:?}");
        }
    }
}

/// Greedy continuations of every first member's prompt.
fn completions(model: &Qwen2, injector: &Injector, all: &[Sequence], kv_cache: bool) -> Vec<(Vec<u32>, Vec<f32>)> {
    let of = |s: &Sequence| Prompt { uid: s.uid, ids: s.ids[..s.prompt_len].to_vec() };
    let prompts: Vec<Prompt> = all.iter().map(of).collect();
    let sampling = Sampling::greedy();
    let request = Request {
        prompts: &prompts,
        group_size: 1,
        max_new_tokens: 8,
        limits: None,
        stop_ids: &[],
        sampling: &sampling,
        kv_cache,
    };
    let pass = Pass::injected(injector, Phase::Rollout, RowKeys::new(vec![]));
    let done = generate(model, &request, &pass, |_| {}).unwrap();
    done.into_iter().map(|c| (c.sequence.ids, c.logprobs)).collect()
}

/// A is the largest magnitude of each linear's input over the prompts, found here layer by layer by hand.
#[test]
fn calibration_finds_the_largest_input() {
    let model = model(true);
    let injector = w4a4(&model, "nvfp4", ActivationScale::Static, &NoisyOpsSection::default());
    let all = sequences();
    let prompts: Vec<&[u32]> = all.iter().map(|s| &s.ids[..s.prompt_len]).collect();
    let amax = calibrate(&model, injector.plan(), &prompts).unwrap();
    let linears = model.modules().iter().filter(|(_, m)| matches!(m, Module::Linear(..))).count();
    assert_eq!(amax.len(), linears, "every linear, the head included");
    // The first layer's q, k and v read the normed embedding.
    let mut largest = 0f32;
    for ids in &prompts {
        let ids: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
        let x = model.embed_tokens.value().index_select(0, &Tensor::from_slice(&ids));
        let normed = model.blocks[0].input_layernorm.forward(&x, &Pass::clean(RowKeys::new(vec![]))).unwrap();
        largest = floats(&normed).iter().fold(largest, |m, v| m.max(v.abs()));
    }
    for index in 2..=4 {
        assert_eq!(amax[&index].to_bits(), largest.to_bits());
    }
    // One prompt after another is the same as all at once, but for the order of sums.
    let mut one_by_one = calibrate(&model, injector.plan(), &prompts[..1]).unwrap();
    for prompt in &prompts[1..] {
        for (index, found) in calibrate(&model, injector.plan(), &[prompt]).unwrap() {
            let kept = one_by_one.get_mut(&index).unwrap();
            *kept = kept.max(found);
        }
    }
    for (index, found) in &amax {
        assert!((one_by_one[index] / found - 1.0).abs() < 1e-5, "module {index}");
    }
    // Tokens need none; nor do formats without a tensor scale.
    for (format, scale) in [("nvfp4", ActivationScale::Token), ("mxfp4", ActivationScale::Token)] {
        let injector = w4a4(&model, format, scale, &NoisyOpsSection::default());
        assert!(calibrate(&model, injector.plan(), &prompts).unwrap().is_empty());
    }
    assert_ne!(bits(&[largest]), bits(&[0.0]));
}
