//! Quantized activations in one layer: values and gradients are those of a plain straight-through reference in torch
//! operations, x + (Q(x) - x).detach() and the same for w; a token's Q(x) is its own; a static scale is what was given.

use tch::{Device, Kind, Tensor};
use temper::inject::injector::Injector;
use temper::inject::plan::InjectionPlan;
use temper::inject::section::{
    ActivationScale, DrawMode, DwDraw, FakeQuantSection, InjectPhase, NoisyOpsSection, PhaseSet,
};
use temper::model::linear_input::LinearInput;
use temper::model::load::random_model;
use temper::model::pass::Pass;
use temper::model::quantized::quantize_weights;
use temper::model::qwen2::Qwen2;
use temper::numerics::block_format::TensorScale;
use temper::numerics::error_law::ErrorLaw;
use temper::numerics::format::Format;
use temper::numerics::noise_key::{Phase, Purpose, ROUNDED_ACTIVATION, row_key, stream};
use temper::ops::autograd::run_backward;
use temper::ops::fake_quant::{StochasticDraw, fake_quant};
use temper::ops::matmul_error::{ErrorDraw, RowKeys};

use crate::backward::{assert_close, with_error};
use crate::support::{SEED, bits, floats, injector_of, largest_difference, model, sequences, trainable, uniform};

const TOKENS: i64 = 6;
const HIDDEN: i64 = 64;
const AMAX: f32 = 0.7; // a static scale that clips: inputs reach 1
const FORMATS: [(&str, ActivationScale); 14] = [
    ("mxfp4", ActivationScale::Token),
    ("mxfp4:even", ActivationScale::Token),
    ("mxfp4:rceil", ActivationScale::Token),
    ("nvfp4", ActivationScale::Token),
    ("nvfp4", ActivationScale::Static),
    ("nvfp4_single_level", ActivationScale::Token),
    ("nvfp4:4over6", ActivationScale::Token),
    ("mxfp8", ActivationScale::Token),
    ("fp8", ActivationScale::Token),
    ("fp8:tensor", ActivationScale::Token),
    ("fp8:tensor", ActivationScale::Static),
    ("mxfp4:half_away", ActivationScale::Token),
    ("mxfp4:sr", ActivationScale::Token),
    ("nvfp4:sr8", ActivationScale::Static),
];

/// Weights and activations in `format`; static scales of [`AMAX`].
pub fn w4a4(model: &Qwen2, format: &str, scale: ActivationScale, noise: &NoisyOpsSection) -> Injector {
    let format: Option<Format> = Some(format.parse().unwrap());
    let quant = FakeQuantSection {
        enabled: true,
        weights: format,
        activations: format,
        activation_scale: Some(scale),
        exclude_modules: vec![],
        ..FakeQuantSection::default()
    };
    let modules = model.config.modules();
    let plan = InjectionPlan::resolve(&Default::default(), noise, &quant, &modules, SEED).unwrap();
    let mut injector = injector_of(plan);
    if scale == ActivationScale::Static {
        injector.set_activation_amax((0..modules.len() as u32).map(|index| (index, AMAX)).collect());
    }
    injector
}

/// `value` with the gradient of x.
pub fn straight_through(x: &Tensor, value: &Tensor) -> Tensor {
    value + (x - x.detach())
}

/// Q(x) of module `index` in an update, as the plan of [`w4a4`] has it.
pub fn quantized_input(x: &Tensor, index: u32, keys: &RowKeys, format: &str, scale: ActivationScale) -> Tensor {
    let scale = if scale == ActivationScale::Static { TensorScale::Amax(AMAX) } else { TensorScale::Row };
    let stream = stream(Purpose::StochasticRounding, Phase::Update, ROUNDED_ACTIVATION, index).unwrap();
    let draw = StochasticDraw { seed: SEED, stream, keys: keys.clone() };
    fake_quant(&x.detach(), format.parse().unwrap(), scale, Some(&draw)).unwrap()
}

