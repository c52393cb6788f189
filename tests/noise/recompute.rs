//! Blocks that are computed again in backward give the log-probs, gradients and measurements of blocks that were kept.

use tch::{Device, Kind};
use temper::inject::injector::Injector;
use temper::inject::plan::InjectionPlan;
use temper::inject::section::{ApplyTo, FakeQuantSection, LayerType, NoiseInjectionSection};
use temper::model::aqn;
use temper::model::config::Qwen2Config;
use temper::model::load::random_model;
use temper::model::logprobs::{recomputed_logprobs, response_logprobs};
use temper::model::pass::{Pass, Sequence};
use temper::model::qwen2::Qwen2;
use temper::numerics::noise_key::Phase;
use temper::ops::autograd::run_backward;
use temper::ops::matmul_error::RowKeys;

use crate::support::{SEED, bits, floats, injector_of, noise_everywhere, sequences, trainable};

struct Found {
    logprobs: Vec<u32>,
    gradients: Vec<Vec<u32>>,
    measured: String,
}

fn run(model: &Qwen2, injector: &Injector, recomputes: bool) -> Found {
    let all = sequences();
    let all: Vec<&Sequence> = all.iter().collect();
    let pass = Pass { differentiable: true, ..Pass::injected(injector, Phase::Update, RowKeys::new(vec![])) };
    let logprobs = if recomputes {
        let (forward, recompute) = recomputed_logprobs(model, &all, 0.7, &pass).unwrap();
        // Not the sum: what the last block gets must differ from row to row.
        recompute.backward(&forward.logprobs.square().sum(Kind::Float)).unwrap();
        forward.logprobs
    } else {
        let forward = response_logprobs(model, &all, 0.7, &pass).unwrap();
        run_backward(&forward.logprobs.square().sum(Kind::Float)).unwrap();
        forward.logprobs
    };
    // The head's own dW is kept apart under noise: added to its weight's here.
    if let (Some(own), Some(mut shared)) = (model.head.take_own_gradient(), model.head_weight().gradient()) {
        let _ = shared.g_add_(&own);
    }
    let step = injector.finish_step(1, 0.01).unwrap();
    Found {
        logprobs: bits(&floats(&logprobs)),
        gradients: model.parameters().iter().map(|p| bits(&floats(&p.gradient().unwrap()))).collect(),
        measured: format!("{:?} {:?}", step.summary, step.rows),
    }
}

#[test]
fn computing_blocks_again_changes_no_bit() {
    let aqn_of = |layer_type| NoiseInjectionSection {
        enabled: true,
        layer_types: vec![layer_type],
        apply_to: ApplyTo::RolloutAndUpdate,
        ..NoiseInjectionSection::default()
    };
    let format = |text: &str| Some(text.parse().unwrap());
    let w4a4 = FakeQuantSection {
        enabled: true,
        weights: format("mxfp4"),
        activations: format("mxfp4"),
        ..FakeQuantSection::default()
    };
    for (what, kind, tied, aqn, quant) in [
        ("norms noised", Kind::Float, true, aqn_of(LayerType::Rmsnorm), FakeQuantSection::default()),
        ("linears noised", Kind::Float, false, aqn_of(LayerType::Linear), FakeQuantSection::default()),
        ("W4A4", Kind::Float, true, NoiseInjectionSection::default(), w4a4.clone()),
        ("bf16", Kind::BFloat16, true, aqn_of(LayerType::Rmsnorm), FakeQuantSection::default()),
        ("bf16, W4A4", Kind::BFloat16, false, aqn_of(LayerType::Rmsnorm), w4a4),
    ] {
        let found = [false, true].map(|recomputes| {
            let tiny = Qwen2Config::preset("tiny-4x64").unwrap();
            let config = Qwen2Config { num_hidden_layers: 3, tie_word_embeddings: tied, ..tiny };
            let model = trainable(random_model(config, 5, 0.2, Device::Cpu, kind).unwrap());
            let modules = model.config.modules();
            let plan = InjectionPlan::resolve(&aqn, &noise_everywhere(), &quant, &modules, SEED).unwrap();
            let injector = injector_of(plan);
            aqn::apply(&model, &injector, 1, 0.01).unwrap();
            run(&model, &injector, recomputes)
        });
        let [kept, again] = found;
        assert!(
            kept.gradients.iter().all(|g| g.iter().any(|bits| *bits != 0)),
            "{what}: every parameter has a gradient"
        );
        assert_eq!(kept.logprobs, again.logprobs, "{what}");
        assert_eq!(kept.measured, again.measured, "{what}");
        for (number, (kept, again)) in kept.gradients.iter().zip(&again.gradients).enumerate() {
            assert!(kept == again, "{what}: gradient of parameter {number}");
        }
    }
}
