//! The noisy linear layer against its formulas: dX' = law(dY W), dW' = law(dY^T x), exact bias gradient, every z from
//! the generator's definition; the straight-through gradient of a fake-quantized weight.

use tch::{Kind, Tensor};
use temper::inject::injector::Injector;
use temper::inject::plan::InjectionPlan;
use temper::inject::section::{FakeQuantSection, NoisyOpsSection};
use temper::model::logprobs::response_logprobs;
use temper::model::pass::{Pass, Sequence};
use temper::model::qwen2::{Module, Qwen2};
use temper::numerics::block_format::TensorScale;
use temper::numerics::error_law::ErrorLaw;
use temper::numerics::format::Format;
use temper::numerics::generator::normal;
use temper::numerics::noise_key::{Phase, Purpose, row_key, stream};
use temper::ops::autograd::run_backward;
use temper::ops::fake_quant::fake_quant;
use temper::ops::matmul_error::{ErrorDraw, RowKeys};
use temper::ops::noisy_linear::{NoisyLinearCall, ProductError, WeightGradientError, noisy_linear};
use temper::ops::token_logprobs::token_logprobs;

use crate::support::{SEED, bits, floats, injector_of, largest_difference, model, sequences, trainable, uniform};

const TOKENS: i64 = 5;
const IN: i64 = 20;
const OUT: i64 = 70;
const SCALE: f32 = 0.05;

fn token_keys() -> RowKeys {
    RowKeys::new((0..TOKENS as u64).map(|t| 7 << 48 | t << 26 | t).collect())
}

fn draw(purpose: Purpose, direction: u32) -> ErrorDraw {
    let stream = stream(purpose, Phase::Update, direction, 4).unwrap();
    ErrorDraw { law: ErrorLaw::RelativeGaussian, scale: SCALE, seed: SEED, stream }
}

fn error(purpose: Purpose, direction: u32) -> ProductError {
    ProductError { draw: Some(draw(purpose, direction)), sink: None }
}

fn dw_keys(number: u32) -> RowKeys {
    RowKeys::new((0..OUT as u32).map(|row| row_key(number, row)).collect())
}

/// All three products erroneous; dW per micro-batch with draw `number`.
fn noisy_call(number: u32) -> NoisyLinearCall {
    NoisyLinearCall {
        keys: token_keys(),
        differentiable: true,
        forward: error(Purpose::MatmulForward, 0),
        dx: error(Purpose::MatmulDx, 1),
        dw: Some(WeightGradientError { error: error(Purpose::MatmulDw, 2), keys: dw_keys(number) }),
    }
}

/// The definition, element by element: y [rows, cols] clean.
pub fn with_error(y: &[f32], cols: usize, draw: &ErrorDraw, keys: &RowKeys) -> Vec<f32> {
    let element = |(i, y): (usize, &f32)| {
        let z = normal(draw.seed, draw.stream, keys.host()[i / cols], (i % cols) as u32);
        y.abs().mul_add(draw.scale * z, *y)
    };
    y.iter().enumerate().map(element).collect()
}

/// a [m, k] times b [k, n] by three loops in f64.
fn product(a: &[f32], b: &[f32], k: usize, n: usize) -> Vec<f32> {
    let m = a.len() / k;
    let element = |i: usize| {
        let sum: f64 = (0..k).map(|l| f64::from(a[i / n * k + l]) * f64::from(b[l * n + i % n])).sum();
        sum as f32
    };
    (0..m * n).map(element).collect()
}

fn transposed(a: &[f32], cols: usize) -> Vec<f32> {
    (0..a.len()).map(|i| a[i % (a.len() / cols) * cols + i / (a.len() / cols)]).collect()
}

struct Layer {
    x: Tensor,        // [TOKENS, IN], leaf
    master: Tensor,   // [OUT, IN], leaf
    gradient: Tensor, // [OUT, IN]
    bias: Tensor,     // [OUT], leaf
    dy: Tensor,       // [TOKENS, OUT]
}

