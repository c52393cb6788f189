//! LoRA: the base at first, y + (alpha / r) (x A^T) B^T after that, gradients by the chain rule, and what its products carry.

use tch::{Kind, Tensor};
use temper::inject::injector::Injector;
use temper::inject::plan::{InjectionPlan, ModuleKind};
use temper::inject::section::{FakeQuantSection, NoiseInjectionSection, NoisyOpsSection};
use temper::model::linear::Linear;
use temper::model::logprobs::{recomputed_logprobs, response_logprobs};
use temper::model::lora::{Lora, attach_new, merge};
use temper::model::pass::{Pass, Sequence};
use temper::model::qwen2::Qwen2;
use temper::model::section::{LoraSection, Projection};
use temper::numerics::noise_key::Phase;
use temper::ops::autograd::run_backward;
use temper::ops::matmul_error::RowKeys;
use temper::rl::optimizer::AdamW;
use temper::rl::update::optimizer_step;

use crate::support::{
    SEED, bits, floats, injector_of, largest_difference, model, noise_everywhere, sequences, trainable, uniform,
};

const RANK: usize = 4;

fn section(targets: &[Projection]) -> LoraSection {
    LoraSection { rank: RANK, alpha: 6.0, targets: targets.to_vec() }
}

/// New adapters: B is 0.
fn adapted(targets: &[Projection]) -> Qwen2 {
    let mut model = model(true);
    attach_new(&mut model, Lora { section: section(targets), base: String::new() }, SEED).unwrap();
    model
}

/// With B as it might become.
fn trained(targets: &[Projection]) -> Qwen2 {
    let mut model = adapted(targets);
    for (number, linear) in model.linears_mut().enumerate() {
        if let Some(adapter) = &mut linear.adapter {
            let size = adapter.b.weight.value().size();
            adapter.b.weight.assign(&(uniform(size[0], size[1], number as u64) * 0.1)).unwrap();
        }
    }
    model
}

fn clean() -> Pass<'static> {
    Pass::clean(RowKeys::new(vec![]))
}

fn logprobs(model: &Qwen2, pass: &Pass) -> Vec<f32> {
    let _no_grad = tch::no_grad_guard();
    let all = sequences();
    let all: Vec<&Sequence> = all.iter().collect();
    floats(&response_logprobs(model, &all, 0.7, pass).unwrap().logprobs)
}

fn injector(model: &Qwen2, noise: &NoisyOpsSection, quant: &FakeQuantSection) -> Injector {
    let aqn = NoiseInjectionSection::default();
    injector_of(InjectionPlan::resolve(&aqn, noise, quant, &model.module_specs(), SEED).unwrap())
}

fn mxfp4() -> FakeQuantSection {
    FakeQuantSection { enabled: true, ..FakeQuantSection::default() }
}

#[test]
fn new_adapters_change_no_bit_whatever_is_injected() {
    let (base, model) = (model(true), adapted(&Projection::ALL));
    assert_eq!(bits(&logprobs(&base, &clean())), bits(&logprobs(&model, &clean())));
    for phase in [Phase::Rollout, Phase::OldLogprobs, Phase::RefLogprobs, Phase::Update, Phase::Validation] {
        let of = |model: &Qwen2| {
            let injector = injector(model, &noise_everywhere(), &mxfp4());
            logprobs(model, &Pass::injected(&injector, phase, RowKeys::new(vec![])))
        };
        assert_eq!(bits(&of(&base)), bits(&of(&model)), "{phase:?}");
    }
}

#[test]
fn the_reference_policy_is_the_base() {
    let (base, model) = (model(true), trained(&Projection::ALL));
    let of = |model: &Qwen2, phase| {
        let injector = injector(model, &noise_everywhere(), &mxfp4());
        logprobs(model, &Pass::injected(&injector, phase, RowKeys::new(vec![])))
    };
    assert_eq!(bits(&of(&base, Phase::RefLogprobs)), bits(&of(&model, Phase::RefLogprobs)));
    assert!(largest_difference(&of(&base, Phase::Rollout), &of(&model, Phase::Rollout)) > 0.01);
}

