//! How much device memory a training step needs, by phase and by what it is for: arithmetic on shapes, nothing is
//! allocated. The allocations are those of `model/`, `ops/` and `rl/` as they stand; `memory/activations.rs` has what a
//! pass over tokens keeps and needs, `memory/cards.rs` turns the question round: what fits on a card.
//!
//! With M elements in matrices, v in norms and biases (always f32), e bytes of the compute dtype:
//!
//! ```text
//! weights         e M              0 where e = 4: they are the masters
//! master_weights  4 (M + v)
//! gradients       4 (M + v)        f32 buffers, held all the time
//! head_gradient   4 V h            a tied head under matmul error keeps its dW apart (update, optimizer)
//! moments         8 (M + v)        AdamW's two
//! reference       e M + 4 v        kl_coef > 0; with offload_reference only while log-probs are computed
//! quantized       (e + 9/16) Q     Q(w) of the planned linears, on a GPU in bf16 also as codes; e Q where the reference is
//! aqn_weights     4 (norms) + e (linears), of planned modules; in rollout, in the update where it sees w' too
//! kv_cache        e 2 layers rows capacity kv_heads head_dim
//! ```
//!
//! With a elements in adapters beside frozen weights, a stands in place of M + v in masters, gradients and moments, the frozen
//! weights take e M + 4 v, the head has no gradient, and the policy's own base is the reference.
//!
//! Peaks within a phase (activations, chunks of logits, optimizer chunks) are added to what stands. What is not
//! counted: the CUDA context, workspaces of libraries, fragments of the allocator (`cards::usable_bytes` leaves room
//! for them), and on a CPU the f32 copies that products of bf16 operands need.

mod activations;
pub mod cards;

use serde::Serialize;

use super::optimizer;
use super::recipe::Recipe;
use crate::inject::plan::{InjectionPlan, ModuleKind};
use crate::inject::section::{ApplyTo, InjectPhase};
use crate::model::config::Qwen2Config;
use crate::model::generate::PREFILL_TOKENS;
use crate::model::section::{Dtype, LoraSection};
use crate::model::{kv_cache, lora};
use crate::ops::token_logprobs;
use activations::Pass;

/// What the estimate depends on.
#[derive(Clone, Debug)]
pub struct Demand<'a> {
    pub shapes: &'a Qwen2Config,
    pub plan: &'a InjectionPlan,
    pub dtype: Dtype,
    pub on_gpu: bool,
    /// Adapters beside frozen weights.
    pub lora: Option<&'a LoraSection>,
    /// A second model.
    pub has_reference: bool,
    /// The reference policy is on the device only while its log-probs are computed.
    pub offload_reference: bool,
    pub gradient_checkpointing: bool,
    /// Sequences of a step.
    pub sequences: u64,
    pub group_size: u64,
    /// Most sequences decoded at once; None: all of the step.
    pub max_sequences: Option<u64>,
    /// Sequences that validation decodes at once, alone each.
    pub validation_sequences: u64,
    /// The KV cache's capacity is a multiple of it.
    pub cache_step: u64,
    /// The longest prompt and the longest response, in tokens.
    pub prompt_tokens: u64,
    pub response_tokens: u64,
    /// Tokens of a micro-batch; at least one sequence of the longest kind.
    pub microbatch_tokens: u64,
    pub temperature: f64,
    /// Bytes an element of the probabilities beside what every draw takes: top_p < 1 sorts them, top_k > 0 keeps some.
    pub filter_bytes: u64,
}

