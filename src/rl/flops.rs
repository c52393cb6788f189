//! How many floating-point operations a step is: arithmetic on shapes and token counts (a multiply-add counts as two).
//!
//! With B elements in the linears of all blocks, a in adapters beside them, q = heads head_dim, L layers, V vocabulary, h
//! hidden:
//!
//! ```text
//! forward  2 (B + a) tokens + 4 q L pairs + 2 V h rows
//! ```
//!
//! `pairs`: a query and a key that it may see, n (n + 1) / 2 for a sequence of n tokens (scores and their sum over values are
//! 2 q each); `rows`: where logits are computed. Norms, rotation, SiLU, softmax, sampling, noise and quantization count
//! nothing, as usual.
//!
//! ```text
//! rollout   every prompt once for its group; then every response token but the last, which is sampled and not read
//! logprobs  every sequence without its last token, rows = response tokens; once more for the reference policy, without a
//! update    three times its forward: backward is two products for each; of a frozen weight (all but a) one
//! recomputed  what the update computes again: the head's logits, and with gradient checkpointing all blocks
//! ```
//!
//! The model's share (MFU) is without what is recomputed (Chowdhery et al. 2022, appendix B).

use crate::model::config::Qwen2Config;

/// Operations and tokens of a phase.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    pub flops: f64,
    /// Sampled tokens (rollout), tokens of the sequences (otherwise).
    pub tokens: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepWork {
    pub rollout: Work,
    pub logprobs: Work,
    pub update: Work,
    /// Of the update, beside `update`.
    pub recomputed_flops: f64,
}

/// Which passes a step makes.
#[derive(Clone, Copy, Debug)]
pub struct Passes {
    pub reference: bool,
    pub gradient_checkpointing: bool,
    /// Elements of adapters beside a frozen model; None: the model itself is trained.
    pub adapter_elements: Option<u64>,
}

/// The work of a step whose sequences are `lengths`: (prompt tokens, response tokens), group members together.
pub fn step_work(shapes: &Qwen2Config, lengths: &[(usize, usize)], group_size: usize, passes: Passes) -> StepWork {
    let base = PerUnit::of(shapes);
    let adapters = 2.0 * passes.adapter_elements.unwrap_or(0) as f64;
    let per = PerUnit { token: base.token + adapters, ..base };
    let mut work = StepWork::default();
    let mut forward = Counts::default();
    for (s, &(prompt, response)) in lengths.iter().enumerate() {
        let (prompt, response) = (prompt as f64, response as f64);
        let read = (prompt + response - 1.0).max(0.0);
        if s % group_size.max(1) == 0 {
            work.rollout.flops += per.flops(Counts { tokens: prompt, pairs: triangle(prompt), rows: 1.0 });
        }
        let decoded = (response - 1.0).max(0.0);
        let pairs = triangle(prompt + decoded) - triangle(prompt);
        work.rollout.flops += per.flops(Counts { tokens: decoded, pairs, rows: decoded });
        work.rollout.tokens += response as u64;
        work.logprobs.tokens += (prompt + response) as u64;
        forward.add(Counts { tokens: read, pairs: triangle(read), rows: response });
    }
    work.update.tokens = work.logprobs.tokens;
    work.logprobs.flops = per.flops(forward) + if passes.reference { base.flops(forward) } else { 0.0 };
    let of_weights = base.token * forward.tokens + base.row * forward.rows;
    work.update.flops = 3.0 * per.flops(forward) - if passes.adapter_elements.is_some() { of_weights } else { 0.0 };
    let blocks = if passes.gradient_checkpointing { per.flops(Counts { rows: 0.0, ..forward }) } else { 0.0 };
    work.recomputed_flops = blocks + per.row * forward.rows;
    work
}

/// n (n + 1) / 2.
fn triangle(n: f64) -> f64 {
    n * (n + 1.0) / 2.0
}

#[derive(Clone, Copy, Default)]
struct Counts {
    tokens: f64,
    pairs: f64,
    rows: f64,
}

impl Counts {
    fn add(&mut self, other: Counts) {
        self.tokens += other.tokens;
        self.pairs += other.pairs;
        self.rows += other.rows;
    }
}

/// Operations of a forward pass by unit.
#[derive(Clone, Copy)]
struct PerUnit {
    token: f64,
    pair: f64,
    row: f64,
}