#[test]
fn merged_is_unmerged() {
    for targets in [&Projection::ALL[..], &[Projection::QProj, Projection::DownProj]] {
        let mut model = trained(targets);
        let base = logprobs(&self::model(true), &clean());
        let unmerged = logprobs(&model, &clean());
        merge(&mut model).unwrap();
        let merged = logprobs(&model, &clean());
        assert!(model.adapters().next().is_none() && model.lora.is_none());
        assert!(largest_difference(&unmerged, &base) > 0.01, "the adapters do something");
        let difference = largest_difference(&merged, &unmerged);
        assert!(difference < 1e-5, "{difference}");
    }
}

/// The product reads Q(W) and the plain A and B.
#[test]
fn the_base_is_quantized_and_the_adapters_are_not() {
    let model = trained(&Projection::ALL);
    let found = {
        let injector = injector(&model, &NoisyOpsSection::default(), &mxfp4());
        logprobs(&model, &Pass::injected(&injector, Phase::Rollout, RowKeys::new(vec![])))
    };
    let mut by_hand = trained(&Projection::ALL);
    let quantized: Vec<Tensor> =
        model.blocks.iter().flat_map(|b| b.linears()).map(|l| l.site.quantized(&l.weight)).collect();
    for (linear, quantized) in by_hand.linears_mut().zip(&quantized) {
        assert_ne!(bits(&floats(linear.weight.value())), bits(&floats(quantized)));
        linear.weight.assign(quantized).unwrap();
    }
    assert_eq!(bits(&found), bits(&logprobs(&by_hand, &clean())));
}

fn gradients(model: &Qwen2, pass: &Pass, recomputes: bool) -> Vec<(String, Tensor)> {
    let all = sequences();
    let all: Vec<&Sequence> = all.iter().collect();
    if recomputes {
        let (forward, recompute) = recomputed_logprobs(model, &all, 0.7, pass).unwrap();
        recompute.backward(&forward.logprobs.square().sum(Kind::Float)).unwrap();
    } else {
        let forward = response_logprobs(model, &all, 0.7, pass).unwrap();
        run_backward(&forward.logprobs.square().sum(Kind::Float)).unwrap();
    }
    model.parameters().iter().filter_map(|p| Some((p.name.clone(), p.gradient()?))).collect()
}

/// Of W + s B A with respect to A and B: s B^T dW and s dW A^T, with dW of the merged model.
#[test]
fn gradients_are_those_of_the_chain_rule_and_the_base_has_none() {
    let mut model = trained(&Projection::ALL);
    model.make_trainable().unwrap();
    let mut merged = trained(&Projection::ALL);
    merge(&mut merged).unwrap();
    let merged = trainable(merged);
    let pass = Pass { differentiable: true, ..clean() };
    let dense = gradients(&merged, &pass, false);
    let found = gradients(&model, &pass, false);
    assert_eq!(found.len(), 2 * 7 * 2, "A and B of seven linears of two layers, nothing else");
    let of = |name: &str| &found.iter().find(|(other, _)| other == name).unwrap().1;
    for linear in model.blocks.iter().flat_map(|block| block.linears()) {
        let adapter = linear.adapter.as_ref().unwrap();
        let dw = &dense.iter().find(|(name, _)| *name == linear.weight.name).unwrap().1;
        let scale = 6.0 / RANK as f64;
        let (a, b) = (adapter.a.weight.value(), adapter.b.weight.value());
        for (name, expected) in [
            (&adapter.a.weight.name, b.transpose(0, 1).mm(dw) * scale),
            (&adapter.b.weight.name, dw.mm(&a.transpose(0, 1)) * scale),
        ] {
            let relative = ((of(name) - &expected).norm() / expected.norm()).double_value(&[]);
            assert!(relative < 1e-5, "{name}: {relative}");
        }
    }
}

