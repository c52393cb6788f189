//! temper hardens a language model against the arithmetic it will run on. ARCHITECTURE.md is the map.
//!
//! Modules are listed in dependency order: a module may use those above it, never those below
//! (tests/tidy.rs holds this).

// It panics where nobody reads any more; run/console.rs has what does not.
#![deny(clippy::print_stderr)]

pub mod analysis;
pub mod bench;
pub mod cli;
pub mod config;
pub mod data;
pub mod device;
pub mod error;
pub mod inject;
pub mod model;
pub mod numerics;
pub mod ops;
pub mod remote;
pub mod rl;
pub mod run;
pub mod srdd;

pub use error::{Error, Result};