impl PerUnit {
    fn of(shapes: &Qwen2Config) -> PerUnit {
        let linears: usize = shapes
            .parameter_shapes()
            .iter()
            .filter(|(name, shape)| shape.len() > 1 && name.starts_with("model.layers."))
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum();
        let attention = shapes.num_attention_heads * shapes.head_dim * shapes.num_hidden_layers;
        PerUnit {
            token: 2.0 * linears as f64,
            pair: 4.0 * attention as f64,
            row: 2.0 * shapes.vocab_size as f64 * shapes.hidden_size as f64,
        }
    }

    fn flops(&self, counts: Counts) -> f64 {
        self.token * counts.tokens + self.pair * counts.pairs + self.row * counts.rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shapes() -> Qwen2Config {
        Qwen2Config {
            hidden_size: 4,
            intermediate_size: 8,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            head_dim: 2,
            vocab_size: 10,
            ..Qwen2Config::preset("tiny-4x64").unwrap_or_else(|e| panic!("{e}"))
        }
    }

    /// A block: q 4x4, k and v 2x4, o 4x4, three of 8x4 = 144 elements; two blocks 288. A pair is 4 x 4 x 2 = 32, a row of
    /// logits 2 x 10 x 4 = 80. Two members of one group: a prompt of 3, responses of 2 and 4 tokens.
    #[test]
    fn a_group_is_counted_by_hand() {
        let passes = Passes { reference: true, gradient_checkpointing: true, adapter_elements: None };
        let work = step_work(&shapes(), &[(3, 2), (3, 4)], 2, passes);
        let prefill = 576 * 3 + 32 * 6 + 80;
        // The second token of the first (it sees 4 positions), tokens 2 to 4 of the other (4, 5, 6).
        let decode = (576 + 32 * 4 + 80) + (576 * 3 + 32 * 15 + 80 * 3);
        assert_eq!(work.rollout, Work { flops: f64::from(prefill + decode), tokens: 6 });
        // 4 and 6 tokens are read: 10 and 21 pairs; 2 and 4 rows.
        let forward = f64::from(576 * 10 + 32 * 31 + 80 * 6);
        assert_eq!(work.logprobs, Work { flops: 2.0 * forward, tokens: 12 });
        assert_eq!(work.update, Work { flops: 3.0 * forward, tokens: 12 });
        assert_eq!(work.recomputed_flops, forward);
    }

    #[test]
    fn passes_that_are_not_made_count_nothing() {
        let passes = Passes { reference: false, gradient_checkpointing: false, adapter_elements: None };
        let work = step_work(&shapes(), &[(3, 2)], 1, passes);
        assert_eq!(3.0 * work.logprobs.flops, work.update.flops);
        assert_eq!(work.recomputed_flops, 160.0, "the head alone");
        let two_prompts = step_work(&shapes(), &[(3, 2), (3, 2)], 1, passes);
        assert_eq!(two_prompts.rollout.flops, 2.0 * work.rollout.flops);
    }

    /// The group above with 10 elements in adapters.
    #[test]
    fn a_frozen_weight_has_one_product_on_the_way_back() {
        let passes = Passes { reference: true, gradient_checkpointing: false, adapter_elements: Some(10) };
        let work = step_work(&shapes(), &[(3, 2), (3, 4)], 2, passes);
        let (linears, attention, logits, adapters) = (5760.0, 32.0 * 31.0, 480.0, 200.0);
        assert_eq!(work.logprobs.flops, 2.0 * (linears + attention + logits) + adapters);
        assert_eq!(work.update.flops, 2.0 * (linears + logits) + 3.0 * (attention + adapters));
    }

    /// Issue 8's own count for Qwen2.5-1.5B: about 4.6 PFLOP for 225 k tokens with recomputation, log-probs of both policies
    /// and decoding.
    #[test]
    fn the_recipe_at_1_5b_is_the_known_size() {
        let shapes = Qwen2Config::preset("qwen2.5-1.5b").unwrap_or_else(|e| panic!("{e}"));
        let passes = Passes { reference: true, gradient_checkpointing: true, adapter_elements: None };
        let work = step_work(&shapes, &[(102, 250); 640], 5, passes);
        let all = work.rollout.flops + work.logprobs.flops + work.update.flops + work.recomputed_flops;
        assert!((4.2e15..5.0e15).contains(&all), "{all:e}");
    }
}