#[test]
fn computing_blocks_again_changes_no_bit_of_an_adapter() {
    let found = [false, true].map(|recomputes| {
        let mut model = trained(&Projection::ALL);
        model.make_trainable().unwrap();
        let noise = NoisyOpsSection { adapters: true, ..noise_everywhere() };
        let injector = injector(&model, &noise, &mxfp4());
        let pass = Pass { differentiable: true, ..Pass::injected(&injector, Phase::Update, RowKeys::new(vec![])) };
        let found = gradients(&model, &pass, recomputes);
        let step = injector.finish_step(1, 0.0).unwrap();
        (found.into_iter().map(|(name, g)| (name, bits(&floats(&g)))).collect::<Vec<_>>(), format!("{:?}", step.rows))
    });
    assert!(found[0].0.iter().all(|(_, gradient)| gradient.iter().any(|bits| *bits != 0)));
    assert_eq!(found[0], found[1]);
}

/// An update moves the adapters; the quantized base stays the very tensor that it was.
#[test]
fn the_base_is_quantized_once() {
    let mut model = trained(&Projection::ALL);
    model.make_trainable().unwrap();
    let injector = injector(&model, &NoisyOpsSection::default(), &mxfp4());
    let pass = Pass { differentiable: true, ..Pass::injected(&injector, Phase::Update, RowKeys::new(vec![])) };
    let quantized = |model: &Qwen2| -> Vec<usize> {
        let linears = model.blocks.iter().flat_map(|b| b.linears());
        linears.map(|l| l.site.quantized(&l.weight).data_ptr() as usize).collect()
    };
    gradients(&model, &pass, false);
    let (before, a) = (quantized(&model), floats(model.adapters().next().unwrap().value()));
    assert!(model.blocks[0].linears().iter().all(|linear| linear.site.is_quantized()));
    model.set_update_number(1);
    optimizer_step(&mut model, &mut AdamW::new(Default::default()).unwrap(), 1e-3).unwrap();
    assert_ne!(bits(&a), bits(&floats(model.adapters().next().unwrap().value())));
    assert_eq!(before, quantized(&model));
}

/// What selects a linear selects its adapter; quantization and AQN know of none, and a filter that leaves none is said.
#[test]
fn filters_reach_adapters_through_their_linears() {
    let model = adapted(&[Projection::QProj, Projection::UpProj]);
    let resolve = |noise: NoisyOpsSection, quant: &FakeQuantSection| {
        InjectionPlan::resolve(&NoiseInjectionSection::default(), &noise, quant, &model.module_specs(), SEED)
    };
    let noise = |targets: &[&str], exclude: &[&str]| {
        let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        let target_modules = (!targets.is_empty()).then(|| names(targets));
        NoisyOpsSection { adapters: true, target_modules, exclude_modules: names(exclude), ..noise_everywhere() }
    };
    let off = FakeQuantSection::default();
    for (targets, exclude, expected) in [
        (&[][..], &[][..], 8),
        (&["linear"], &[], 8),
        (&["q_proj"], &[], 4),
        (&["*.q_proj"], &[], 4),
        (&[], &["*.q_proj"], 4),
        (&["lora_A"], &[], 4),
        (&["layers.1"], &[], 4),
    ] {
        let plan = resolve(noise(targets, exclude), &off).unwrap();
        let of_adapters = plan.modules.iter().filter(|m| m.kind == ModuleKind::Adapter && m.matmul_error > 0.0);
        assert_eq!(of_adapters.count(), expected, "{targets:?} {exclude:?}");
    }
    let error = resolve(noise(&["k_proj"], &[]), &off).unwrap_err().to_string();
    assert!(error.contains("noisy_ops.adapters: selects no module"), "{error}");
    let of_adapters = FakeQuantSection { target_modules: Some(vec!["lora_A".into()]), ..mxfp4() };
    let error = resolve(NoisyOpsSection::default(), &of_adapters).unwrap_err().to_string();
    assert!(error.contains("fake_quant.target_modules: `lora_A` matches no module"), "{error}");
}

