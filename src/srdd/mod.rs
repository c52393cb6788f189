//! SRDD: where in a model, and how much, quantization and hardware errors hurt (numerics.md section 6).
//!
//! Weights and activations against formats, the output against each layer's injection, multipliers of AQN from any of them; and
//! the search for layers whose arithmetic is faulty.

pub mod activations;
pub mod changes;
pub mod device;
pub mod fault_finder;
pub mod fault_statistics;
pub mod fault_table;
pub mod faults;
pub mod gaussian;
pub mod multipliers;
pub mod planted;
pub mod prompts;
pub mod robust;
pub mod sensitivity;
pub mod summary;
pub mod weights;
