//! The part of `temper plan` about device memory: the estimate by phase, and what fits on cards of several sizes.

use serde_json::{Value, json};

use super::common;
use crate::config::Config;
use crate::device::gpu;
use crate::inject::plan::InjectionPlan;
use crate::model::config::Qwen2Config;
use crate::rl::memory::cards::CardFit;
use crate::rl::memory::{Demand, MemoryEstimate};

/// Cards that are always asked about.
const CARDS: [(&str, u64); 3] = [("80 GB", 80 << 30), ("40 GB", 40 << 30), ("24 GB", 24 << 30)];

/// The estimate of a configuration on a GPU, its longest sequences assumed everywhere.
pub struct Memory {
    estimate: MemoryEstimate,
    cards: Vec<CardFit>,
    assumed: Value,
}

impl Memory {
    pub fn of(config: &Config, shapes: &Qwen2Config, plan: &InjectionPlan) -> Memory {
        let recipe = common::recipe(config);
        let demand = Demand::of(&recipe, shapes, plan, true);
        let mut cards: Vec<CardFit> = CARDS.iter().map(|(name, bytes)| demand.on_card(name, *bytes)).collect();
        // The machine's own, where it has one.
        let present = gpu::probe().map(|found| found.gpus).unwrap_or_default();
        let present = present.into_iter().find_map(|gpu| Some((gpu.name, gpu.memory_total_bytes?)));
        cards.extend(present.map(|(name, bytes)| demand.on_card(&name, bytes)));
        let assumed = json!({
            "sequences": demand.sequences,
            "decoded_at_once": demand.decoded_rows(),
            "validated_at_once": demand.validation_sequences,
            "prompt_tokens": demand.prompt_tokens,
            "response_tokens": demand.response_tokens,
            "microbatch_tokens": demand.microbatch_tokens.max(demand.longest_sequence()),
            "gradient_checkpointing": demand.gradient_checkpointing,
            "offload_reference": demand.offload_reference,
        });
        Memory { estimate: demand.estimate(), cards, assumed }
    }

    /// `{"phases": [...], "peak_phase", "peak_bytes", "assumed": {...}, "cards": [...]}`.
    pub fn json(&self) -> Value {
        let mut all = json!(self.estimate);
        all["assumed"] = self.assumed.clone();
        all["cards"] = json!(self.cards);
        all
    }

    pub fn text(&self) -> String {
        let number = |key: &str| self.assumed[key].to_string();
        format!(
            "memory on a GPU, estimated with every sequence at its longest ({} + {} tokens), {} decoded at once, micro-batches of {} tokens, GB:\n{}\n\n{}\n",
            number("prompt_tokens"),
            number("response_tokens"),
            number("decoded_at_once"),
            number("microbatch_tokens"),
            self.phases(),
            self.fits()
        )
    }

    /// A row per part, a column per phase.
    fn phases(&self) -> String {
        let phases = &self.estimate.phases;
        let mut header = vec!["memory"];
        header.extend(phases.iter().map(|phase| phase.phase));
        let mut table = super::plan::table(&header);
        let mut names: Vec<&str> = Vec::new();
        for part in phases.iter().flat_map(|phase| &phase.parts) {
            if !names.contains(&part.name) {
                names.push(part.name);
            }
        }
        for name in names {
            let cell = |part: Option<u64>| part.map_or("-".to_string(), gb);
            let bytes = phases.iter().map(|p| p.parts.iter().find(|part| part.name == name).map(|part| part.bytes));
            table.add_row(std::iter::once(name.to_string()).chain(bytes.map(cell)));
        }
        let sums = phases.iter().map(|phase| gb(phase.bytes));
        table.add_row(std::iter::once("together".to_string()).chain(sums));
        table.to_string()
    }

    fn fits(&self) -> String {
        let header = ["card", "usable, GB", "fits", "biggest micro-batch, tokens", "decoded at once", "what helps"];
        let mut table = super::plan::table(&header);
        let count = |n: Option<u64>| n.map_or("none".to_string(), |n| n.to_string());
        for card in &self.cards {
            table.add_row([
                card.name.clone(),
                gb(card.usable_bytes),
                if card.fits { "yes" } else { "no" }.to_string(),
                count(card.microbatch_tokens),
                count(card.rollout_sequences),
                card.remedies.join("; "),
            ]);
        }
        table.to_string()
    }
}

fn gb(bytes: u64) -> String {
    match bytes as f64 / 1e9 {
        small if small < 0.01 => format!("{small:.1e}"),
        gb => format!("{gb:.2}"),
    }
}
