//! How much is computed at once: micro-batches by sequences or by tokens, halved when memory runs out.
//!
//! Rows are packed without padding and a draw follows its token's key, so the split changes nothing but rounding, with one
//! exception: `dw_draw: per_microbatch` draws an error for each micro-batch, and its split stays as configured.

use std::cell::Cell;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::section::TrainerSection;
use crate::inject::section::DwDraw;
use crate::model::generate::{Batching, Completion, Request, generate};
use crate::model::pass::Pass;
use crate::model::qwen2::Qwen2;
use crate::{Error, Result};

/// How often out-of-memory has halved what is computed at once; part of a run's state, so that a resume goes on with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Halvings {
    pub microbatch: u32,
    pub rollout: u32,
    pub validation: u32,
}

/// What a rollout or a validation that runs out of memory changes.
#[derive(Clone, Copy)]
pub struct Halving<'a> {
    /// Halvings of the sequences decoded at once, so far in the run.
    pub count: &'a Cell<u32>,
    pub warn: &'a dyn Fn(&str),
}

impl Halving<'_> {
    /// As [`generate`], but where memory runs out with half as many sequences at a time, from then on. A sequence does not depend
    /// on which others are decoded beside it. `key` limits how many these are.
    ///
    /// # Errors
    /// Those of [`generate`]; `OutOfMemory` where one group at a time is too much.
    pub fn generate(
        &self,
        model: &Qwen2,
        request: &Request,
        pass: &Pass,
        key: &str,
        mut progress: impl FnMut(usize),
    ) -> Result<Vec<Completion>> {
        let all = request.prompts.len() * request.group_size;
        let most = request.batching.max_sequences.unwrap_or(all).min(all);
        pass.injector.iter().for_each(|injector| injector.settle());
        loop {
            // Nothing of an attempt that failed counts.
            pass.injector.iter().for_each(|injector| injector.forget());
            let at_once = (most >> self.count.get()).max(request.group_size);
            let batching = Batching { max_sequences: Some(at_once), ..request.batching };
            match generate(model, &Request { batching, warn: self.warn, ..*request }, pass, &mut progress) {
                Err(Error::OutOfMemory(message)) if at_once > request.group_size => {
                    self.count.set(self.count.get() + 1);
                    (self.warn)(&format!(
                        "out of memory: {message}; from now on fewer than {at_once} sequences at a time, as with a smaller {key}"
                    ));
                }
                Err(Error::OutOfMemory(message)) => {
                    return Err(Error::OutOfMemory(format!(
                        "{message}; no more than {at_once} were decoded at a time: lower data.max_response_tokens, or use a \
                         larger GPU"
                    )));
                }
                result => return result,
            }
        }
    }
}

/// What a micro-batch may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MicrobatchLimit {
    Sequences(usize),
    /// Prompt and response tokens together; a longer sequence is alone.
    Tokens(usize),
}

impl MicrobatchLimit {
    /// As configured, halved `halvings` times.
    pub fn of(trainer: &TrainerSection, halvings: u32) -> MicrobatchLimit {
        let halved = |limit: usize| (limit >> halvings.min(usize::BITS - 1)).max(1);
        match trainer.microbatch_tokens {
            Some(tokens) => MicrobatchLimit::Tokens(halved(tokens)),
            None => MicrobatchLimit::Sequences(halved(trainer.microbatch_sequences)),
        }
    }

    /// Consecutive sequences of these lengths, as many at a time as the limit allows.
    pub fn split(self, lengths: &[usize]) -> Vec<Range<usize>> {
        let mut parts: Vec<Range<usize>> = Vec::new();
        let mut tokens = 0;
        for (i, &length) in lengths.iter().enumerate() {
            tokens += length;
            let fits = parts.last().is_some_and(|part| match self {
                MicrobatchLimit::Sequences(most) => part.len() < most,
                MicrobatchLimit::Tokens(most) => tokens <= most,
            });
            match parts.last_mut() {
                Some(part) if fits => part.end = i + 1,
                _ => {
                    parts.push(i..i + 1);
                    tokens = length;
                }
            }
        }
        parts
    }
}

