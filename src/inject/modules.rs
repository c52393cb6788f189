//! The modules of a model that something can be injected into, in the order that the noise keys count.

use serde::Serialize;

/// Projections that deployed kernels fuse, and whose weights therefore share one tensor scale.
pub const FUSED_PROJECTIONS: [&[&str]; 2] = [&["q_proj", "k_proj", "v_proj"], &["gate_proj", "up_proj"]];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ModuleKind {
    Embedding,
    Rmsnorm,
    Linear,
    /// One of LoRA's two matrices beside a linear.
    Adapter,
}

/// A module of a model; its position in the model's list is the module index of the noise keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleSpec {
    pub name: String,
    pub kind: ModuleKind,
    /// Decoder layer; None for the embedding, the final norm and the head.
    pub layer: Option<usize>,
    /// Linear, adapter: columns of the weight. Rmsnorm: its width. Embedding: vocabulary.
    pub in_features: usize,
    pub out_features: usize,
}

/// The one definition of Qwen2's module list and order: embedding; per layer input_layernorm, q, k, v,
/// o, post_attention_layernorm, gate, up, down; final norm; head (listed also when it is tied).
pub fn qwen2_modules(
    num_layers: usize,
    hidden: usize,
    intermediate: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocab: usize,
) -> Vec<ModuleSpec> {
    use ModuleKind::{Embedding, Linear, Rmsnorm};
    let spec = |name: String, kind, layer, in_features, out_features| ModuleSpec {
        name,
        kind,
        layer,
        in_features,
        out_features,
    };
    let (query, key_value) = (heads * head_dim, kv_heads * head_dim);
    let mut modules = vec![spec("model.embed_tokens".to_string(), Embedding, None, vocab, hidden)];
    for layer in 0..num_layers {
        for (name, kind, columns, rows) in [
            ("input_layernorm", Rmsnorm, hidden, hidden),
            ("self_attn.q_proj", Linear, hidden, query),
            ("self_attn.k_proj", Linear, hidden, key_value),
            ("self_attn.v_proj", Linear, hidden, key_value),
            ("self_attn.o_proj", Linear, query, hidden),
            ("post_attention_layernorm", Rmsnorm, hidden, hidden),
            ("mlp.gate_proj", Linear, hidden, intermediate),
            ("mlp.up_proj", Linear, hidden, intermediate),
            ("mlp.down_proj", Linear, intermediate, hidden),
        ] {
            modules.push(spec(format!("model.layers.{layer}.{name}"), kind, Some(layer), columns, rows));
        }
    }
    modules.push(spec("model.norm".to_string(), Rmsnorm, None, hidden, hidden));
    modules.push(spec("lm_head".to_string(), Linear, None, hidden, vocab));
    modules
}

/// The modules of LoRA, in the order in which they follow the model's own: for every linear of a layer that `targets` name,
/// A [rank, in] and B [out, rank].
pub fn adapter_modules(base: &[ModuleSpec], targets: &[&str], rank: usize) -> Vec<ModuleSpec> {
    let is_target = |spec: &&ModuleSpec| {
        let last = spec.name.rsplit('.').next().unwrap_or_default();
        spec.kind == ModuleKind::Linear && spec.layer.is_some() && targets.contains(&last)
    };
    let pair = |spec: &ModuleSpec| {
        let of = |suffix: &str, in_features, out_features| ModuleSpec {
            name: format!("{}.{suffix}", spec.name),
            kind: ModuleKind::Adapter,
            layer: spec.layer,
            in_features,
            out_features,
        };
        [of("lora_A", spec.in_features, rank), of("lora_B", rank, spec.out_features)]
    };
    base.iter().filter(is_target).flat_map(pair).collect()
}
