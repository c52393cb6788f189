//! Bytes of activations, per token unless said: what autograd keeps of a block, and what a pass needs besides.
//!
//! h hidden, i intermediate, q = heads head_dim, V vocabulary, e bytes of the compute dtype. Rotated q, and k and v
//! repeated for their query heads, are counted for all heads.
//!
//! ```text
//! block_kept      2 h (8 + e)        each norm: x in f32, x normalized in f32 (not beside a frozen weight), its output (the
//!                                    linears' input)
//!               + 4 e q + e q        q, k, v and the output of attention; o_proj's input
//!               + 4 heads + 8 dim    logsumexp; cos and sin
//!               + 4 e i              gate before and after SiLU, up, their product
//!               + e r targets        what every adapter's B reads
//! block_backward  2 e i + 3 e h      gradients that stand beside what is kept where down_proj's backward ends
//! without_gradient  2 e h + max(2 e h + 3 e i, 16 h, 18 q + 3 e q)   residual; MLP (with adapters e i more, B's product), norm
//!                                    or rotation in f32
//! residual        e h
//! head_kept       h (8 + 2 e)        of each row that predicts: gathered rows, the final norm
//! sampling        4 f32 of [rows, V], a mask and its i64 sum; 28 bytes an element more where rows are sorted
//! ```

use crate::model::config::Qwen2Config;

pub(super) struct Pass<'a> {
    pub(super) shapes: &'a Qwen2Config,
    pub(super) element_bytes: u64,
    /// r times the linears of a block that have an adapter.
    pub(super) adapter_columns: u64,
}

impl Pass<'_> {
    fn h(&self) -> u64 {
        self.shapes.hidden_size as u64
    }

    fn i(&self) -> u64 {
        self.shapes.intermediate_size as u64
    }

    fn q(&self) -> u64 {
        (self.shapes.num_attention_heads * self.shapes.head_dim) as u64
    }

    pub(super) fn block_kept(&self, tokens: u64) -> u64 {
        let (h, i, q, e) = (self.h(), self.i(), self.q(), self.element_bytes);
        let small = 4 * self.shapes.num_attention_heads as u64 + 8 * self.shapes.head_dim as u64;
        let norm = if self.adapter_columns > 0 { 4 } else { 8 };
        tokens * (2 * h * (norm + e) + 5 * e * q + small + 4 * e * i + e * self.adapter_columns)
    }

    pub(super) fn block_backward(&self, tokens: u64) -> u64 {
        tokens * self.element_bytes * (2 * self.i() + 3 * self.h())
    }

    pub(super) fn without_gradient(&self, tokens: u64) -> u64 {
        let (h, i, q, e) = (self.h(), self.i(), self.q(), self.element_bytes);
        let of_b = if self.adapter_columns > 0 { e * i } else { 0 };
        let inside = (2 * e * h + 3 * e * i + of_b).max(16 * h).max(18 * q + 3 * e * q);
        tokens * (2 * e * h + inside)
    }

    pub(super) fn residual(&self, tokens: u64) -> u64 {
        tokens * self.element_bytes * self.h()
    }

    pub(super) fn head_kept(&self, rows: u64) -> u64 {
        rows * self.h() * (8 + 2 * self.element_bytes)
    }
}

/// The logits of a decode step and what drawing a token from them needs (model/generate.rs).
pub(super) fn sampling(rows: u64, vocab: u64, temperature: f64, filter_bytes: u64) -> u64 {
    let scaled = if temperature == 1.0 { 0 } else { 4 };
    rows * vocab * (4 * 4 + 1 + 8 + scaled + filter_bytes)
}
