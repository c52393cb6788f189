//! AQN from its definition: w' = w + m sigma z for norms, Q(w) + m sigma z for linears, in f32; w itself stays.

use tch::{Kind, Tensor};
use temper::inject::injector::Injector;
use temper::inject::plan::InjectionPlan;
use temper::inject::section::{
    ApplyTo, FakeQuantSection, LayerSigmaConfig, LayerType, NoiseInjectionSection, NoisyOpsSection,
};
use temper::model::aqn;
use temper::model::pass::Pass;
use temper::model::qwen2::{Module, Qwen2};
use temper::numerics::block_format::TensorScale;
use temper::numerics::generator::normal;
use temper::numerics::noise_key::{Phase, Purpose, row_key, stream};
use temper::ops::autograd::run_backward;
use temper::ops::fake_quant::fake_quant;
use temper::ops::matmul_error::RowKeys;

use crate::support::{SEED, bits, floats, injector_of, model, trainable, uniform};

const STEP: u32 = 3;
const SIGMA: f64 = 0.01;

/// Layer 0 left alone, layer 1 at 1.5, the final norm at the default 1.2.
fn section(layer_type: LayerType, apply_to: ApplyTo) -> NoiseInjectionSection {
    let multipliers = LayerSigmaConfig {
        default_multiplier: 1.2,
        layer_multipliers: [(0, 0.0), (1, 1.5)].into(),
        ..LayerSigmaConfig::default()
    };
    NoiseInjectionSection {
        enabled: true,
        layer_types: vec![layer_type],
        layer_sigma_config: Some(multipliers),
        apply_to,
        ..NoiseInjectionSection::default()
    }
}

fn injector(model: &Qwen2, aqn: &NoiseInjectionSection, quant: &FakeQuantSection) -> Injector {
    let noise = NoisyOpsSection::default();
    injector_of(InjectionPlan::resolve(aqn, &noise, quant, &model.config.modules(), SEED).unwrap())
}

fn planned_multiplier(name: &str) -> f64 {
    match name {
        _ if name.contains(".0.") => 0.0,
        _ if name.contains(".1.") => 1.5,
        _ => 1.2,
    }
}

/// The definition: base [rows, cols] + (m sigma) z, product and sum rounded to f32.
fn noised(base: &[f32], cols: usize, multiplier: f64, index: u32) -> Vec<f32> {
    let stream = stream(Purpose::Aqn, Phase::Rollout, 0, index).unwrap();
    let scale = (multiplier * SIGMA) as f32;
    let z = |i: usize| normal(SEED, stream, row_key(STEP, (i / cols) as u32), (i % cols) as u32);
    base.iter().enumerate().map(|(i, w)| if scale == 0.0 { *w } else { w + scale * z(i) }).collect()
}

fn pass<'a>(injector: &'a Injector, phase: Phase, rows: i64) -> Pass<'a> {
    Pass { matmul_error: false, ..Pass::injected(injector, phase, RowKeys::new(vec![0; rows as usize])) }
}

/// A random weight instead of ones, so that w matters.
fn with_random_norms(mut model: Qwen2) -> Qwen2 {
    for (key, parameter) in model.parameters_mut().into_iter().enumerate() {
        if parameter.name.contains("norm") {
            parameter.assign(&(uniform(1, 64, key as u64).view([64]) * 0.5 + 1.0)).unwrap();
        }
    }
    model
}

#[test]
fn norms_use_the_noised_weight_in_the_rollout_alone() {
    let model = with_random_norms(model(true));
    let injector = injector(&model, &section(LayerType::Rmsnorm, ApplyTo::Rollout), &FakeQuantSection::default());
    let values =
        |model: &Qwen2| -> Vec<Vec<u32>> { model.parameters().iter().map(|p| bits(&floats(p.value()))).collect() };
    let clean = values(&model);
    aqn::apply(&model, &injector, STEP, SIGMA).unwrap();
    assert_eq!(values(&model), clean, "w is never overwritten");

    let x = uniform(3, 64, 77);
    let variance = x.square().mean_dim([-1i64].as_slice(), true, Kind::Float);
    let normalized = floats(&(&x * (variance + model.config.rms_norm_eps).rsqrt()));
    let mut touched = 0;
    for (index, module) in model.modules() {
        let Module::Norm(norm) = module else { continue };
        let name = injector.module(index).name.clone();
        let w = floats(norm.weight.value());
        let w_noised = noised(&w, 64, planned_multiplier(&name), index);
        touched += usize::from(w != w_noised);
        for (phase, weight) in [
            (Phase::Rollout, &w_noised),
            (Phase::OldLogprobs, &w),
            (Phase::Update, &w),
            (Phase::RefLogprobs, &w),
            (Phase::Validation, &w),
        ] {
            let y = floats(&norm.forward(&x, &pass(&injector, phase, 3)).unwrap());
            let expected: Vec<f32> = normalized.iter().enumerate().map(|(i, n)| n * weight[i % 64]).collect();
            assert_eq!(bits(&y), bits(&expected), "{name} in {phase:?}");
        }
    }
    assert_eq!(touched, 3, "two norms of layer 1 and the final one");

    aqn::clear(&model);
    let (_, Module::Norm(norm)) = &model.modules()[9] else { panic!("a norm") };
    let after = floats(&norm.forward(&x, &pass(&injector, Phase::Rollout, 3)).unwrap());
    let w = floats(norm.weight.value());
    let expected: Vec<f32> = normalized.iter().enumerate().map(|(i, n)| n * w[i % 64]).collect();
    assert_eq!(bits(&after), bits(&expected), "clear takes the noise away");
}