impl Layer {
    fn new() -> Layer {
        Layer {
            x: uniform(TOKENS, IN, 1).set_requires_grad(true),
            master: uniform(OUT, IN, 2).set_requires_grad(true),
            gradient: Tensor::zeros([OUT, IN], (Kind::Float, tch::Device::Cpu)),
            bias: uniform(1, OUT, 3).view([OUT]).detach().set_requires_grad(true),
            dy: uniform(TOKENS, OUT, 4),
        }
    }

    /// Forward with `weight`, then backward from sum(y * dy).
    fn run(&self, weight: &Tensor, call: &NoisyLinearCall) -> Tensor {
        let anchor = Some((&self.master, &self.gradient));
        let y = noisy_linear(&self.x, weight, Some(&self.bias), anchor, call).unwrap();
        run_backward(&(&y * &self.dy).sum(Kind::Float)).unwrap();
        y
    }
}

pub fn assert_close(got: &[f32], want: &[f32], what: &str) {
    let scale = want.iter().fold(0f32, |m, v| m.max(v.abs()));
    let difference = largest_difference(got, want);
    assert!(difference <= 2e-6 * scale, "{what}: {difference} of {scale}");
}

#[test]
fn forward_and_backward_are_the_formulas() {
    let layer = Layer::new();
    let call = noisy_call(13);
    let y = layer.run(&layer.master.detach(), &call);
    let (x, w, dy, b) = (floats(&layer.x), floats(&layer.master), floats(&layer.dy), floats(&layer.bias));
    let (k, n) = (IN as usize, OUT as usize);

    let clean = product(&x, &transposed(&w, k), k, n);
    let forward = with_error(&clean, n, &draw(Purpose::MatmulForward, 0), &call.keys);
    let expected: Vec<f32> = forward.iter().enumerate().map(|(i, v)| v + b[i % n]).collect();
    assert_close(&floats(&y), &expected, "y");
    assert!(largest_difference(&floats(&y), &clean) > 1e-2);

    let dx = with_error(&product(&dy, &w, n, k), k, &draw(Purpose::MatmulDx, 1), &call.keys);
    assert_close(&floats(&layer.x.grad()), &dx, "dX");
    let dw =
        with_error(&product(&transposed(&dy, n), &x, TOKENS as usize, k), k, &draw(Purpose::MatmulDw, 2), &dw_keys(13));
    assert_close(&floats(&layer.gradient), &dw, "dW");
    assert!(!layer.master.grad().defined(), "the weight's gradient is in its buffer alone");
    let db: Vec<f32> = (0..n).map(|o| (0..TOKENS as usize).map(|t| dy[t * n + o]).sum()).collect();
    assert_close(&floats(&layer.bias.grad()), &db, "bias gradient, exact");
}

/// Two micro-batches of equal input and different draw number: the buffer holds the sum of both erroneous products.
#[test]
fn per_microbatch_draws_differ() {
    let layer = Layer::new();
    for number in [40, 41] {
        let _ = layer.run(&layer.master.detach(), &noisy_call(number));
    }
    let (x, dy) = (floats(&layer.x), floats(&layer.dy));
    let clean = product(&transposed(&dy, OUT as usize), &x, TOKENS as usize, IN as usize);
    let one = |number| with_error(&clean, IN as usize, &draw(Purpose::MatmulDw, 2), &dw_keys(number));
    let (a, b) = (one(40), one(41));
    assert!(largest_difference(&a, &b) > 1e-2);
    let sum: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
    assert_close(&floats(&layer.gradient), &sum, "dW of both");
}

