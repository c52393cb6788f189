//! The two keys of a draw besides the run's seed, packed into the generator's counter (numerics.md section 4a).
//!
//! stream (32 bits) = purpose << 28 | phase << 24 | direction << 22 | module index (22 bits)
//! token  (64 bits) = step (16) | dataset index (22) | member (8) | position (18), or counter (32) | row (32)
//!
//! A draw is then a function of what it is for, never of batch order, padding or recomputation.

use crate::{Result, bail_input};

/// What a draw is for.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    MatmulForward = 1,
    MatmulDx = 2,
    MatmulDw = 3,
    Aqn = 4,
    StochasticRounding = 5,
    Sampling = 6,
    Other = 7,
}

/// In which pass; `Shared` where several passes use one draw.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    Shared = 0,
    Rollout = 1,
    OldLogprobs = 2,
    RefLogprobs = 3,
    Update = 4,
    Validation = 5,
}

/// The step of every validation token: evaluations of different steps and arms are paired.
pub const VALIDATION_STEP: u32 = 0xFFFF;

/// `direction` of the two draws of purpose `StochasticRounding`, whose row keys may coincide.
pub const ROUNDED_WEIGHT: u32 = 0;
pub const ROUNDED_ACTIVATION: u32 = 1;

/// The stream of a draw. Fails where `direction` exceeds 2 bits or `module_index` 22 bits.
pub fn stream(purpose: Purpose, phase: Phase, direction: u32, module_index: u32) -> Result<u32> {
    let direction = field("direction", direction, 2)?;
    let module = field("module index", module_index, 22)?;
    Ok((purpose as u32) << 28 | (phase as u32) << 24 | (direction as u32) << 22 | module as u32)
}

/// The key of a token: member 0 at prompt positions, 1 + g for group member g at response positions.
/// Fails where a value exceeds its field.
pub fn token_key(step: u32, dataset_index: u32, member: u32, position: u32) -> Result<u64> {
    let step = field("step", step, 16)?;
    let index = field("dataset index", dataset_index, 22)?;
    let member = field("group member", member, 8)?;
    let position = field("position", position, 18)?;
    Ok(step << 48 | index << 26 | member << 18 | position)
}

/// The key of a weight row: `counter` is the update number (dW, stochastic rounding) or the step (AQN).
pub fn row_key(counter: u32, row: u32) -> u64 {
    (counter as u64) << 32 | row as u64
}

fn field(name: &str, value: u32, bits: u32) -> Result<u64> {
    if value >> bits != 0 {
        bail_input!("noise key: {name} {value} is out of range, expected at most {}", (1u32 << bits) - 1);
    }
    Ok(value as u64)
}