/// A linear's own w' read off with the identity as input.
#[test]
fn linears_are_noised_after_quantization() {
    let model = model(true);
    for quantized in [false, true] {
        let quant = FakeQuantSection { enabled: quantized, ..FakeQuantSection::default() };
        let injector = injector(&model, &section(LayerType::Linear, ApplyTo::Rollout), &quant);
        model.invalidate();
        aqn::apply(&model, &injector, STEP, SIGMA).unwrap();
        for (layer, block) in model.blocks.iter().enumerate() {
            for linear in block.linears() {
                let index = linear.site.index;
                let [rows, columns] = linear.weight.value().size()[..] else { panic!("a matrix") };
                let format = injector.module(index).weight_format;
                assert_eq!(format.is_some(), quantized);
                let base = match format {
                    Some(format) => {
                        floats(&fake_quant(linear.weight.value(), format, TensorScale::Tensor, None).unwrap())
                    }
                    None => floats(linear.weight.value()),
                };
                let identity = Tensor::eye(columns, (Kind::Float, tch::Device::Cpu));
                let used = |phase| {
                    let y = linear.forward(&identity, &pass(&injector, phase, columns)).unwrap();
                    assert_eq!(y.size(), [columns, rows]);
                    floats(&y.tr())
                };
                let expected = noised(&base, columns as usize, [0.0, 1.5][layer], index);
                assert_eq!(used(Phase::Rollout), expected, "{} quantized {quantized}", linear.weight.name);
                assert_eq!(used(Phase::Update), base, "{} quantized {quantized}", linear.weight.name);
            }
        }
        aqn::clear(&model);
    }
}

/// `rollout_and_update`: the update computes with w' too, and the gradient reaches the clean weight.
#[test]
fn gradients_pass_through_the_noise() {
    for apply_to in [ApplyTo::Rollout, ApplyTo::RolloutAndUpdate] {
        let model = trainable(with_random_norms(model(true)));
        let injector = injector(&model, &section(LayerType::Rmsnorm, apply_to), &FakeQuantSection::default());
        aqn::apply(&model, &injector, STEP, SIGMA).unwrap();
        let norm = &model.norm;
        let x = uniform(3, 64, 77).set_requires_grad(true);
        let of = |phase| {
            let pass = Pass { differentiable: true, ..pass(&injector, phase, 3) };
            norm.forward(&x, &pass).unwrap()
        };
        let same_as_rollout = apply_to == ApplyTo::RolloutAndUpdate;
        let rollout = floats(&of(Phase::Rollout));
        for phase in [Phase::OldLogprobs, Phase::Update] {
            assert_eq!(bits(&floats(&of(phase))) == bits(&rollout), same_as_rollout, "{apply_to:?} {phase:?}");
        }
        assert_ne!(floats(&of(Phase::Validation)), rollout);

        // d sum(y)/dw = sum over rows of the normalized x, whatever w'; dx depends on w'.
        run_backward(&of(Phase::Update).sum(Kind::Float)).unwrap();
        let variance = x.detach().square().mean_dim([-1i64].as_slice(), true, Kind::Float);
        let normalized = x.detach() * (variance + model.config.rms_norm_eps).rsqrt();
        let expected = floats(&normalized.sum_dim_intlist([0i64].as_slice(), false, Kind::Float));
        let got = floats(&norm.weight.gradient().unwrap());
        assert!(crate::support::largest_difference(&got, &expected) <= 1e-6);
    }
}

/// sigma 0 leaves every module alone, and a new step draws anew.
#[test]
fn each_step_has_its_own_draw() {
    let model = model(true);
    let injector = injector(&model, &section(LayerType::Rmsnorm, ApplyTo::Rollout), &FakeQuantSection::default());
    let x = uniform(2, 64, 5);
    let output = |step, sigma| {
        aqn::apply(&model, &injector, step, sigma).unwrap();
        bits(&floats(&model.norm.forward(&x, &pass(&injector, Phase::Rollout, 2)).unwrap()))
    };
    let clean = bits(&floats(&model.norm.forward(&x, &pass(&injector, Phase::Rollout, 2)).unwrap()));
    let third = output(3, SIGMA);
    assert_ne!(output(4, SIGMA), third);
    assert_eq!(output(3, SIGMA), third, "again step 3: the same draw");
    assert_eq!(output(5, 0.0), clean);
}