/// Bytes of one kind in one phase.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Part {
    pub name: &'static str,
    pub bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PhaseMemory {
    pub phase: &'static str,
    pub bytes: u64,
    /// In the order of the module's table; none is 0.
    pub parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryEstimate {
    /// `rollout`, `logprobs`, `update`, `optimizer`, `validation`.
    pub phases: Vec<PhaseMemory>,
    pub peak_phase: &'static str,
    pub peak_bytes: u64,
}

impl<'a> Demand<'a> {
    /// The recipe's, with every sequence as long as it may become. `on_gpu` decides what `null` means.
    pub fn of(recipe: &'a Recipe, shapes: &'a Qwen2Config, plan: &'a InjectionPlan, on_gpu: bool) -> Demand<'a> {
        let (data, trainer) = (&recipe.data, &recipe.trainer);
        let longest = (data.max_prompt_tokens + data.max_response_tokens) as u64;
        let group = recipe.rollout.group_size;
        let at_once = recipe.rollout.max_sequences.map(|most| (most / group * group).max(group) as u64);
        Demand {
            shapes,
            plan,
            dtype: recipe.model.dtype,
            on_gpu,
            lora: recipe.model.lora.as_ref(),
            has_reference: recipe.has_reference_model(),
            offload_reference: trainer.offload_reference && on_gpu,
            gradient_checkpointing: trainer.gradient_checkpointing.unwrap_or(on_gpu),
            sequences: (data.prompts_per_step * group) as u64,
            group_size: group as u64,
            max_sequences: at_once,
            validation_sequences: trainer.val_batch_size.min(data.most_val_questions()) as u64,
            cache_step: kv_cache::growth(on_gpu) as u64,
            prompt_tokens: data.max_prompt_tokens as u64,
            response_tokens: data.max_response_tokens as u64,
            microbatch_tokens: (trainer.microbatch_tokens.map(|tokens| tokens as u64))
                .unwrap_or(trainer.microbatch_sequences as u64 * longest)
                .min((trainer.minibatch_prompts * group) as u64 * longest),
            temperature: recipe.rollout.temperature,
            filter_bytes: match (recipe.rollout.top_p < 1.0, recipe.rollout.top_k > 0) {
                (true, _) => 28,
                (false, true) => 4,
                (false, false) => 0,
            },
        }
    }

    pub fn longest_sequence(&self) -> u64 {
        self.prompt_tokens + self.response_tokens
    }

    /// Sequences that are decoded at the same time.
    pub fn decoded_rows(&self) -> u64 {
        self.max_sequences.unwrap_or(self.sequences).min(self.sequences)
    }

    pub fn estimate(&self) -> MemoryEstimate {
        let phases = vec![self.rollout(), self.logprobs(), self.update(), self.optimizer(), self.validation()];
        let (mut peak_phase, mut peak_bytes) = ("", 0);
        for phase in &phases {
            if phase.bytes > peak_bytes {
                (peak_phase, peak_bytes) = (phase.phase, phase.bytes);
            }
        }
        MemoryEstimate { phases, peak_phase, peak_bytes }
    }

    fn rollout(&self) -> PhaseMemory {
        let sampling = activations::sampling(self.decoded_rows(), self.vocab(), self.temperature, self.filter_bytes);
        phase("rollout", self.decoding(self.decoded_rows(), self.group_size, self.aqn_weights(), sampling))
    }

    /// Greedy, without AQN.
    fn validation(&self) -> PhaseMemory {
        let rows = self.validation_sequences;
        phase("validation", self.decoding(rows, 1, 0, activations::sampling(rows, self.vocab(), 1.0, 0)))
    }

    fn decoding(&self, rows: u64, group: u64, aqn_weights: u64, sampling: u64) -> Vec<Part> {
        let pass = self.pass();
        // Every prompt is computed once for its group, as many at a time as a pass holds.
        let prompts = rows.div_ceil(group.max(1));
        let at_once = (PREFILL_TOKENS as u64).max(self.prompt_tokens);
        let prefill = pass.without_gradient((prompts * self.prompt_tokens).min(at_once));
        let decode = pass.without_gradient(rows) + sampling;
        let mut parts = self.standing(!self.offload_reference);
        parts.extend([
            Part { name: "quantized", bytes: self.quantized() },
            Part { name: "aqn_weights", bytes: aqn_weights },
            Part { name: "kv_cache", bytes: self.kv_cache(rows) },
            Part { name: "activations", bytes: prefill.max(decode) },
        ]);
        parts
    }

    fn logprobs(&self) -> PhaseMemory {
        let (pass, tokens, responses) = (self.pass(), self.microbatch(), self.response_rows());
        let head = pass.head_kept(responses) + pass.residual(tokens);
        let mut parts = self.standing(true);
        parts.extend([
            Part { name: "quantized", bytes: self.quantized() },
            Part { name: "aqn_weights", bytes: self.aqn_weights_of_update() },
            Part { name: "activations", bytes: pass.without_gradient(tokens).max(head) },
            Part { name: "logits_chunk", bytes: self.logits_chunk() },
        ]);
        phase("logprobs", parts)
    }

    /// Forward and backward of a micro-batch: the peak is where backward begins, in the head or in the last block.
    fn update(&self) -> PhaseMemory {
        let (pass, tokens, responses) = (self.pass(), self.microbatch(), self.response_rows());
        let layers = self.shapes.num_hidden_layers as u64;
        let (one, head) = (pass.block_kept(tokens), pass.head_kept(responses));
        let (kept, inside) = match self.gradient_checkpointing {
            // Every block's input, the residual after the last and its gradient; one block computed again.
            true => ((layers + 2) * pass.residual(tokens), one + pass.block_backward(tokens)),
            false => (layers * one + pass.residual(tokens), pass.block_backward(tokens)),
        };
        let chunk = self.logits_chunk() + self.gradient_product();
        let head_is_larger = head + chunk > inside;
        let mut parts = self.standing(!self.offload_reference);
        parts.extend([
            Part { name: "head_gradient", bytes: self.head_gradient() },
            Part { name: "quantized", bytes: self.quantized() },
            Part { name: "aqn_weights", bytes: self.aqn_weights_of_update() },
            Part { name: "activations", bytes: kept + if head_is_larger { head } else { inside } },
            Part { name: "logits_chunk", bytes: if head_is_larger { chunk } else { 0 } },
        ]);
        phase("update", parts)
    }

    fn optimizer(&self) -> PhaseMemory {
        let trained = self.trained_matrices();
        let largest = trained.into_iter().max().unwrap_or(0);
        // Scaled gradient, its square, denominator and numerator of a chunk.
        let chunks = 4 * 4 * (optimizer::CHUNK as u64).min(largest);
        let mut parts = self.standing(!self.offload_reference);
        parts.extend([
            Part { name: "head_gradient", bytes: self.head_gradient() },
            Part { name: "quantized", bytes: self.quantized() },
            Part { name: "aqn_weights", bytes: self.aqn_weights_of_update() },
            Part { name: "optimizer_chunks", bytes: chunks },
        ]);
        phase("optimizer", parts)
    }

    /// What is there in every phase, from the second step on.
    fn standing(&self, reference: bool) -> Vec<Part> {
        let (m, v) = self.elements();
        let frozen = self.element_bytes() * m + 4 * v + self.reference_quantized();
        let rounded = |trained: u64| if self.dtype == Dtype::F32 { 0 } else { self.element_bytes() * trained };
        let (weights, trained) = match self.lora {
            None => (rounded(m), m + v),
            Some(lora) => {
                let adapters = lora::elements(self.shapes, lora);
                (self.element_bytes() * m + 4 * v + rounded(adapters), adapters)
            }
        };
        vec![
            Part { name: "weights", bytes: weights },
            Part { name: "master_weights", bytes: 4 * trained },
            Part { name: "gradients", bytes: 4 * trained },
            Part { name: "moments", bytes: 8 * trained },
            Part { name: "reference", bytes: if self.has_reference && reference { frozen } else { 0 } },
        ]
    }

    fn pass(&self) -> Pass<'_> {
        let adapter_columns = self.lora.map_or(0, |lora| (lora.rank * lora.targets.len()) as u64);
        Pass { shapes: self.shapes, element_bytes: self.element_bytes(), adapter_columns }
    }

    fn element_bytes(&self) -> u64 {
        match self.dtype {
            Dtype::F32 => 4,
            Dtype::Bf16 => 2,
        }
    }

    fn vocab(&self) -> u64 {
        self.shapes.vocab_size as u64
    }

    /// Names and elements of the matrices.
    fn matrices(&self) -> impl Iterator<Item = (String, u64)> {
        let matrices = self.shapes.parameter_shapes().into_iter().filter(|(_, shape)| shape.len() > 1);
        matrices.map(|(name, shape)| (name, shape.iter().map(|&d| d as u64).product()))
    }

    /// Elements of each matrix that the optimizer updates.
    fn trained_matrices(&self) -> Vec<u64> {
        match self.lora {
            None => self.matrices().map(|(_, n)| n).collect(),
            Some(lora) => {
                let adapters = lora::modules(self.shapes, lora);
                adapters.iter().map(|spec| (spec.in_features * spec.out_features) as u64).collect()
            }
        }
    }

    /// Elements of matrices, and of norms and biases.
    fn elements(&self) -> (u64, u64) {
        let matrices = self.matrices().map(|(_, n)| n).sum();
        (matrices, self.shapes.parameter_count() - matrices)
    }

    /// Elements of the weight of a module of the plan.
    fn weight_elements(&self, module: &str) -> u64 {
        let own = self.matrices().find(|(name, _)| name.strip_suffix(".weight") == Some(module)).map(|(_, n)| n);
        // A tied head has no matrix of its own name.
        own.unwrap_or(if module == "lm_head" { self.vocab() * self.shapes.hidden_size as u64 } else { 0 })
    }

    fn quantized_elements(&self) -> u64 {
        let planned = self.plan.modules.iter().filter(|m| m.weight_format.is_some());
        planned.map(|m| self.weight_elements(&m.name)).sum()
    }

    fn quantized(&self) -> u64 {
        let phases = [InjectPhase::Rollout, InjectPhase::OldLogprobs, InjectPhase::Forward];
        // The base of adapters is the reference policy as well.
        let of_reference = self.lora.is_some() && self.plan.quant_in(InjectPhase::RefLogprobs);
        let applies = of_reference || phases.into_iter().any(|phase| self.plan.quant_in(phase));
        // On a GPU once more as codes: 4 bits an element, 8 a block of 16 or 32.
        let packed = if self.on_gpu && self.dtype == Dtype::Bf16 { self.quantized_elements() * 9 / 16 } else { 0 };
        if applies { self.element_bytes() * self.quantized_elements() + packed } else { 0 }
    }

    fn reference_quantized(&self) -> u64 {
        let applies = self.plan.quant_in(InjectPhase::RefLogprobs);
        if applies { self.element_bytes() * self.quantized_elements() } else { 0 }
    }

    fn aqn_weights(&self) -> u64 {
        let planned = self.plan.modules.iter().filter(|m| self.plan.aqn_enabled && m.aqn_multiplier != 0.0);
        planned
            .map(|m| match m.kind {
                ModuleKind::Rmsnorm => 4 * self.shapes.hidden_size as u64,
                _ => self.element_bytes() * self.weight_elements(&m.name),
            })
            .sum()
    }

    fn aqn_weights_of_update(&self) -> u64 {
        if self.plan.aqn_apply_to == ApplyTo::RolloutAndUpdate { self.aqn_weights() } else { 0 }
    }

    /// With one layer's keys or values once more: rows that go on are copied.
    fn kv_cache(&self, rows: u64) -> u64 {
        let shapes = self.shapes;
        let capacity = self.longest_sequence().next_multiple_of(self.cache_step.max(1));
        let one = self.element_bytes() * rows * capacity * (shapes.num_key_value_heads * shapes.head_dim) as u64;
        (2 * shapes.num_hidden_layers as u64 + 1) * one
    }

    fn head_gradient(&self) -> u64 {
        let noisy = self.head_error() && self.plan.matmul_in(InjectPhase::Backward) && self.lora.is_none();
        if noisy && self.shapes.tie_word_embeddings { 4 * self.weight_elements("lm_head") } else { 0 }
    }

    fn head_error(&self) -> bool {
        self.plan.modules.iter().any(|m| m.name == "lm_head" && m.matmul_error != 0.0)
    }

    fn microbatch(&self) -> u64 {
        self.microbatch_tokens.max(self.longest_sequence())
    }

    /// Response tokens of a micro-batch.
    fn response_rows(&self) -> u64 {
        (self.microbatch() * self.response_tokens).div_ceil(self.longest_sequence().max(1))
    }

    /// Three f32 matrices of a chunk of logits: log-softmax, probabilities and their product for the entropy; going back
    /// softmax and dlogits in f32 and in the compute dtype.
    fn logits_chunk(&self) -> u64 {
        let row = 4 * self.vocab();
        3 * (token_logprobs::CHUNK_BYTES as u64 / row).max(1).min(self.response_rows()) * row
    }

    /// On a GPU a product without error is the library's: the head's dW is a matrix of its own before it is added.
    fn gradient_product(&self) -> u64 {
        let noisy = self.head_error() && self.plan.matmul_in(InjectPhase::Backward);
        if self.on_gpu && !noisy && self.lora.is_none() { 4 * self.weight_elements("lm_head") } else { 0 }
    }
}

fn phase(phase: &'static str, parts: Vec<Part>) -> PhaseMemory {
    let parts: Vec<Part> = parts.into_iter().filter(|part| part.bytes > 0).collect();
    PhaseMemory { phase, bytes: parts.iter().map(|part| part.bytes).sum(), parts }
}

#[cfg(test)]
mod tests;
