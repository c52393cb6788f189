//! What fits on a card of a given memory: the biggest micro-batch and the most sequences decoded at once, or what does
//! not fit and which key helps.

use serde::Serialize;

use super::{Demand, MemoryEstimate, PhaseMemory};

/// Of a card's memory, what is left for tensors: CUDA's context, workspaces of libraries and fragments take the rest.
const USABLE_PERCENT: u64 = 94;

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CardFit {
    pub name: String,
    pub bytes: u64,
    pub usable_bytes: u64,
    /// Whether the recipe fits as it stands.
    pub fits: bool,
    /// Tokens of the biggest micro-batch whose log-probs and update fit; null: not even one longest sequence.
    pub microbatch_tokens: Option<u64>,
    /// The most sequences that can be decoded at once; null: not even one group.
    pub rollout_sequences: Option<u64>,
    /// What does not fit and which key helps.
    pub remedies: Vec<String>,
}

pub fn usable_bytes(bytes: u64) -> u64 {
    bytes / 100 * USABLE_PERCENT
}

impl Demand<'_> {
    /// What of this fits into `bytes` of device memory.
    pub fn on_card(&self, name: &str, bytes: u64) -> CardFit {
        let usable_bytes = usable_bytes(bytes);
        let estimate = self.estimate();
        CardFit {
            name: name.to_string(),
            bytes,
            usable_bytes,
            fits: estimate.peak_bytes <= usable_bytes,
            microbatch_tokens: self.biggest_microbatch(usable_bytes),
            rollout_sequences: self.most_sequences(usable_bytes),
            remedies: self.remedies(&estimate, usable_bytes),
        }
    }

    /// At most all tokens of an optimizer update would be of use, but the split is the recipe's: no bound but memory.
    fn biggest_microbatch(&self, usable: u64) -> Option<u64> {
        let fits = |tokens: u64| {
            let demand = Demand { microbatch_tokens: tokens, ..self.clone() };
            demand.logprobs().bytes.max(demand.update().bytes) <= usable
        };
        let all = self.sequences * self.longest_sequence();
        largest(self.longest_sequence(), all.max(self.longest_sequence()), fits)
    }

    fn most_sequences(&self, usable: u64) -> Option<u64> {
        let fits = |rows: u64| Demand { max_sequences: Some(rows), ..self.clone() }.rollout().bytes <= usable;
        largest(self.group_size.min(self.sequences).max(1), self.sequences.max(1), fits)
    }

    fn remedies(&self, estimate: &MemoryEstimate, usable: u64) -> Vec<String> {
        let gb = |bytes: u64| format!("{:.1} GB", bytes as f64 / 1e9);
        let mut said = Vec::new();
        let standing: u64 = self.standing(false).iter().map(|part| part.bytes).sum();
        let (quantized, frozen) = (self.quantized(), self.lora.is_some());
        if standing + quantized > usable {
            let what = if frozen {
                "weights, adapters with gradients and moments"
            } else {
                "weights, master weights, gradients and moments"
            };
            let also = if quantized > 0 { ", and weights as they are quantized," } else { "" };
            return vec![format!("{what}{also} alone take {}: a smaller model is needed", gb(standing + quantized))];
        }
        let too_large = |name: &str| estimate.phases.iter().find(|p| p.phase == name && p.bytes > usable);
        if let Some(rollout) = too_large("rollout") {
            let cache = bytes_of(rollout, "kv_cache");
            let help = match self.most_sequences(usable) {
                Some(rows) => format!("rollout.max_sequences: {rows}, or a smaller data.max_response_tokens"),
                None => {
                    format!("a smaller data.max_response_tokens or data.max_prompt_tokens{}", self.without_reference())
                }
            };
            said.push(format!("rollout takes {}, {} of it KV cache: {help}", gb(rollout.bytes), gb(cache)));
        }
        if let Some(validation) = too_large("validation") {
            let fits = |rows: u64| Demand { validation_sequences: rows, ..self.clone() }.validation().bytes <= usable;
            let help = match largest(1, self.validation_sequences, fits) {
                Some(rows) => format!("trainer.val_batch_size: {rows}"),
                None => format!("shorter sequences{}", self.without_reference()),
            };
            said.push(format!("validation takes {}: {help}", gb(validation.bytes)));
        }
        for phase in ["logprobs", "update"].into_iter().filter_map(too_large) {
            let keeps = phase.phase == "update" && !self.gradient_checkpointing;
            let help = match self.biggest_microbatch(usable) {
                Some(tokens) => format!("a micro-batch of at most {tokens} tokens"),
                None if keeps => "trainer.gradient_checkpointing: true".to_string(),
                // Its log-probs need the reference policy where they are computed.
                None if phase.phase == "logprobs" => format!("shorter sequences{}", self.no_reference()),
                None => format!("shorter sequences{}", self.without_reference()),
            };
            said.push(format!("{} takes {}: {help}", phase.phase, gb(phase.bytes)));
        }
        if let Some(optimizer) = too_large("optimizer") {
            said.push(format!("optimizer takes {}{}", gb(optimizer.bytes), self.without_reference()));
        }
        said
    }

    fn without_reference(&self) -> &'static str {
        match (self.has_reference, self.offload_reference) {
            (true, false) => ", or trainer.offload_reference: true",
            _ => self.no_reference(),
        }
    }

    fn no_reference(&self) -> &'static str {
        if self.has_reference { ", or algorithm.kl_coef: 0" } else { "" }
    }
}

pub(super) fn bytes_of(phase: &PhaseMemory, part: &str) -> u64 {
    phase.parts.iter().find(|p| p.name == part).map_or(0, |p| p.bytes)
}

/// The largest n in least ..= most for which `fits`, which holds for all smaller ones too.
fn largest(least: u64, most: u64, fits: impl Fn(u64) -> bool) -> Option<u64> {
    if !fits(least) {
        return None;
    }
    let (mut good, mut bad) = (least, most + 1);
    while bad - good > 1 {
        let middle = good + (bad - good) / 2;
        if fits(middle) { good = middle } else { bad = middle }
    }
    Some(good)
}
