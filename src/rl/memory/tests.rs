//! By hand from shapes, by the key that each part follows, and at the edges of what fits.

use super::*;
use crate::inject::section::{FakeQuantSection, NoiseInjectionSection, NoisyOpsSection};

fn plan(shapes: &Qwen2Config, noise: &NoisyOpsSection, quant: &FakeQuantSection) -> InjectionPlan {
    let aqn = NoiseInjectionSection { enabled: true, ..Default::default() };
    InjectionPlan::resolve(&aqn, noise, quant, &shapes.modules(), 0).unwrap_or_else(|e| panic!("{e}"))
}

fn e5c<'a>(shapes: &'a Qwen2Config, plan: &'a InjectionPlan) -> Demand<'a> {
    Demand {
        shapes,
        plan,
        dtype: Dtype::Bf16,
        on_gpu: true,
        lora: None,
        has_reference: true,
        offload_reference: false,
        gradient_checkpointing: true,
        sequences: 640,
        group_size: 5,
        max_sequences: None,
        validation_sequences: 64,
        cache_step: 1,
        prompt_tokens: 1024,
        response_tokens: 1024,
        microbatch_tokens: 8192,
        temperature: 1.0,
        filter_bytes: 0,
    }
}

fn shapes() -> Qwen2Config {
    Qwen2Config::preset("qwen2.5-1.5b").unwrap_or_else(|e| panic!("{e}"))
}

fn part(estimate: &MemoryEstimate, phase: &str, name: &str) -> u64 {
    let phase = estimate.phases.iter().find(|p| p.phase == phase);
    phase.map_or(0, |p| cards::bytes_of(p, name))
}

/// By hand from Qwen2.5-1.5B's shapes: 1 543 569 408 elements in matrices (embedding 151936 x 1536; a layer 1536 x 1536
/// twice, 256 x 1536 twice, 3 x 1536 x 8960), 144 896 in vectors (57 norms of 1536, 28 x (1536 + 256 + 256) biases).
#[test]
fn what_stands_is_counted_by_hand() {
    let shapes = shapes();
    let plan = plan(&shapes, &NoisyOpsSection { enabled: true, ..Default::default() }, &Default::default());
    let estimate = e5c(&shapes, &plan).estimate();
    let layer: u64 = 2 * 1536 * 1536 + 2 * 256 * 1536 + 3 * 1536 * 8960;
    let (m, v) = (151_936 * 1536 + 28 * layer, 57 * 1536 + 28 * 2048);
    for phase in ["rollout", "logprobs", "update", "optimizer"] {
        assert_eq!(part(&estimate, phase, "weights"), 2 * m, "{phase}");
        assert_eq!(part(&estimate, phase, "master_weights"), 4 * (m + v));
        assert_eq!(part(&estimate, phase, "gradients"), 4 * (m + v));
        assert_eq!(part(&estimate, phase, "moments"), 8 * (m + v));
        assert_eq!(part(&estimate, phase, "reference"), 2 * m + 4 * v);
        assert_eq!(part(&estimate, phase, "head_gradient"), 0, "the head is excluded by default");
    }
    // 640 sequences of 2048 positions, 28 layers of keys and values, one more while rows are copied; 2 heads of 128.
    assert_eq!(part(&estimate, "rollout", "kv_cache"), 57 * 2 * 640 * 2048 * 256);
    assert_eq!(part(&estimate, "rollout", "aqn_weights"), 57 * 1536 * 4);
    assert_eq!(part(&estimate, "update", "aqn_weights"), 0);
    assert_eq!((estimate.peak_phase, estimate.peak_bytes), ("rollout", estimate.phases[0].bytes));
    // The inputs of 28 blocks, the last residual and its gradient, and one block: 8192 tokens.
    let block = 2 * 1536 * 10 + 5 * 2 * 1536 + 4 * 12 + 8 * 128 + 4 * 2 * 8960;
    let inside = 8192 * (block + 2 * (2 * 8960 + 3 * 1536));
    let head = 4096 * 1536 * 12 + 3 * 441 * 151_936 * 4 + 4 * 151_936 * 1536;
    assert!(head > inside, "{head} {inside}");
    let (activations, chunk) = (part(&estimate, "update", "activations"), part(&estimate, "update", "logits_chunk"));
    assert_eq!(activations + chunk, 8192 * 30 * 2 * 1536 + head);
}

#[test]
fn every_part_follows_the_key_that_it_belongs_to() {
    let shapes = shapes();
    let noise = NoisyOpsSection { enabled: true, exclude_modules: Vec::new(), ..Default::default() };
    let quant = FakeQuantSection { enabled: true, ..Default::default() };
    let plan = plan(&shapes, &noise, &quant);
    let all = e5c(&shapes, &plan);
    let estimate = all.estimate();
    let head = 151_936 * 1536;
    assert_eq!(part(&estimate, "update", "head_gradient"), 4 * head, "a tied head under error");
    assert_eq!(part(&estimate, "rollout", "head_gradient"), 0);
    let linears: u64 = 28 * (2 * 1536 * 1536 + 2 * 256 * 1536 + 3 * 1536 * 8960);
    assert_eq!(
        part(&estimate, "rollout", "quantized"),
        2 * linears + linears * 9 / 16,
        "values, and codes with scales"
    );

    let offloaded = Demand { offload_reference: true, ..all.clone() }.estimate();
    assert_eq!(part(&offloaded, "update", "reference"), 0);
    assert_eq!(part(&offloaded, "logprobs", "reference"), part(&estimate, "logprobs", "reference"));
    let none = Demand { has_reference: false, ..all.clone() }.estimate();
    assert_eq!(part(&none, "logprobs", "reference"), 0);

    let few = Demand { max_sequences: Some(160), ..all.clone() }.estimate();
    assert_eq!(4 * part(&few, "rollout", "kv_cache"), part(&estimate, "rollout", "kv_cache"));
    let stepped = Demand { cache_step: 256, response_tokens: 1, ..all.clone() }.estimate();
    assert_eq!(part(&stepped, "rollout", "kv_cache"), 57 * 2 * 640 * 1280 * 256, "1025 positions take 1280");

    let kept = Demand { gradient_checkpointing: false, ..all.clone() }.estimate();
    assert!(part(&kept, "update", "activations") > 5 * part(&estimate, "update", "activations"));
    let f32 = Demand { dtype: Dtype::F32, ..all }.estimate();
    assert_eq!(part(&f32, "update", "weights"), 0, "the masters are what products read");
}