/// q_proj of the second layer (it has a bias, and siblings) in `kind`, noise in all three products or none.
fn check_layer(format: &str, scale: ActivationScale, kind: Kind, noisy: bool) {
    let what = format!("{format} {scale:?} {kind:?}, noise {noisy}");
    let model = trainable(random_model(model(true).config, 5, 0.2, Device::Cpu, kind).unwrap());
    let noise = NoisyOpsSection {
        enabled: noisy,
        dw_draw: DwDraw::PerMicrobatch,
        exclude_modules: vec![],
        ..Default::default()
    };
    let injector = w4a4(&model, format, scale, &noise);
    quantize_weights(&model, &injector).unwrap();
    let linear = &model.blocks[1].attention.q_proj;
    let keys = RowKeys::new((0..TOKENS as u64).map(|t| 7 << 48 | t << 26 | t).collect());
    let pass =
        Pass { differentiable: true, microbatch_draw: 3, ..Pass::injected(&injector, Phase::Update, keys.clone()) };
    // Rows of very different size, as tokens have them.
    let sizes = Tensor::from_slice(&[1f32, 0.01, 0.3, 5.0, 0.1, 1.0]).view([TOKENS, 1]);
    let x = (uniform(TOKENS, HIDDEN, 1) * sizes).to_kind(kind).set_requires_grad(true);
    let dy = uniform(TOKENS, HIDDEN, 4).to_kind(kind);
    let y = linear.forward(&x, &pass).unwrap();
    run_backward(&(&y * &dy).sum(kind)).unwrap();

    // The reference, in f32: values of a bf16 model are exact there.
    let leaf = |t: &Tensor| t.detach().to_kind(Kind::Float).copy().set_requires_grad(true);
    let (x32, w32) = (leaf(&x), leaf(linear.weight.value()));
    let quantized = quantized_input(&x, linear.site.index, &keys, format, scale);
    let xq = straight_through(&x32, &quantized.to_kind(Kind::Float));
    let wq = straight_through(&w32, &linear.site.quantized(&linear.weight).to_kind(Kind::Float));
    let product = xq.mm(&wq.tr());
    (&product * dy.to_kind(Kind::Float)).sum(Kind::Float).backward();

    let law = |t: &Tensor, purpose, direction, keys: &RowKeys| -> Tensor {
        let cols = t.size()[1];
        let stream = stream(purpose, Phase::Update, direction, linear.site.index).unwrap();
        let draw = ErrorDraw { law: ErrorLaw::RelativeGaussian, scale: 0.05, seed: SEED, stream };
        let values = if noisy { with_error(&floats(t), cols as usize, &draw, keys) } else { floats(t) };
        Tensor::from_slice(&values).view([-1, cols])
    };
    let bias = linear.bias.as_ref().unwrap().value();
    let expected = (law(&product, Purpose::MatmulForward, 0, &keys) + bias).to_kind(kind);
    assert_eq!(bits(&floats(&y)), bits(&floats(&expected)), "y: {what}");
    let expected = law(&x32.grad(), Purpose::MatmulDx, 1, &keys).to_kind(kind);
    assert_eq!(bits(&floats(&x.grad())), bits(&floats(&expected)), "dX: {what}");
    let dw_keys = RowKeys::new((0..HIDDEN as u32).map(|row| row_key(3, row)).collect());
    let expected = law(&w32.grad(), Purpose::MatmulDw, 2, &dw_keys);
    let got = floats(&linear.weight.gradient().unwrap());
    assert_close(&got, &floats(&expected), &format!("dW: {what}"));

    // And the comparison can fail: rounding the input matters, and a zero gradient would be seen.
    let unrounded =
        law(&dy.to_kind(Kind::Float).tr().mm(&x.detach().to_kind(Kind::Float)), Purpose::MatmulDw, 2, &dw_keys);
    assert!(largest_difference(&got, &floats(&unrounded)) > 1e-3, "{what}");
    assert!(floats(&x.grad()).iter().filter(|g| **g == 0.0).count() < 3, "{what}");
}

#[test]
fn a_layers_gradients_are_the_plain_straight_through_ones() {
    for (format, scale) in FORMATS {
        for kind in [Kind::Float, Kind::BFloat16] {
            for noisy in [false, true] {
                check_layer(format, scale, kind, noisy);
            }
        }
    }
}

