//! Statistics of results.

pub mod statistics;
