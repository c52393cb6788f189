//! The reward of a configuration: a rule, a command, or a weighted sum of several; and DAPO's penalty for long responses.
//!
//! ```text
//! R        = sum over parts of weight * part            None as soon as one part is None: unscorable
//! overlong = factor * clip((Lmax - Lbuf - tokens) / Lbuf, -1, 0)           DAPO, arXiv 2503.14476, eq. 13
//! ```
//!
//! The first part says what is right: in validation a response counts where it is above 0.5. Rules give 0 or 1.

use std::cell::RefCell;

use super::command::CommandReward;
use super::{RewardMode, score};
use crate::rl::recipe::PreparedQuestion;
use crate::rl::section::{Overlong, RewardKind, RewardSection};
use crate::{Result, bail_input};

/// A completion to be scored.
pub struct Item<'a> {
    pub question: &'a PreparedQuestion,
    pub text: &'a str,
    pub member: u32,
    pub validation: bool,
}

/// Its reward, and that of each part.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    pub reward: Option<f64>,
    pub parts: Vec<Option<f64>>,
}

/// Holds the processes of commands: one for a run.
pub struct Scorer {
    parts: Vec<(f64, Judge)>,
}

enum Judge {
    Rule(RewardMode),
    Command(RefCell<CommandReward>),
}

impl Scorer {
    /// Starts the commands.
    ///
    /// # Errors
    /// `Input`: a command that is not there.
    pub fn new(section: &RewardSection) -> Result<Scorer> {
        let judge = |kind, mode, command: &Option<Vec<String>>| match (kind, command) {
            (RewardKind::Gsm8k, _) => Ok(Judge::Rule(mode)),
            (RewardKind::Numeric, _) => Ok(Judge::Rule(RewardMode::Numeric)),
            (RewardKind::Command, Some(argv)) => {
                let command = CommandReward::start(argv, section.timeout_s, section.max_restarts)?;
                Ok(Judge::Command(RefCell::new(command)))
            }
            (RewardKind::Command, None) => {
                bail_input!("reward.command: found null, expected a command and its arguments")
            }
        };
        let parts = match section.sum.as_slice() {
            [] => vec![(1.0, judge(section.kind, section.mode, &section.command)?)],
            sum => {
                let part = |p: &crate::rl::section::RewardPart| Ok((p.weight, judge(p.kind, p.mode, &p.command)?));
                sum.iter().map(part).collect::<Result<_>>()?
            }
        };
        Ok(Scorer { parts })
    }

    /// # Errors
    /// `Runtime`: a command that failed too often.
    pub fn score(&self, items: &[Item]) -> Result<Vec<Scored>> {
        let parts = self.parts.iter().map(|(_, judge)| judge.score(items)).collect::<Result<Vec<_>>>()?;
        let one = |i: usize| {
            let own: Vec<Option<f64>> = parts.iter().map(|part| part[i]).collect();
            let weighted = self.parts.iter().zip(&own).map(|((weight, _), part)| part.map(|r| weight * r));
            Scored { reward: weighted.sum(), parts: own }
        };
        Ok((0..items.len()).map(one).collect())
    }

    /// Whether the first part finds each response right.
    ///
    /// # Errors
    /// As [`score`](Scorer::score).
    pub fn correct(&self, items: &[Item]) -> Result<Vec<bool>> {
        let first = self.parts[0].1.score(items)?;
        Ok(first.into_iter().map(|reward| reward.is_some_and(|r| r > 0.5)).collect())
    }

    /// What went wrong with commands since the last call.
    pub fn take_warnings(&self) -> Vec<String> {
        let commands = self.parts.iter().filter_map(|(_, judge)| match judge {
            Judge::Command(command) => Some(command),
            Judge::Rule(_) => None,
        });
        commands.flat_map(|command| command.borrow_mut().take_warnings()).collect()
    }
}

impl Judge {
    fn score(&self, items: &[Item]) -> Result<Vec<Option<f64>>> {
        match self {
            Judge::Rule(mode) => {
                Ok(items.iter().map(|item| Some(score(*mode, item.text, &item.question.ground_truth))).collect())
            }
            Judge::Command(command) => command.borrow_mut().score(items),
        }
    }
}

/// What a response of `tokens` of at most `max_tokens` loses: at most 0.
pub fn overlong_penalty(overlong: &Overlong, tokens: usize, max_tokens: usize) -> f64 {
    let buffer = overlong.buffer_tokens as f64;
    let left = max_tokens as f64 - buffer - tokens as f64;
    (left / buffer).clamp(-1.0, 0.0) * overlong.factor
}
