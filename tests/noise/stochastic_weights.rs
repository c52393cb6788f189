//! Stochastically rounded weights of a model: one draw per optimizer update, a stream per module, siblings share A.

use temper::inject::plan::InjectionPlan;
use temper::inject::section::{FakeQuantSection, NoiseInjectionSection, NoisyOpsSection};
use temper::model::quantized::quantize_weights;
use temper::model::qwen2::{Module, Qwen2};
use temper::numerics::block_format::{RoundingDraw, TensorScale, quantize};
use temper::numerics::format::Format;
use temper::numerics::noise_key::{Phase, Purpose, ROUNDED_WEIGHT, row_key, stream};

use crate::support::{SEED, floats, injector_of, model, trainable};

fn quantized(model: &Qwen2) -> Vec<(u32, Vec<f32>)> {
    let linears = model.modules().into_iter().filter_map(|(index, module)| match module {
        Module::Linear(site, weight) if site.is_quantized() => Some((index, floats(&site.quantized(weight)))),
        _ => None,
    });
    linears.collect()
}

#[test]
fn each_update_draws_anew_from_its_own_keys() {
    let format: Format = "nvfp4:sr".parse().unwrap();
    let quant = FakeQuantSection { enabled: true, weights: Some(format), ..FakeQuantSection::default() };
    let mut model = trainable(model(true));
    let (aqn, noise) = (NoiseInjectionSection::default(), NoisyOpsSection::default());
    let plan = InjectionPlan::resolve(&aqn, &noise, &quant, &model.config.modules(), SEED).unwrap();
    let injector = injector_of(plan);
    let mut seen = Vec::new();
    for update in [0, 1, 7] {
        model.set_update_number(update);
        assert!(quantized(&model).is_empty(), "the copies of another update are dropped");
        quantize_weights(&model, &injector).unwrap();
        let all = quantized(&model);
        assert_eq!(all.len(), 14);
        for (index, found) in &all {
            let weight_of = |index: u32| {
                let (_, module) = model.modules().into_iter().find(|(other, _)| *other == index).unwrap();
                let Module::Linear(_, weight) = module else { panic!("a linear") };
                weight.value().shallow_clone()
            };
            let siblings = injector.plan().tensor_scale_siblings(*index);
            let shared = siblings.iter().flat_map(|&i| floats(&weight_of(i))).fold(0f32, |a, v| a.max(v.abs()));
            let (rows, cols) = weight_of(*index).size2().unwrap();
            let (rows, cols) = (rows as usize, cols as usize);
            let keys: Vec<u64> = (0..rows as u32).map(|row| row_key(update, row)).collect();
            let stream = stream(Purpose::StochasticRounding, Phase::Shared, ROUNDED_WEIGHT, *index).unwrap();
            let draw = RoundingDraw { seed: SEED, stream, row_keys: &keys };
            let scale = TensorScale::Amax(shared);
            let expected = quantize(&floats(&weight_of(*index)), rows, cols, format, scale, Some(&draw)).dequantized;
            assert_eq!(found, &expected, "module {index} after {update} updates");
        }
        assert!(!seen.contains(&all), "update {update} repeats another's draw");
        seen.push(all);
    }
}