#[test]
fn bf16_products_are_rounded_once() {
    let (x, w) = (uniform(TOKENS, IN, 1).to_kind(Kind::BFloat16), uniform(OUT, IN, 2).to_kind(Kind::BFloat16));
    let bias = uniform(1, OUT, 3).view([OUT]);
    let leaf = x.set_requires_grad(true);
    let call = NoisyLinearCall { dw: None, ..noisy_call(0) };
    let y = noisy_linear(&leaf, &w, Some(&bias), None, &call).unwrap();
    assert_eq!(y.kind(), Kind::BFloat16);
    // Products of bf16 values are exact in f32, so that only the order of their sum matters: torch's, as above.
    let clean = floats(&tch::no_grad(|| leaf.to_kind(Kind::Float).mm(&w.to_kind(Kind::Float).tr())));
    let forward = with_error(&clean, OUT as usize, &draw(Purpose::MatmulForward, 0), &call.keys);
    let b = floats(&bias);
    let round = |v: f32| half::bf16::from_f32(v).to_f32();
    let expected: Vec<f32> = forward.iter().enumerate().map(|(i, v)| round(v + b[i % OUT as usize])).collect();
    assert_eq!(bits(&floats(&y)), bits(&expected));

    let dy = uniform(TOKENS, OUT, 4).to_kind(Kind::BFloat16);
    run_backward(&(&y * &dy).to_kind(Kind::Float).sum(Kind::Float)).unwrap();
    let clean = floats(&tch::no_grad(|| dy.to_kind(Kind::Float).mm(&w.to_kind(Kind::Float))));
    let dx = with_error(&clean, IN as usize, &draw(Purpose::MatmulDx, 1), &call.keys);
    let expected: Vec<f32> = dx.into_iter().map(round).collect();
    assert_eq!(bits(&floats(&leaf.grad())), bits(&expected));
}

/// The head's logits come in chunks of 256 MiB; its dW is one product all the same, with one error on the sum.
#[test]
fn the_head_draws_once_for_all_chunks() {
    let (vocab, rows) = (1i64 << 20, 65); // 64 rows fill a chunk
    let hidden = uniform(rows, 1, 1);
    let master = uniform(vocab, 1, 2).set_requires_grad(true);
    let targets = Tensor::full([rows], 3, (Kind::Int64, tch::Device::Cpu));
    let keys = RowKeys::new((0..vocab as u32).map(|row| row_key(5, row)).collect());
    let dw_of = |dw: Option<WeightGradientError>| {
        let gradient = Tensor::zeros([vocab, 1], (Kind::Float, tch::Device::Cpu));
        let clean = NoisyLinearCall::clean(RowKeys::new((0..rows as u64).collect()), true);
        let call = NoisyLinearCall { dw, ..clean };
        let anchor = Some((&master, &gradient));
        let output = token_logprobs(&hidden, &master.detach(), anchor, &targets, 1.0, &call).unwrap();
        // Signs that make the chunks' products cancel in part.
        let signs = Tensor::from_slice(&(0..rows).map(|r| if r < 60 { 1f32 } else { -5.0 }).collect::<Vec<_>>());
        run_backward(&(output.logprobs * signs).sum(Kind::Float)).unwrap();
        floats(&gradient)
    };
    let clean = dw_of(None);
    let noisy = dw_of(Some(WeightGradientError { error: error(Purpose::MatmulDw, 2), keys: keys.clone() }));
    let expected = with_error(&clean, 1, &draw(Purpose::MatmulDw, 2), &keys);
    assert_eq!(bits(&noisy), bits(&expected));
}

/// The product uses Q(W) forward and in dX; dW = dY^T x passes to the master as if there were no rounding.
#[test]
fn the_straight_through_gradient_of_a_quantized_weight() {
    let layer = Layer::new();
    let quantized =
        fake_quant(&layer.master.detach(), "mxfp4".parse::<Format>().unwrap(), TensorScale::Tensor, None).unwrap();
    assert!(largest_difference(&floats(&quantized), &floats(&layer.master)) > 1e-2);
    let _ = layer.run(&quantized, &NoisyLinearCall::clean(token_keys(), true));
    let (x, q, dy) = (floats(&layer.x), floats(&quantized), floats(&layer.dy));
    assert_close(&floats(&layer.x.grad()), &product(&dy, &q, OUT as usize, IN as usize), "dX through Q(W)");
    let dw = product(&transposed(&dy, OUT as usize), &x, TOKENS as usize, IN as usize);
    assert_close(&floats(&layer.gradient), &dw, "dW");
}