/// Only in the phases of the plan, and not in a condition without quantization.
#[test]
fn phases_and_conditions_decide() {
    let model = model(true);
    let plan = {
        let injector = w4a4(&model, "mxfp4", ActivationScale::Token, &NoisyOpsSection::default());
        let mut plan = injector.plan().clone();
        plan.quant_phases = PhaseSet::of(&[InjectPhase::Rollout, InjectPhase::Validation]);
        plan
    };
    let injector = injector_of(plan);
    let x = uniform(TOKENS, HIDDEN, 1);
    let changed = |pass: Pass| bits(&floats(&LinearInput::new(&x).read(2, &pass).unwrap())) != bits(&floats(&x));
    let pass = |phase| Pass::injected(&injector, phase, RowKeys::new(vec![]));
    assert!(changed(pass(Phase::Rollout)) && changed(pass(Phase::Validation)));
    assert!(!changed(pass(Phase::Update)) && !changed(pass(Phase::OldLogprobs)));
    assert!(!changed(Pass { fake_quant: false, ..pass(Phase::Validation) }));
    assert!(!changed(Pass::clean(RowKeys::new(vec![]))));
}

/// A row's Q(x) has the same bits alone, in a batch, and beside a row a thousand times larger.
#[test]
fn a_tokens_values_are_its_own() {
    let model = model(true);
    for (format, scale) in FORMATS {
        let injector = w4a4(&model, format, scale, &NoisyOpsSection::default());
        let keys = RowKeys::new((0..TOKENS as u64 + 2).collect());
        let read = |x: &Tensor, first: i64| {
            let keys = keys.narrow(first as usize, x.size()[0] as usize);
            floats(&LinearInput::new(x).read(2, &Pass::injected(&injector, Phase::Rollout, keys)).unwrap())
        };
        let x = uniform(TOKENS, HIDDEN, 1);
        let together = read(&x, 0);
        let loud = Tensor::cat(&[&x, &(uniform(2, HIDDEN, 2) * 1000.0)], 0);
        assert_eq!(bits(&read(&loud, 0)[..together.len()]), bits(&together), "{format} {scale:?}");
        for row in 0..TOKENS {
            let alone = read(&x.narrow(0, row, 1), row);
            let at = (row * HIDDEN) as usize;
            assert_eq!(bits(&alone), bits(&together[at..at + HIDDEN as usize]), "{format} {scale:?}, row {row}");
        }
    }
}

/// q, k and v read one Q(x); a format that draws gives each module its own, and every phase another unless draws are
/// shared.
#[test]
fn stochastic_rounding_draws_by_module_and_phase() {
    let model = model(true);
    let x = uniform(TOKENS, HIDDEN, 1);
    let keys = RowKeys::new((0..TOKENS as u64).collect());
    let read = |format: &str, draw, index, phase| {
        let noise = NoisyOpsSection { draw, ..NoisyOpsSection::default() };
        let injector = w4a4(&model, format, ActivationScale::Token, &noise);
        let input = LinearInput::new(&x);
        let _ = input.read(2, &Pass::injected(&injector, phase, keys.clone())).unwrap();
        bits(&floats(&input.read(index, &Pass::injected(&injector, phase, keys.clone())).unwrap()))
    };
    use DrawMode::{Independent, Shared};
    let q = read("mxfp4:sr", Independent, 2, Phase::Rollout);
    assert_eq!(q, read("mxfp4:sr", Independent, 2, Phase::Rollout));
    assert_ne!(q, read("mxfp4:sr", Independent, 3, Phase::Rollout), "another module");
    assert_ne!(q, read("mxfp4:sr", Independent, 2, Phase::OldLogprobs), "another phase");
    let shared = read("mxfp4:sr", Shared, 2, Phase::Rollout);
    assert_eq!(shared, read("mxfp4:sr", Shared, 2, Phase::Update));
    assert_ne!(shared, read("mxfp4:sr", Shared, 2, Phase::Validation));
    assert_eq!(read("mxfp4", Independent, 2, Phase::Rollout), read("mxfp4", Independent, 3, Phase::Update));
}

#[test]
fn a_static_scale_that_is_missing_is_an_error() {
    let model = model(true);
    let injector = w4a4(&model, "nvfp4", ActivationScale::Static, &NoisyOpsSection::default());
    let uncalibrated = injector_of(injector.plan().clone());
    let all = sequences();
    let pass = Pass::injected(&uncalibrated, Phase::Rollout, RowKeys::new(vec![]));
    let error = temper::model::logprobs::response_logprobs(&model, &[&all[0]], 1.0, &pass).err().unwrap().to_string();
    assert_eq!(error, "model.layers.0.self_attn.q_proj: its static activation scale was not calibrated");
}
