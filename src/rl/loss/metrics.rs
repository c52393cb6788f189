//! What one loss was made of: sums over tokens, so that those of micro-batches add up to those of the optimizer batch.

use serde::{Deserialize, Serialize};

/// Sums over the tokens of one micro-batch; [`merge`](LossMetrics::merge) adds those of an optimizer batch.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct LossMetrics {
    /// sum of w * policy: the share of this micro-batch in `loss/policy`.
    pub policy_loss: f64,
    /// kl_coef * sum of w * kl: its share in `loss/kl`.
    pub kl_loss: f64,
    /// -entropy_coef * mean entropy: its share in `loss/entropy`.
    pub entropy_loss: f64,
    /// Sum over tokens of the KL estimate (0 without a reference).
    pub kl_sum: f64,
    pub tokens: f64,
    /// Tokens with A < 0 and r < 1 - clip_low: their gradient is cut.
    pub clipped_low_tokens: f64,
    /// Tokens with A > 0 and r > 1 + clip_high: their gradient is cut.
    pub clipped_high_tokens: f64,
    /// Tokens with A < 0 that the dual clip caught.
    pub dual_clipped_tokens: f64,
    pub ratio_max: f64,
    /// Sum over tokens of the truncated importance weight (0 without).
    pub importance_sum: f64,
    /// Tokens whose importance weight was truncated.
    pub truncated_tokens: f64,
}

impl LossMetrics {
    pub fn merge(&mut self, other: &LossMetrics) {
        self.policy_loss += other.policy_loss;
        self.kl_loss += other.kl_loss;
        self.entropy_loss += other.entropy_loss;
        self.kl_sum += other.kl_sum;
        self.tokens += other.tokens;
        self.clipped_low_tokens += other.clipped_low_tokens;
        self.clipped_high_tokens += other.clipped_high_tokens;
        self.dual_clipped_tokens += other.dual_clipped_tokens;
        self.importance_sum += other.importance_sum;
        self.truncated_tokens += other.truncated_tokens;
        // f64::max would drop a NaN, and a NaN ratio must be seen.
        if other.ratio_max.is_nan() || other.ratio_max > self.ratio_max {
            self.ratio_max = other.ratio_max;
        }
    }

    /// False when the loss of any merged micro-batch was NaN or infinite: the step must be skipped.
    pub fn is_finite(&self) -> bool {
        (self.policy_loss + self.kl_loss + self.entropy_loss).is_finite()
    }

    /// `kl/ref`: mean KL estimate per token.
    pub fn kl_ref(&self) -> f64 {
        self.per_token(self.kl_sum)
    }

    /// `ratio/clipped_low`.
    pub fn clipped_low_ratio(&self) -> f64 {
        self.per_token(self.clipped_low_tokens)
    }

    /// `ratio/clipped_high`.
    pub fn clipped_high_ratio(&self) -> f64 {
        self.per_token(self.clipped_high_tokens)
    }

    /// `importance/mean`: mean truncated weight.
    pub fn importance_mean(&self) -> f64 {
        self.per_token(self.importance_sum)
    }

    /// `importance/truncated`.
    pub fn truncated_ratio(&self) -> f64 {
        self.per_token(self.truncated_tokens)
    }

    fn per_token(&self, sum: f64) -> f64 {
        if self.tokens > 0.0 { sum / self.tokens } else { 0.0 }
    }
}