fn gradients_under(model: &Qwen2, injector: &Injector) -> Vec<Vec<f32>> {
    let all = sequences();
    let all: Vec<&Sequence> = all.iter().collect();
    let pass = Pass { differentiable: true, ..Pass::injected(injector, Phase::Update, RowKeys::new(vec![])) };
    run_backward(&response_logprobs(model, &all, 1.0, &pass).unwrap().logprobs.sum(Kind::Float)).unwrap();
    model.parameters().iter().map(|p| floats(&p.gradient().unwrap())).collect()
}

/// The largest absolute value of the weights that are stored fused with this one: q, k, v, or gate and up of its layer.
fn fused_amax(model: &Qwen2, name: &str) -> Option<f32> {
    let groups = [["q_proj", "k_proj", "v_proj"].as_slice(), ["gate_proj", "up_proj"].as_slice()];
    let group = groups.into_iter().find(|group| group.iter().any(|member| name.contains(member)))?;
    let layer = name.split(".self_attn.").next()?.split(".mlp.").next()?;
    let fused =
        |other: &str| other.starts_with(layer) && other.ends_with(".weight") && group.iter().any(|m| other.contains(m));
    let all = model.parameters();
    let values = all.iter().filter(|p| fused(&p.name)).flat_map(|p| floats(p.value()));
    Some(values.fold(0f32, |amax, v| amax.max(v.abs())))
}

/// In the model: the gradients under fake quantization are those of a model whose weights are Q(w), to the bit.
#[test]
fn the_whole_model_is_straight_through() {
    let resolve = |quant: &FakeQuantSection, model: &Qwen2| {
        let modules = model.config.modules();
        let plan = InjectionPlan::resolve(&Default::default(), &NoisyOpsSection::default(), quant, &modules, SEED);
        injector_of(plan.unwrap())
    };
    for (format, share_tensor_scale) in [("mxfp4", true), ("nvfp4", true), ("nvfp4", false)] {
        let format: Format = format.parse().unwrap();
        let weights = Some(format);
        let quant = FakeQuantSection { enabled: true, weights, share_tensor_scale, ..FakeQuantSection::default() };
        let quantizing = trainable(model(true));
        let injector = resolve(&quant, &quantizing);
        let mut rounded = model(true);
        let planned =
            rounded.modules().into_iter().filter(|(index, _)| injector.module(*index).weight_format.is_some());
        let weights: Vec<(String, Tensor)> = planned
            .map(|(_, module)| {
                let Module::Linear(_, weight) = module else { panic!("a linear") };
                let shares = share_tensor_scale && format == Format::NVFP4;
                let amax = fused_amax(&rounded, &weight.name).filter(|_| shares);
                let scale = amax.map_or(TensorScale::Tensor, TensorScale::Amax);
                (weight.name.clone(), fake_quant(weight.value(), format, scale, None).unwrap())
            })
            .collect();
        assert_eq!(weights.len(), 14, "every linear but the head");
        for parameter in rounded.parameters_mut() {
            if let Some((_, value)) = weights.iter().find(|(name, _)| *name == parameter.name) {
                parameter.assign(value).unwrap();
            }
        }
        let rounded = trainable(rounded);
        let got = gradients_under(&quantizing, &injector);
        let want = gradients_under(&rounded, &resolve(&FakeQuantSection::default(), &rounded));
        for ((parameter, got), want) in quantizing.parameters().iter().zip(&got).zip(&want) {
            assert!(want.iter().any(|g| *g != 0.0), "{}", parameter.name);
            assert_eq!(bits(got), bits(want), "{format}, shared {share_tensor_scale}: {}", parameter.name);
        }
    }
}
