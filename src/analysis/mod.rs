//! Statistics of results.

pub mod plot;
pub mod statistics;