/// Runs `work` on the micro-batches of sequences of these lengths. When memory runs out it begins again with halves:
/// `work` must not keep anything of an attempt that failed.
///
/// # Errors
/// What `work` answers; `OutOfMemory` where nothing is left to halve or `dw_draw: per_microbatch` forbids it.
pub fn with_halving<T>(
    trainer: &TrainerSection,
    dw_draw: DwDraw,
    halvings: &mut u32,
    lengths: &[usize],
    warn: &dyn Fn(&str),
    mut work: impl FnMut(&[Range<usize>]) -> Result<T>,
) -> Result<T> {
    loop {
        let parts = MicrobatchLimit::of(trainer, *halvings).split(lengths);
        let message = match work(&parts) {
            Err(Error::OutOfMemory(message)) => message,
            other => return other,
        };
        let key = match trainer.microbatch_tokens {
            Some(_) => "trainer.microbatch_tokens",
            None => "trainer.microbatch_sequences",
        };
        if dw_draw == DwDraw::PerMicrobatch {
            return Err(Error::OutOfMemory(format!(
                "{message}; {key} is part of the experiment under noisy_ops.dw_draw: per_microbatch: lower it, or let \
                 per_update halve it"
            )));
        }
        let longest = parts.iter().map(Range::len).max().unwrap_or(0);
        if longest <= 1 {
            return Err(Error::OutOfMemory(format!(
                "{message}; no micro-batch holds more than one sequence: lower data.max_response_tokens, set \
                 trainer.gradient_checkpointing or trainer.offload_reference, or use a larger GPU"
            )));
        }
        while MicrobatchLimit::of(trainer, *halvings).split(lengths).len() == parts.len() {
            *halvings += 1;
        }
        let now = match MicrobatchLimit::of(trainer, *halvings) {
            MicrobatchLimit::Sequences(limit) | MicrobatchLimit::Tokens(limit) => limit,
        };
        warn(&format!("out of memory: {message}; from now on as with {key}: {now}"));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const LENGTHS: [usize; 6] = [10, 30, 5, 100, 20, 20];

    fn sizes(limit: MicrobatchLimit) -> Vec<usize> {
        let parts = limit.split(&LENGTHS);
        assert_eq!(parts.iter().cloned().flatten().collect::<Vec<_>>(), (0..6).collect::<Vec<_>>());
        parts.iter().map(Range::len).collect()
    }

    #[test]
    fn splits() {
        assert_eq!(sizes(MicrobatchLimit::Sequences(4)), [4, 2]);
        assert_eq!(sizes(MicrobatchLimit::Sequences(100)), [6]);
        assert_eq!(sizes(MicrobatchLimit::Tokens(45)), [3, 1, 2]);
        assert_eq!(sizes(MicrobatchLimit::Tokens(40)), [2, 1, 1, 2]);
        assert_eq!(sizes(MicrobatchLimit::Tokens(1)), [1; 6]);
        assert_eq!(MicrobatchLimit::Tokens(9).split(&[]), Vec::<Range<usize>>::new());
    }

    /// Memory for 50 tokens at once.
    fn attempts(trainer: &TrainerSection, draw: DwDraw, memory: usize) -> (Vec<Vec<usize>>, u32, Result<()>) {
        let (mut seen, mut halvings) = (Vec::new(), 0);
        let result = with_halving(trainer, draw, &mut halvings, &LENGTHS, &|_| {}, |parts| {
            seen.push(parts.iter().map(Range::len).collect::<Vec<_>>());
            let most = parts.iter().map(|part| LENGTHS[part.clone()].iter().sum::<usize>()).max().unwrap();
            if most > memory { Err(Error::OutOfMemory("no room".into())) } else { Ok(()) }
        });
        (seen, halvings, result)
    }

    #[test]
    fn halves_until_it_fits_and_says_when_it_cannot() {
        let by_tokens = TrainerSection { microbatch_tokens: Some(400), ..TrainerSection::default() };
        let (seen, halvings, result) = attempts(&by_tokens, DwDraw::PerUpdate, 100);
        assert!(result.is_ok());
        // 200 tokens would be one micro-batch again: that is not tried.
        assert_eq!((seen, halvings), (vec![vec![6], vec![3, 1, 2]], 2));
        let by_sequences = TrainerSection { microbatch_sequences: 6, ..TrainerSection::default() };
        let (seen, halvings, result) = attempts(&by_sequences, DwDraw::PerUpdate, 145);
        assert!(result.is_ok());
        assert_eq!((seen, halvings), (vec![vec![6], vec![3, 3]], 1));
        let (seen, _, result) = attempts(&by_sequences, DwDraw::PerUpdate, 99);
        assert_eq!(seen.last().unwrap(), &vec![1; 6]);
        assert!(result.unwrap_err().to_string().contains("more than one sequence"));
        let (seen, halvings, result) = attempts(&by_sequences, DwDraw::PerMicrobatch, 145);
        assert_eq!((seen.len(), halvings), (1, 0));
        assert!(result.unwrap_err().to_string().contains("per_update"));
    }
}
