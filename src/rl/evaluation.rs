//! Greedy accuracy on held-out questions, in every condition that applies.
//!
//! clean: nothing injected; noisy: matmul error; quantized: fake quantization; deployed: both. Keys hold the question's
//! index and no step, so that evaluations of different steps and runs are paired, question by question.

use serde::Serialize;

use super::microbatch::Halving;
use super::recipe::PreparedQuestion;
use super::reward;
use super::reward::scorer::{Item, Scorer};
use crate::Result;
use crate::inject::injector::Injector;
use crate::inject::section::InjectPhase;
use crate::model::generate::{Batching, Completion, Prompt, Request, Sampling};
use crate::model::pass::{Pass, PromptUid};
use crate::model::qwen2::Qwen2;
use crate::model::tokenizer::Tokenizer;
use crate::numerics::noise_key::{Phase, VALIDATION_STEP};
use crate::ops::matmul_error::RowKeys;
use crate::ops::profile::span;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Condition {
    Clean,
    Noisy,
    Quantized,
    Deployed,
}

impl Condition {
    pub const ALL: [Condition; 4] = [Condition::Clean, Condition::Noisy, Condition::Quantized, Condition::Deployed];

    pub fn name(self) -> &'static str {
        match self {
            Condition::Clean => "clean",
            Condition::Noisy => "noisy",
            Condition::Quantized => "quantized",
            Condition::Deployed => "deployed",
        }
    }

    /// The conditions that differ under the injector's plan; the last one is the configuration's own.
    pub fn applying(injector: &Injector) -> Vec<Condition> {
        let plan = injector.plan();
        let noisy =
            plan.matmul_phases.contains(InjectPhase::Validation) && plan.modules.iter().any(|m| m.matmul_error != 0.0);
        let quantized = plan.quant_phases.contains(InjectPhase::Validation)
            && plan.modules.iter().any(|m| m.weight_format.is_some() || m.activation_format.is_some());
        Condition::ALL.into_iter().filter(|condition| condition.applies(noisy, quantized)).collect()
    }

    /// Whether it differs from the others in a run that is `noisy`, `quantized` in validation.
    pub fn applies(self, noisy: bool, quantized: bool) -> bool {
        match self {
            Condition::Clean => true,
            Condition::Noisy => noisy,
            Condition::Quantized => quantized,
            Condition::Deployed => noisy && quantized,
        }
    }

    /// A validation pass under this condition.
    pub fn pass(self, injector: &Injector) -> Pass<'_> {
        Pass {
            matmul_error: matches!(self, Condition::Noisy | Condition::Deployed),
            fake_quant: matches!(self, Condition::Quantized | Condition::Deployed),
            ..Pass::injected(injector, Phase::Validation, RowKeys::new(Vec::new()))
        }
    }
}

/// One validation: per condition the answers, in the order of the questions.
pub struct Validation {
    pub step: u64,
    pub conditions: Vec<(Condition, Vec<Answer>)>,
}

impl Validation {
    pub fn correct(&self, condition: Condition) -> Option<(u64, u64)> {
        let (_, answers) = self.conditions.iter().find(|(c, _)| *c == condition)?;
        Some((answers.iter().filter(|a| a.correct).count() as u64, answers.len() as u64))
    }

    /// The configuration's own full condition: the last one.
    pub fn headline(&self) -> Option<(Condition, f64)> {
        let (condition, _) = self.conditions.last()?;
        let (correct, n) = self.correct(*condition)?;
        Some((*condition, correct as f64 / n.max(1) as f64))
    }
}

/// One question's outcome.
#[derive(Clone, Debug, Serialize)]
pub struct Answer {
    pub index: u32,
    pub correct: bool,
    /// The answer is there in the form that `strict` wants, right or wrong.
    pub well_formed: bool,
    pub response_tokens: usize,
    pub finished: bool,
    pub text: String,
}

pub struct Evaluation<'a> {
    pub model: &'a Qwen2,
    pub tokenizer: &'a Tokenizer,
    pub questions: &'a [PreparedQuestion],
    pub scorer: &'a Scorer,
    pub max_new_tokens: usize,
    pub batching: Batching,
    /// Of what is decoded at once; told too that decoding goes another way than it was to.
    pub halving: Halving<'a>,
}

impl Evaluation<'_> {
    /// One answer per question, in order. `progress` counts questions.
    pub fn run(&self, pass: &Pass, progress: impl FnMut(usize)) -> Result<Vec<Answer>> {
        let _span = span("validation");
        let prompts: Vec<Prompt> = self
            .questions
            .iter()
            .map(|q| Prompt {
                uid: PromptUid { step: VALIDATION_STEP, dataset_index: q.index },
                ids: q.prompt_ids.clone(),
            })
            .collect();
        let (sampling, stop_ids) = (Sampling::greedy(), &self.model.config.eos_token_ids);
        let request =
            Request { batching: self.batching, ..Request::new(&prompts, 1, self.max_new_tokens, stop_ids, &sampling) };
        let completions = self.halving.generate(self.model, &request, pass, "trainer.val_batch_size", progress)?;
        let decode = |c: &Completion| self.tokenizer.decode(c.sequence.response());
        let texts = completions.iter().map(decode).collect::<Result<Vec<String>>>()?;
        let item = |(question, text)| Item { question, text, member: 0, validation: true };
        let items: Vec<Item> = self.questions.iter().zip(texts.iter().map(String::as_str)).map(item).collect();
        let correct = self.scorer.correct(&items)?;
        Ok(completions.iter().zip(&items).zip(correct).map(|((c, item), right)| answer(c, item, right)).collect())
    }
}

fn answer(completion: &Completion, item: &Item, correct: bool) -> Answer {
    Answer {
        index: item.question.index,
        correct,
        well_formed: reward::strict_answer(item.text).is_some(),
        response_tokens: completion.logprobs.len(),
        finished: completion.finished,
        text: item.text.to_string(),
    }
}