/// r (in + out): 32 x 28 x (2 x 3072 + 2 x 1792 + 3 x 10496) = 36 929 536.
#[test]
fn adapters_stand_in_the_place_of_all_weights() {
    let (shapes, section) = (shapes(), LoraSection::default());
    let noise = NoisyOpsSection { enabled: true, exclude_modules: Vec::new(), ..Default::default() };
    let plan = plan(&shapes, &noise, &FakeQuantSection { enabled: true, ..Default::default() });
    let all = e5c(&shapes, &plan);
    let estimate = Demand { lora: Some(&section), has_reference: false, ..all.clone() }.estimate();
    let (m, v, a) = (1_543_569_408, 144_896, 36_929_536);
    assert_eq!(part(&estimate, "update", "weights"), 2 * m + 4 * v + 2 * a);
    assert_eq!(part(&estimate, "update", "master_weights"), 4 * a);
    assert_eq!(part(&estimate, "update", "gradients"), 4 * a);
    assert_eq!(part(&estimate, "update", "moments"), 8 * a);
    assert_eq!(part(&estimate, "update", "head_gradient"), 0, "the head is frozen");
    assert_eq!(part(&estimate, "rollout", "quantized"), part(&all.estimate(), "rollout", "quantized"));
    let of_b = 8192 * 2 * 32 * 7;
    let without = Demand { has_reference: false, ..all }.estimate();
    let inside = |e: &MemoryEstimate| part(e, "update", "activations");
    assert!(inside(&estimate) <= inside(&without) + of_b);
}

#[test]
fn the_biggest_microbatch_is_the_last_that_fits() {
    let shapes = shapes();
    let plan = plan(&shapes, &NoisyOpsSection::default(), &Default::default());
    let demand = e5c(&shapes, &plan);
    let card = demand.on_card("80 GB", 80 << 30);
    let tokens = card.microbatch_tokens.unwrap_or_default();
    let peak = |microbatch_tokens| {
        let estimate = Demand { microbatch_tokens, ..demand.clone() }.estimate();
        estimate.phases[1].bytes.max(estimate.phases[2].bytes)
    };
    assert!(tokens > 2048 && peak(tokens) <= card.usable_bytes && peak(tokens + 1) > card.usable_bytes, "{card:?}");

    let card = demand.on_card("40 GB", 40 << 30);
    let rows = card.rollout_sequences.unwrap_or_default();
    let rollout = |rows| Demand { max_sequences: Some(rows), ..demand.clone() }.estimate().phases[0].bytes;
    assert!(rollout(rows) <= card.usable_bytes && rollout(rows + 1) > card.usable_bytes, "{card:?}");
    assert!(!card.fits && card.remedies[0].contains(&format!("rollout.max_sequences: {rows}")), "{card:?}");
    let validated = Demand { max_sequences: Some(rows), validation_sequences: 640, ..demand.clone() };
    let card = validated.on_card("40 GB", 40 << 30);
    let most = |rows| Demand { validation_sequences: rows, ..demand.clone() }.validation().bytes;
    let said = card.remedies.iter().find_map(|line| line.rsplit_once("trainer.val_batch_size: ")?.1.parse().ok());
    let rows: u64 = said.unwrap_or_default();
    assert!(!card.fits && most(rows) <= card.usable_bytes && most(rows + 1) > card.usable_bytes, "{card:?}");
}

#[test]
fn what_does_not_fit_is_said_with_the_key_that_helps() {
    let shapes = shapes();
    let plan = plan(&shapes, &NoisyOpsSection::default(), &Default::default());
    let card = e5c(&shapes, &plan).on_card("24 GB", 24 << 30);
    assert_eq!((card.fits, card.microbatch_tokens, card.rollout_sequences), (false, None, None));
    assert!(card.remedies[0].contains("alone take 27.8 GB: a smaller model"), "{:?}", card.remedies);

    let kept =
        Demand { gradient_checkpointing: false, prompt_tokens: 3000, response_tokens: 6000, ..e5c(&shapes, &plan) };
    let card = kept.on_card("60 GB", 60 << 30);
    assert_eq!(card.microbatch_tokens, None);
    assert!(card.remedies.iter().any(|r| r.contains("trainer.gradient_checkpointing: true")), "{:?}", card.remedies);

    // Little more than what stands: only without the reference policy is there room for a pass.
    let tight = e5c(&shapes, &plan).on_card("31 GB", 31 << 30);
    let said = |phase: &str, key: &str| tight.remedies.iter().any(|r| r.starts_with(phase) && r.contains(key));
    assert!(said("logprobs", "algorithm.kl_coef: 0"), "{:?}", tight.remedies);
    assert!(said("update", "trainer.offload_reference: true"), "{:?}", tight.remedies);
}