/// Only where `noisy_ops.adapters` says so do A's and B's products carry an error, each with a draw of its own.
#[test]
fn the_error_of_adapters_is_a_key() {
    let model = trained(&Projection::ALL);
    let base_modules = model.config.modules().len();
    for adapters in [false, true] {
        let noise = NoisyOpsSection { adapters, ..noise_everywhere() };
        let injector = injector(&model, &noise, &FakeQuantSection::default());
        let kinds = |kind| injector.plan().modules.iter().filter(move |m| m.kind == kind);
        assert_eq!(kinds(ModuleKind::Adapter).count(), 2 * 7 * 2);
        assert!(kinds(ModuleKind::Adapter).all(|m| (m.matmul_error > 0.0) == adapters && m.weight_format.is_none()));
        assert!(kinds(ModuleKind::Adapter).all(|m| m.index as usize >= base_modules));
        logprobs(&model, &Pass::injected(&injector, Phase::Rollout, RowKeys::new(vec![])));
        logprobs(&model, &Pass::injected(&injector, Phase::RefLogprobs, RowKeys::new(vec![])));
        let step = injector.finish_step(1, 0.0).unwrap();
        let of_adapters: Vec<_> =
            step.rows.iter().filter(|row| row["module"].as_str().is_some_and(|m| m.contains("lora_"))).collect();
        assert_eq!(of_adapters.len(), if adapters { 28 } else { 0 });
        for row in of_adapters {
            let (measured, error) =
                (&row["matmul"]["rollout"]["measured"], &row["matmul"]["rollout"]["standard_error"]);
            let (measured, error) = (measured.as_f64().unwrap(), error.as_f64().unwrap());
            assert!((measured - 0.05).abs() < 5.0 * error.max(2e-4), "{row}");
            assert!(row["matmul"].get("ref_logprobs").is_none(), "{row}");
        }
        assert_eq!(step.disagreements, Vec::<String>::new());
    }
}

/// Adapters stand behind all other modules in the list, so no other module's keys move.
#[test]
fn the_draws_of_the_base_are_those_without_adapters() {
    let (base, model) = (model(true), adapted(&[Projection::UpProj]));
    let plan = |model: &Qwen2| injector(model, &noise_everywhere(), &mxfp4()).plan().modules.clone();
    let (alone, beside) = (plan(&base), plan(&model));
    assert_eq!(alone[..], beside[..alone.len()]);
    assert_eq!(beside.len() - alone.len(), 2 * 2);
}

/// The seed decides A, and only the seed: uniform in +-1/sqrt(in).
#[test]
fn a_begins_as_in_peft() {
    let a_of = |seed| {
        let mut model = model(true);
        attach_new(&mut model, Lora { section: section(&Projection::ALL), base: String::new() }, seed).unwrap();
        let first = |linear: &Linear| linear.adapter.as_ref().map(|adapter| adapter.a.weight.value().copy());
        model.blocks[0].linears().map(first).map(Option::unwrap)
    };
    let (one, again, other) = (a_of(1), a_of(1), a_of(2));
    for ((one, again), other) in one.iter().zip(&again).zip(&other) {
        assert_eq!(bits(&floats(one)), bits(&floats(again)));
        assert_ne!(bits(&floats(one)), bits(&floats(other)));
        let bound = 1.0 / (one.size()[1] as f64).sqrt();
        let largest = one.abs().max().double_value(&[]);
        assert!(largest <= bound && largest > 0.9 * bound, "{largest} of {bound}");
        let std = one.std(true).double_value(&[]);
        assert!((std / (bound / 3f64.sqrt()) - 1.0).abs() < 0.15, "{std}");
    }
    assert_ne!(bits(&floats(&one[0])), bits(&floats(&one[1])), "q and k have their own");
}
